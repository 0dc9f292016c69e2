"""What a model computes besides attention products, from its weights: against counts of real calls and known models."""

import math

import diffusers
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import attngen
from attngen.hosts.cost import other_flops
from tests.builders.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::attngen.AttnGenWarning")


@pytest.mark.parametrize(
    "name",
    [
        "UNet2DConditionModel",
        "PixArtTransformer2DModel",
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
        "Krea2Transformer2DModel",
        "Lumina2Transformer2DModel",
        "WanTransformer3DModel",
        "CogVideoXTransformer3DModel",
    ],
)
def test_about_what_a_call_counts(name):
    """Tiny models have more weights for text and time than real ones; a quarter is near enough."""
    tiny = ZOO[name]
    model, inputs = tiny.model(), tiny.inputs(tiny.grids[1], 1)
    with torch.no_grad(), attngen.apply(model, "softmax") as handle:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs)
        report = handle.report()
    estimate = sum(layer.products for layer in report.patched) + sum(report.others.values())
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.parametrize(
    ("name", "grid", "text", "layers", "width", "most"),
    [
        ("FluxTransformer2DModel", (64, 64), 512, 57, 3072, 1.25),
        ("FluxTransformer2DModel", (128, 128), 512, 57, 3072, 1.92),
        ("QwenImageTransformer2DModel", (83, 83), 200, 60, 3072, 1.38),
        ("WanTransformer3DModel", (21, 45, 80), 0, 40, 5120, 3.5),
        ("HunyuanVideoTransformer3DModel", (33, 45, 80), 256, 60, 3072, 7.46),
    ],
)
def test_models_whose_share_is_known(name, grid, text, layers, width, most):
    """A block of width C has 6 N C + N² multiply-adds for N tokens, by two and by four C."""
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    products = 4 * width * layers * (math.prod(grid) + text) ** 2
    assert 1 + products / other_flops(model, grid, text) == pytest.approx(most, rel=0.03)


def test_the_report_shows_the_most_that_attention_can_give():
    tiny = ZOO["Flux2Transformer2DModel@references"]
    model = tiny.model()
    with torch.no_grad(), attngen.apply(model, attngen.AgentAttention(num_agents=4)) as handle:
        assert handle.report().attention_share is None  # its tokens are known after the first call
        model(**tiny.inputs(tiny.grids[1], 1))
        report, larger = handle.report(), handle.report(grid=(64, 64))
    assert 0 < report.attention_share < larger.attention_share < 1
    assert report.most_speedup == pytest.approx(1 / (1 - report.attention_share))
    line = f"no attention makes it more than {report.most_speedup:.2f}x as fast"
    assert line in str(report) and report.to_dict()["most_speedup"] == report.most_speedup
    assert attngen.Report([], (1.0,)).most_speedup is None
