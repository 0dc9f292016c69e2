"""Large pictures in stages, on tiny Stable Diffusion and SDXL pipelines with random weights."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import attngen
from attngen import AgentAttention, Plan, Stage

pytest.importorskip("transformers")

from pipelines import dry_run, upscale
from pipelines.upscale import LargePicture, draw_large, enlarging_pipeline, stage_sizes
from tests.builders.hosts import snapshot
from tests.builders.programs import build_sd, build_sdxl

FEW_AGENTS = Plan.of(AgentAttention(num_agents=4))
WIDE = LargePicture("a fox", ((32, 48), (64, 96)), steps=4, method=FEW_AGENTS, tiling=False)

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipe(request):
    built = {"sd": build_sd, "sdxl": build_sdxl}[request.param]()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def sd():
    built = build_sd()
    built.set_progress_bar_config(disable=True)
    return built


def draw(pipe, picture, **options):
    return list(draw_large(pipe, picture, **options))


def pixels(image):
    return np.asarray(image, dtype=int)


# Sizes


@pytest.mark.parametrize(
    "target, base, stages, sizes",
    [
        ((2048, 2048), 512, None, [(512, 512), (1024, 1024), (2048, 2048)]),
        ((2048, 2048), 512, 1, [(512, 512), (2048, 2048)]),
        ((4096, 4096), 1024, None, [(1024, 1024), (2048, 2048), (4096, 4096)]),
        ((768, 768), 512, None, [(512, 512), (768, 768)]),
        ((2304, 4096), 1024, None, [(768, 1344), (1344, 2368), (2304, 4096)]),
        ((1088, 2056), 512, None, [(384, 704), (640, 1216), (1088, 2056)]),
        ((1024, 1536), (512, 768), None, [(512, 768), (1024, 1536)]),
    ],
)
def test_stages(target, base, stages, sizes):
    assert list(stage_sizes(target, base, 8, stages, 64)) == sizes


@pytest.mark.parametrize(
    "target, base, stages, sentence",
    [
        ((2050, 2048), 512, None, "height must be a multiple of 8, got 2050; the nearest is 2048"),
        ((2048, 3), 512, None, "width must be a multiple of 8, got 3; the nearest is 8"),
        ((0, 512), 512, None, "height must be a multiple of 8, got 0"),
        ((512, 512), 512, None, "512x512 is not larger than the 512x512 of the first stage"),
        ((512, 768), (1024, 512), None, "768x512 is not larger than the 512x1024 of the first stage"),
        ((768, 768), 512, 9, "9 enlargements are too many from 512x512 to 768x768"),
    ],
)
def test_sizes_that_cannot_be(target, base, stages, sentence):
    with pytest.raises(ValueError, match=sentence):
        stage_sizes(target, base, 8, stages, 64)


def test_sizes_of_pipelines(pipe):
    assert (upscale.trained_side(pipe), upscale.size_multiple(pipe)) == (64, 2)


def test_an_enlarged_picture_is_cut_not_stretched():
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 16, 64, 48))
    large = upscale.enlarge_to(image, (64, 128))
    assert large.size == (128, 64) and large.getpixel((64, 32)) == large.getpixel((64, 2)) == (0, 0, 255)


# Drawing


def test_the_first_stage_is_the_pipelines_own_picture(pipe):
    first, large = draw(pipe, dataclasses.replace(WIDE, seed=5))
    own = pipe("a fox", height=32, width=48, num_inference_steps=4, generator=torch.Generator().manual_seed(5))
    assert (pixels(first.image) == pixels(own.images[0])).all()
    assert first.image.size == (48, 32) and large.image.size == (96, 64)
    assert (first.steps, large.steps) == (4, 1) and first.seconds > 0
    assert first.report is None and large.report is not None
    assert {layer.stages[0].agents for layer in large.report.patched} == {4}


def test_an_enlargement_is_image_to_image_with_the_patch(pipe):
    first, large = draw(pipe, WIDE)
    enlarger = enlarging_pipeline(pipe)
    image = first.image.resize((96, 64), Image.Resampling.LANCZOS)
    with attngen.apply(enlarger, FEW_AGENTS):
        generator = upscale.stage_generator(0, 1)
        own = enlarger("a fox", image=image, strength=0.4, num_inference_steps=4, generator=generator).images[0]
    assert (pixels(large.image) == pixels(own)).all()


def test_seeds(sd, global_rng_untouched):
    once, again = draw(sd, WIDE), draw(sd, WIDE)
    other = draw(sd, dataclasses.replace(WIDE, seed=1))
    assert (pixels(once[-1].image) == pixels(again[-1].image)).all()
    assert (pixels(once[-1].image) != pixels(other[-1].image)).any()
    (from_first,) = draw(sd, WIDE, image=once[0].image)
    assert (pixels(from_first.image) == pixels(once[-1].image)).all(), "a stage does not depend on how it was reached"


def test_each_stage_has_noise_of_its_own():
    keys = [(seed, index) for seed in (0, 1) for index in (0, 1, 2)]
    draws = {key: tuple(torch.randn(3, generator=upscale.stage_generator(*key)).tolist()) for key in keys}
    assert len(set(draws.values())) == len(keys)


def test_the_method_is_used_in_the_enlargements_only(sd):
    exact = draw(sd, dataclasses.replace(WIDE, method=None))
    changed = draw(sd, WIDE)
    assert (pixels(exact[0].image) == pixels(changed[0].image)).all()
    assert (pixels(exact[1].image) != pixels(changed[1].image)).any()


def test_several_enlargements(sd):
    picture = dataclasses.replace(WIDE, sizes=((16, 16), (32, 32), (48, 48)), strength=0.5)
    results = draw(sd, picture)
    assert [(result.index, result.image.size, result.steps) for result in results] == [
        (0, (16, 16), 4),
        (1, (32, 32), 2),
        (2, (48, 48), 2),
    ]


def test_strength_says_how_much_is_drawn_over(sd):
    first = draw(sd, dataclasses.replace(WIDE, method=None))[0].image
    near, far = (
        draw(sd, dataclasses.replace(WIDE, method=None, steps=10, strength=strength), image=first)[0]
        for strength in (0.1, 0.9)
    )
    assert (near.steps, far.steps) == (1, 9)
    assert (pixels(near.image) != pixels(far.image)).any()


def test_tiles_draw_nearly_the_same(sd):
    """Tiles differ where a VAE sees further than their overlap, and by the statistics of its norms."""
    pipe = build_sd(sample_size=32)
    pipe.set_progress_bar_config(disable=True)
    picture = dataclasses.replace(WIDE, sizes=((32, 32), (64, 64)))
    first = draw(pipe, picture)[0].image
    whole, tiles = (draw(pipe, dataclasses.replace(picture, tiling=on), image=first)[0].image for on in (False, True))
    apart = np.abs(pixels(whole) - pixels(tiles))
    assert 0 < apart.mean() < 0.4 * pixels(whole).std()
    assert not pipe.vae.use_tiling


# Nothing is left behind


def state(pipe):
    return snapshot(pipe.unet), pipe.vae.use_tiling, {name: id(part) for name, part in pipe.components.items()}


def test_between_stages_and_at_the_end_all_is_as_before(pipe):
    before = state(pipe)
    stages = draw_large(pipe, dataclasses.replace(WIDE, tiling=True))
    for _ in stages:
        assert state(pipe) == before
    stages = draw_large(pipe, WIDE)
    next(stages)
    stages.close()
    assert state(pipe) == before


@pytest.mark.parametrize("stage", [0, 1])
def test_stopping_leaves_all_as_before(pipe, stage):
    before = state(pipe)
    seen = []

    def stop(index, step, steps, latents):
        seen.append((index, step, steps, tuple(latents.shape[-2:])))
        if index == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, dataclasses.replace(WIDE, tiling=True), on_step=stop)
    assert seen[-1] == (stage, 0, 4 if stage == 0 else 1, (16, 24) if stage == 0 else (32, 48))
    assert state(pipe) == before


def test_an_error_in_a_layer_leaves_all_as_before(sd):
    before = state(sd)

    def fail(*_):
        raise RuntimeError("broken")

    handle = sd.vae.decoder.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="broken"):
            draw(sd, dataclasses.replace(WIDE, tiling=True))
    finally:
        handle.remove()
    assert state(sd) == before


def test_tiling_that_was_on_stays_on(sd):
    sd.vae.enable_tiling()
    try:
        draw(sd, WIDE)
        assert sd.vae.use_tiling
    finally:
        sd.vae.disable_tiling()


# What is refused


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"strength": 0.0}, "strength must be above 0 and at most 1, got 0.0"),
        ({"strength": float("nan")}, "strength must be above 0 and at most 1, got nan"),
        ({"strength": 0.2}, "a strength of 0.2 leaves none of 4 steps to an enlargement; take 5 steps"),
        ({"method": "nope"}, "unknown method 'nope'"),
    ],
)
def test_bad_values_are_refused_before_work(sd, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw_large(sd, dataclasses.replace(WIDE, **changes))


def test_pipelines_that_cannot_enlarge(sd, monkeypatch):
    from diffusers import PixArtAlphaPipeline

    class Other(type(sd)):
        __name__ = "Other"

    with pytest.raises(ValueError, match="no image-to-image pipeline for Pix"):
        enlarging_pipeline(object.__new__(type("Pix", (PixArtAlphaPipeline,), {"config": {}})))
    monkeypatch.setattr(sd, "vae", None)
    with pytest.raises(ValueError, match="draws without a VAE"):
        upscale.check_picture(sd, sd, WIDE)


def test_a_picture_that_is_not_finite(sd):
    bias = sd.unet.conv_out.bias
    kept = bias.detach().clone()
    try:
        torch.nn.init.constant_(bias, float("nan"))
        with pytest.raises(FloatingPointError, match="the image of 48x32 is not finite; try --dtype"):
            draw(sd, WIDE)
    finally:
        with torch.no_grad():
            bias.copy_(kept)


# Memory


def test_the_estimate_is_what_a_real_run_allocates(pipe):
    picture = dataclasses.replace(WIDE, sizes=((32, 32), (128, 160)))
    arguments = upscale.call_arguments(upscale.with_defaults(pipe, picture))
    need = dry_run.DryRun(pipe).enlargement(pipe, (128, 160), FEW_AGENTS, False, "none", arguments)
    first = Image.new("RGB", (32, 32))
    with dry_run.TensorPeak() as peak:
        draw(pipe, picture, image=first)
    assert 0.9 * (need.total - need.weights) <= peak.peak <= 1.2 * (need.total - need.weights)
    weights = sum(
        p.nbytes for part in pipe.components.values() if hasattr(part, "parameters") for p in part.parameters()
    )
    assert weights <= need.weights < 1.01 * weights + 10_000


def test_the_estimate_knows_tiles_offloading_stages_and_leaves_the_pipeline_alone(sd):
    before = state(sd)
    dry = dry_run.DryRun(sd)
    arguments = {"prompt": "a fox", "num_inference_steps": 2}
    many = Plan.of(AgentAttention(num_agents=1000))
    both = Plan((Stage(1.0, {"*": AgentAttention(num_agents=4)}), Stage(0.5, {"*": AgentAttention(num_agents=1000)})))
    whole = dry.enlargement(sd, (96, 96), many, False, "none", arguments)
    tiles = dry.enlargement(sd, (96, 96), both, True, "model", arguments)
    assert tiles.decode < whole.decode and tiles.encode < whole.encode
    assert tiles.denoiser == whole.denoiser
    small = dry.enlargement(sd, (32, 32), None, True, "sequential", arguments)
    assert small.weights < tiles.weights < whole.weights and small.denoiser < tiles.denoiser
    assert state(sd) == before


def test_the_hungriest_stage_of_a_plan_counts(sd, monkeypatch):
    monkeypatch.setattr(dry_run.DryRun, "_plan_peak", lambda self, layers, *_: layers["*"].num_agents)
    stages = [
        Stage(start, {"*": AgentAttention(num_agents=agents)}) for start, agents in ((1.0, 4), (0.7, 9), (0.2, 2))
    ]
    need = dry_run.DryRun(sd).enlargement(sd, (32, 32), Plan(tuple(stages)), True, "none", {"prompt": "a fox"})
    assert need.denoiser == 9
