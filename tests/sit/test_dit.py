"""DiT in SiT's class: the network against diffusers' DiT, discrete schedulers, guidance, clocks."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file

import attngen
from attngen.hosts.families import family_of
from attngen.schedule import Schedule
from attngen.sit import pipeline as sit_pipeline
from attngen.sit.checkpoints import PATCH_SIZES, SIZES, convert_diffusers_dit
from attngen.sit.model import SiTTransformer2DModel
from attngen.sit.pipeline import SiTPipeline
from attngen.sit.scheduler import InterpolantScheduler
from tests.golden_cases import golden_cases, state

SMALL = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 5,
    "num_mediators": 4,
    "predicts_variance": True,
}
DDPM = {"variance_type": "learned_range", "clip_sample": False}


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_transformer(attention="mediator", **config):
    with torch.random.fork_rng():
        return randomised(SiTTransformer2DModel(**{**SMALL, "attention": attention, **config}))


def make_pipe(scheduler=None, vae=None, **config):
    pipe = SiTPipeline(make_transformer(**config), scheduler or DDPMScheduler(**DDPM), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, labels=(0, 1), seeds=(0, 1), num_inference_steps=4, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"generator": generators, "output_type": "latent", **options}
    return pipe(list(labels), num_inference_steps=num_inference_steps, **options).images


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every network call."""
    seen, forward = [], SiTTransformer2DModel.forward
    monkeypatch.setattr(
        SiTTransformer2DModel, "forward", lambda self, **kwargs: seen.append(kwargs) or forward(self, **kwargs)
    )
    return seen


def diffusers_dit(num_classes=5, dit_time=True, **config):
    """diffusers' DiT with one embedder in all blocks, and with the frequencies of time of DiT itself."""
    with torch.random.fork_rng():
        model = DiTTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "sample_size": 8,
                "num_embeds_ada_norm": num_classes,
                "norm_eps": 1e-6,
                **config,
            }
        )
    randomised(model)
    embedders = [block.norm1.emb for block in model.transformer_blocks]
    for embedder in embedders:
        embedder.load_state_dict(embedders[0].state_dict())
        if dit_time:
            embedder.time_proj.downscale_freq_shift = 0
    return model


def from_diffusers(model, **config):
    settings, weights = convert_diffusers_dit(model.state_dict(), model.config)
    with torch.random.fork_rng():
        ours = SiTTransformer2DModel(**{**settings, **config}).eval()
    ours.load_state_dict(weights)
    return ours


