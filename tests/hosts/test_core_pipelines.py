"""Whole pipelines through the core host: apply, generate, report, trace, save while patched, remove."""

import math

import diffusers
import pytest
import torch

import attngen
from attngen import AgentAttention, DownsampledKV, Plan, Stage
from attngen.hosts.families import denoisers_of
from attngen.layers.route import EXACT
from tests.builders.whole import WHOLE
from tests.builders.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")

PLAN = Plan((Stage(1.0, {"*": AgentAttention(num_agents=8)}), Stage(0.5, {"*": DownsampledKV(2)})))


def wan():
    """Wan 2.2: one transformer for the first, noisy steps and another for the rest."""
    row = ZOO["WanTransformer3DModel"]
    first, second = row.model(0), row.model(1)
    channels, width = first.config.in_channels, first.config.text_dim
    with torch.random.fork_rng():
        vae = diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        transformer=first,
        transformer_2=second,
        boundary_ratio=0.8,
    )
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))

    def generate():
        return pipe(
            prompt_embeds=text,
            negative_prompt_embeds=0.5 * text,
            height=64,
            width=96,
            num_frames=9,
            num_inference_steps=6,
            max_sequence_length=7,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    return pipe, generate


def test_wan_with_two_transformers(tmp_path):
    pipe, generate = wan()
    want = generate()
    handle = attngen.apply(pipe, PLAN)
    with handle.trace() as trace:
        got = generate()
    assert got.isfinite().all() and not torch.equal(got, want)
    assert trace.calls == {"transformer": 6, "transformer_2": 6}
    # Six steps with two calls each: three by each transformer; the schedule is shifted towards noise.
    ran = {(row.model, row.start): (row.calls, row.kernel, row.agents) for row in trace.rows}
    assert ran == {
        ("transformer", 1.0): (6, "sdpa", 8),
        ("transformer_2", 1.0): (4, "sdpa", 8),
        ("transformer_2", 0.5): (2, "sdpa", None),
    }
    assert {layer.model for layer in handle.report().patched} == {"transformer", "transformer_2"}
    assert len(str(handle.report()).splitlines()) < 10
    pipe.transformer.save_pretrained(tmp_path / "saved")
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert set(loaded.state_dict()) == set(pipe.transformer.state_dict())
    handle.remove()
    assert torch.equal(generate(), want)
    with attngen.apply(pipe, "softmax"):
        assert torch.equal(generate(), want)


# Rows, those of all frames together, and columns.
GRIDS = {
    "flux2": {(8, 12)},
    "kontext": {(8, 12)},
    "chroma": {(8, 12)},
    "z-image": {(8, 12)},
    "qwen": {(4, 6)},
    "qwen-edit": {(4, 6)},
    "wan-image": {(8, 6)},
    "ltx": {(8, 6)},
    "hunyuan-video": {(8, 6)},
    "sd3-control": {(8, 12)},
    "animatediff": {(8, 12), (4, 6)},
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_pipeline_draws_reports_saves_and_is_restored(name, tmp_path):
    pipe, draw = WHOLE[name]()
    want = draw()
    handle = attngen.apply(pipe, DownsampledKV(2))
    with handle.trace() as trace:
        got = draw()
    assert got.isfinite().all() and not torch.equal(got, want)
    report, models = handle.report(), denoisers_of(pipe)
    assert {(math.prod(layer.grid[:-1]), layer.grid[-1]) for layer in report.patched} == GRIDS[name]
    assert {layer.model for layer in report.patched if layer.is_active} == models.keys() == trace.calls.keys()
    assert {(row.model, row.layer) for row in trace.rows if row.kernel != EXACT} == {
        (layer.model, layer.name) for layer in report.patched
    }
    for model in models.values():
        model.save_pretrained(tmp_path / "patched")
        loaded = type(model).from_pretrained(tmp_path / "patched")
        state = loaded.state_dict()
        assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())
    handle.remove()
    assert torch.equal(draw(), want)
    with attngen.apply(pipe, "softmax"):
        assert torch.equal(draw(), want)


def test_calibration_of_a_video_model():
    pipe, generate = wan()
    want, width = generate(), pipe.transformer.config.text_dim
    text = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(1))
    plan = attngen.calibrate(
        pipe,
        speedup=1.05,
        cost="flops",
        num_stages=2,
        candidates=[AgentAttention(num_agents=4), AgentAttention(num_agents=16), DownsampledKV(2)],
        prompt_embeds=text,
        negative_prompt_embeds=0.5 * text,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=6,
        max_sequence_length=7,
    )
    found = plan.measurements
    assert found.speedup >= 1.05 and 0 < found.error < 1
    assert all(len(cell.trials) > 1 and cell.influence > 0 for layer in found.layers for cell in layer.cells)
    assert torch.equal(generate(), want)
    with attngen.apply(pipe, plan):
        assert not torch.equal(generate(), want)