def original_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of a softmax model under the names of the published code."""
    outer = {
        "patch_embed": "x_embedder.proj",
        "time_embedder.linear_1": "t_embedder.mlp.0",
        "time_embedder.linear_2": "t_embedder.mlp.2",
        "class_embedder": "y_embedder.embedding_table",
        "proj_out": "final_layer.linear",
        "modulation_out": "final_layer.adaLN_modulation.1",
    }
    inner = {
        "attn.to_out.0": "attn.proj",
        "ff.net.0.proj": "mlp.fc1",
        "ff.net.2": "mlp.fc2",
        "modulation": "adaLN_modulation.1",
    }
    named = {"pos_embed": torch.zeros(1, 16, 32)}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if not name.startswith("transformer_blocks."):
            named[f"{outer[stem]}.{kind}"] = tensor
            continue
        _, index, rest = stem.split(".", 2)
        if rest in inner:
            named[f"blocks.{index}.{inner[rest]}.{kind}"] = tensor
        elif rest == "attn.to_q":
            parts = [weights[f"transformer_blocks.{index}.attn.to_{part}.{kind}"] for part in "qkv"]
            named[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    return named


# The network


@torch.no_grad()
def test_the_network_is_diffusers_dit():
    theirs = diffusers_dit()
    ours = from_diffusers(theirs)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for times in ([0, 500, 999], [1, 2, 3]):
        steps, labels = torch.tensor(times), torch.tensor([0, 4, 5])
        want = theirs(x, steps, labels).sample
        got = ours(x, steps, labels).sample
        assert got.shape == (3, 8, 8, 8)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        # Steps go in as they are, integers or not.
        assert torch.equal(ours(x, steps.float(), labels).sample, got)
    assert (theirs(x, torch.tensor([7, 7, 7]), labels).sample - got).abs().max() > 1e-3


def test_diffusers_dit_of_unequal_embedders_is_refused():
    theirs = diffusers_dit()
    torch.nn.init.zeros_(theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias)
    with pytest.raises(ValueError, match="transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias differs"):
        from_diffusers(theirs)


def test_diffusers_dit_without_a_variance_is_refused():
    with pytest.raises(ValueError, match="predicts noise and variance, 8 channels for 4, and this one has 4"):
        from_diffusers(diffusers_dit(out_channels=4))


@torch.no_grad()
def test_official_checkpoints(tmp_path):
    want = make_transformer("softmax")
    weights = original_names(want.state_dict())
    torch.save(weights, tmp_path / "DiT.pt")
    save_file(weights, tmp_path / "DiT.safetensors")
    x, steps, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([1, 5])
    for name in ("DiT.pt", "DiT.safetensors"):
        model = SiTTransformer2DModel.from_original(
            tmp_path / name, allow_pickle=True, num_attention_heads=2, predicts_variance=True
        ).eval()
        assert model.config.out_channels == 8 and model.dtype == torch.float32
        assert torch.equal(model(x, steps, labels).sample, want(x, steps, labels).sample)
    sit = SiTTransformer2DModel.from_original(tmp_path / "DiT.safetensors", num_attention_heads=2).eval()
    assert sit.config.out_channels == 4
    assert torch.equal(sit(x, steps, labels).sample, want(x, steps, labels).sample[:, :4])


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
@pytest.mark.parametrize("size", SIZES)
def test_presets(size, patch_size):
    with torch.device("meta"):
        dit, sit = (SiTTransformer2DModel.from_preset(f"{family}-{size}/{patch_size}") for family in ("DiT", "SiT"))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (dit, sit)]
    assert shapes[0] == shapes[1]
    assert dit.config.predicts_variance and not sit.config.predicts_variance
    assert (dit.config.out_channels, sit.config.out_channels) == (8, 4)


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="predicts_variance=True needs learn_sigma=True"):
        make_transformer(learn_sigma=False)
    with pytest.raises(ValueError, match="out_channels=8 contradicts in_channels=4 and predicts_variance=False"):
        make_transformer(predicts_variance=False, out_channels=8)
    with pytest.raises(ValueError, match="which make 8; leave it out"):
        make_transformer(out_channels=4)
    assert make_transformer(out_channels=8).config.out_channels == 8
    with pytest.raises(ValueError, match="DiT-XL/2"):
        SiTTransformer2DModel.from_preset("DiT-XXL/2")


@torch.no_grad()
def test_save_and_load(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", lambda *args: said.append(args))
    model = make_transformer()
    model.save_pretrained(tmp_path)
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.predicts_variance and loaded.config.out_channels == 8 and not said
    x = torch.randn(1, 4, 8, 8)
    outputs = [network(x, 3, torch.tensor([1])).sample for network in (loaded, model)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


# Drawing


def make_vae():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).eval()


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(clip_sample=False), diffusers.DPMSolverMultistepScheduler(), diffusers.UniPCMultistepScheduler()],
)
def test_pictures_are_those_of_diffusers_pipeline(scheduler, guidance_scale):
    """Its own network, and ours in its place; it guides all channels of the noise and knows 1000 classes."""
    theirs, vae = diffusers_dit(1000), make_vae()
    ours = from_diffusers(theirs)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def draw(transformer):
        pipe = DiTPipeline(transformer, vae, scheduler)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        return pipe([7], guidance_scale, generator, num_inference_steps=5, output_type="pt").images

    want = draw(theirs)
    torch.testing.assert_close(draw(ours), want, atol=2e-4, rtol=1e-4)
    pipe = SiTPipeline(ours, scheduler, vae)
    pipe.set_progress_bar_config(disable=True)
    options = {"latents": noise, "num_inference_steps": 5, "guidance_scale": guidance_scale, "output_type": "pt"}
    got = pipe([7], guidance_channels=4, **options).images
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert (got - want).abs().max() < (got - got.mean()).abs().max() / 100


def ancestral_step(output, t, sample, noise, levels, betas):
    """One step of equation 11 of arXiv 2006.11239 with the variance of arXiv 2102.09672, in float64."""
    epsilon, place = output.chunk(2, dim=1)
    level, before = levels[t], levels[t - 1] if t > 0 else torch.ones((), dtype=torch.float64)
    mean = (sample - betas[t] / (1 - level).sqrt() * epsilon) / (1 - betas[t]).sqrt()
    if t == 0:
        return mean
    share = (place + 1) / 2
    log_variance = share * betas[t].log() + (1 - share) * (betas[t] * (1 - before) / (1 - level)).log()
    return mean + (log_variance / 2).exp() * noise


@torch.no_grad()
@pytest.mark.parametrize("guidance_channels", [None, 1, 4])
def test_ancestral_sampling_with_learned_variance_is_the_formula(guidance_channels):
    """The last 20 of 1000 steps, which the pipeline is brought to by leaving out the others."""

    class LastSteps(DDPMScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(1000, device)
            self.timesteps = self.timesteps[-num_inference_steps:]

    pipe = make_pipe(LastSteps(**DDPM)).to(torch.float64)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = latents_of(pipe, [2], [6], 20, latents=start, guidance_scale=2.5, guidance_channels=guidance_channels)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    levels = (1 - betas).cumprod(0)
    generator, x = torch.Generator().manual_seed(6), start
    for t in reversed(range(20)):
        conditional = pipe.transformer(x, t, torch.tensor([2])).sample
        unconditional = pipe.transformer(x, t, torch.tensor([5])).sample
        guided = guidance_channels or 3
        output = conditional.clone()
        output[:, :guided] = unconditional[:, :guided] + 2.5 * (conditional - unconditional)[:, :guided]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype) if t > 0 else None
        x = ancestral_step(output, t, x, noise, levels, betas)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)  # diffusers' levels are float32


@torch.no_grad()
@pytest.mark.parametrize("name, tensors, metadata", golden_cases("sit_model_*"))
def test_guidance_is_the_references(name, tensors, metadata):
    """The published function guides three channels of what the network gives; so does a DiT by default."""
    if not metadata["config"]["learn_sigma"]:
        with pytest.raises(ValueError, match="predicts_variance=True needs learn_sigma=True"):
            SiTTransformer2DModel.from_original(state(tensors), num_attention_heads=4, predicts_variance=True)
        return
    config = {"num_attention_heads": 4, "predicts_variance": True}
    transformer = SiTTransformer2DModel.from_original(state(tensors), **config).eval()
    pictures = len(tensors["cfg_x"]) // 2

    class OneCall(DDPMScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.timesteps = tensors["cfg_t"][:1]

        def step(self, model_output, timestep, sample, generator=None, return_dict=True):
            return (model_output,)

    pipe = SiTPipeline(transformer, OneCall(**DDPM))
    got = pipe(
        tensors["cfg_y"][:pictures],
        latents=tensors["cfg_x"][:pictures],
        guidance_scale=metadata["cfg_scale"],
        output_type="latent",
    ).images
    assert got.shape[1] == 8
    torch.testing.assert_close(got[:, :4], tensors["cfg_out"][:pictures], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_sit_of_four_channels_is_guided_in_all():
    outputs = {}
    for channels in (None, 3, 4):
        scheduler = InterpolantScheduler(sampler="ode", solver="euler")
        pipe = make_pipe(scheduler, predicts_variance=False)
        outputs[channels] = latents_of(pipe, guidance_scale=3.0, guidance_channels=channels)
    assert torch.equal(outputs[None], outputs[4]) and not torch.equal(outputs[None], outputs[3])


SCHEDULERS = [
    DDPMScheduler(**DDPM),
    DDPMScheduler(clip_sample=False),
    DDIMScheduler(clip_sample=False),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.DPMSolverSinglestepScheduler(),
    diffusers.UniPCMultistepScheduler(),
    diffusers.EulerDiscreteScheduler(),
    diffusers.EulerAncestralDiscreteScheduler(),
    diffusers.PNDMScheduler(),
    diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
    diffusers.KDPM2DiscreteScheduler(beta_start=1e-4, beta_end=0.02),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_schedulers_of_diffusers(scheduler, calls, monkeypatch, global_rng_untouched):
    said = []
    monkeypatch.setattr(sit_pipeline.logger, "warning", said.append)
    pipe = make_pipe(scheduler)
    both = latents_of(pipe, num_inference_steps=12, guidance_scale=2.0)
    assert both.shape == (2, 4, 8, 8) and both.isfinite().all() and not said
    torch.testing.assert_close(both[1:], latents_of(pipe, [1], [1], 12, guidance_scale=2.0), atol=1e-3, rtol=1e-3)
    shown = [call["timestep"][0].item() for call in calls[: pipe.num_timesteps]]
    assert shown == pytest.approx(scheduler.timesteps.tolist())
    assert max(shown) > 900 and min(shown) < 100


def test_samplers_draw_the_data_of_an_exact_network(monkeypatch):
    """Data N(m, s²) has a known best prediction of the noise: every scheduler ends at that mean and deviation."""
    mean, deviation = 0.6, 0.3
    levels = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def exact(self, hidden_states, timestep, **kwargs):
        step = timestep[0].double()
        low = step.floor().long().clamp(max=998)
        level = torch.lerp(levels[low].log(), levels[low + 1].log(), step - low).exp()
        x, sigma = hidden_states.double(), (1 - level).sqrt()
        noise = sigma * (x - level.sqrt() * mean) / (level * deviation**2 + sigma**2)
        return (torch.cat([noise, torch.zeros_like(noise)], dim=1).to(hidden_states.dtype),)

    monkeypatch.setattr(SiTTransformer2DModel, "forward", exact)
    for scheduler in SCHEDULERS:
        pipe = make_pipe(scheduler)
        drawn = latents_of(pipe, [0] * 64, range(64), 100)
        name = type(scheduler).__name__
        assert drawn.mean().item() == pytest.approx(mean, abs=0.01), name
        assert drawn.std().item() == pytest.approx(deviation, abs=0.03), name


def test_the_learned_variance_is_used_and_dropped():
    outputs = {}
    for name, scheduler in {
        "learned": DDPMScheduler(**DDPM),
        "fixed": DDPMScheduler(clip_sample=False),
        "ddim": DDIMScheduler(clip_sample=False),
    }.items():
        pipe = make_pipe(scheduler)
        before = latents_of(pipe)
        # The rows of the variance are the last four of the eight channels of each pixel of a patch.
        with torch.no_grad():
            pipe.transformer.proj_out.bias.view(4, 8)[:, 4:] += 1
        outputs[name] = (latents_of(pipe) - before).abs().max().item()
    assert outputs["learned"] > 1e-3 and outputs["fixed"] == outputs["ddim"] == 0


@pytest.mark.parametrize(
    "scheduler, sentence",
    [
        (
            InterpolantScheduler(),
            "InterpolantScheduler does not fit a DiT: the transformer predicts noise and variance",
        ),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler does not fit a DiT"),
        (
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "DPMSolverMultistepScheduler does not fit a DiT",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
            "DPMSolverMultistepScheduler does not fit a DiT: the transformer predicts noise and variance",
        ),
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler does not fit a DiT"),
        (DDIMScheduler(prediction_type="v_prediction"), "prediction_type='v_prediction' of DDIMScheduler"),
        (DDIMScheduler(num_train_timesteps=100), "num_train_timesteps=100 of DDIMScheduler does not fit"),
        (DDPMScheduler(variance_type="learned"), "make the scheduler with variance_type='learned_range'"),
        (
            diffusers.DPMSolverMultistepScheduler.from_config(DDPMScheduler(**DDPM).config),
            r"for 3 channels, and the model has 4; make it by .*from_config\(pipe.scheduler.config, variance_type=None",
        ),
    ],
)
def test_wrong_pairs_are_refused(scheduler, sentence, calls):
    with pytest.raises(ValueError, match=sentence):
        make_pipe(scheduler)(0, output_type="latent")
    assert not calls


def test_a_sit_with_a_discrete_scheduler_is_refused(calls):
    with pytest.raises(ValueError, match="DDPMScheduler does not fit SiT; use InterpolantScheduler"):
        make_pipe(DDPMScheduler(**DDPM), predicts_variance=False)(0, output_type="latent")
    assert not calls


def test_solvers_of_three_channels_may_keep_the_variance_type():
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(DDPMScheduler(**DDPM).config)
    plain = diffusers.DPMSolverMultistepScheduler.from_config(DDPMScheduler(**DDPM).config, variance_type=None)
    assert torch.equal(latents_of(make_pipe(scheduler, in_channels=3)), latents_of(make_pipe(plain, in_channels=3)))


@pytest.mark.parametrize(
    "scheduler, sentence",
    [
        (
            DDIMScheduler(),
            "DDIMScheduler clips latents to .-1, 1., which is for pixels; make it with clip_sample=False",
        ),
        (
            diffusers.HeunDiscreteScheduler(),
            "noise levels of HeunDiscreteScheduler are not DiT's; .* beta_start=0.0001",
        ),
    ],
)
def test_a_scheduler_that_spoils_pictures_is_warned_of(scheduler, sentence, monkeypatch):
    said = []
    monkeypatch.setattr(sit_pipeline.logger, "warning", said.append)
    latents_of(make_pipe(scheduler, vae=make_vae()), num_inference_steps=1)
    assert len(said) == 1
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(said[0])


def test_pixels_may_be_clipped(monkeypatch):
    said = []
    monkeypatch.setattr(sit_pipeline.logger, "warning", said.append)
    assert latents_of(make_pipe(DDIMScheduler(), in_channels=3)).abs().max() <= 1.5 and not said


# Time


def test_schedules_read_the_same_clock(calls):
    """1 is noise; steps 999 and 666 are above one half, 333 and 0 below."""
    scheduler = DDPMScheduler(**DDPM, timestep_spacing="linspace")
    pipe = make_pipe(scheduler)
    latents_of(pipe, num_mediators=Schedule((1.0, 0.5), (1, 16)))
    assert [call["timestep"][0].item() for call in calls] == [999, 666, 333, 0]
    assert [call["num_mediators"] for call in calls] == [1, 1, 16, 16]
    seen = []
    latents_of(
        pipe,
        guidance_scale=2.0,
        guidance_interval=(0.0, 0.5),
        callback_on_step_end=lambda p, i, t, k: seen.append(p.current_timestep),
    )
    assert [len(call["hidden_states"]) for call in calls[4:]] == [4, 4, 2, 2]  # SiT's time: 0 is noise
    assert seen == pytest.approx([999, 666, 333, 0])


@pytest.mark.parametrize("scheduler", [SCHEDULERS[-2], SCHEDULERS[-1]], ids=["heun", "kdpm2"])
def test_a_change_driven_schedule_sees_whole_steps(scheduler, calls):
    class Recorder:
        value, shown = 4, 0

        def reset(self):
            pass

        def observe(self, latents):
            self.shown += 1

    recorder = Recorder()
    latents_of(make_pipe(scheduler), num_mediators=recorder, num_inference_steps=5)
    assert len(calls) == 9 and recorder.shown == 5


def test_the_clock_of_a_plan():
    dit, sit = make_transformer("softmax"), make_transformer("softmax", predicts_variance=False)
    assert family_of(dit).clock(999) == pytest.approx(0.999) and family_of(dit).clock(0) == 0
    assert family_of(sit).clock(1.0) == 0 and family_of(sit).clock(0.25) == 0.75


@torch.no_grad()
def test_a_plan_of_stages_follows_the_steps():
    """Exact while there is much noise, agents for the rest: the plan changes what it should and nothing else."""
    pipe = make_pipe(DDIMScheduler(clip_sample=False, timestep_spacing="linspace"), attention="softmax", sample_size=16)
    x, labels = torch.randn(1, 4, 16, 16), torch.tensor([0])
    plain = {step: pipe.transformer(x, torch.tensor([step]), labels).sample for step in (999, 600, 400, 0)}
    exact, agents = ({"*": method} for method in (attngen.SoftmaxAttention(), attngen.AgentAttention(num_agents=4)))
    plan = attngen.Plan((attngen.Stage(1.0, exact), attngen.Stage(0.5, agents)))
    handle = attngen.apply(pipe, plan)
    same = {
        step: torch.allclose(pipe.transformer(x, torch.tensor([step]), labels).sample, want, atol=1e-6)
        for step, want in plain.items()
    }
    handle.remove()
    assert same == {999: True, 600: True, 400: False, 0: False}


def test_a_pipeline_is_saved_and_loaded(tmp_path):
    pipe = make_pipe()
    expected = latents_of(pipe, guidance_scale=2.0, num_mediators=9)
    pipe.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.config.variance_type == "learned_range" and loaded.transformer.config.predicts_variance
    assert torch.equal(latents_of(loaded, guidance_scale=2.0, num_mediators=9), expected)
    loaded.to(torch.bfloat16)
    assert math.isfinite(latents_of(loaded).float().abs().max().item())
