"""Projections as matrices: the same numbers as the module, or none at all where the module does anything else."""

import peft
import pytest
import torch
import torch.nn.functional as tf
from torch import nn

from attngen.layers.projections import effective_projection, is_one_matrix

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def inputs():
    return torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(0))


def assert_same(got, want, tolerance):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


def projection_of(module):
    """What `effective_projection` gives; `is_one_matrix` answers alike."""
    projection = effective_projection(module)
    assert is_one_matrix(module) == (projection is not None)
    return projection


def lora_layer(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        holder = nn.Module()
        holder.to_q = nn.Linear(10, 8)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False, **options)
        model = peft.get_peft_model(holder, config)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return model, model.base_model.model.to_q


def assert_projects_as(module):
    x = inputs()
    projection = projection_of(module)
    assert projection is not None
    assert_same(tf.linear(x, *projection), module(x), 1e-5)
    return projection


def test_projection_of_a_linear_layer():
    for bias in (True, False):
        layer = nn.utils.skip_init(nn.Linear, 10, 8, bias=bias)
        projection = projection_of(layer)
        assert projection is not None and projection.weight is layer.weight and projection.bias is layer.bias


def test_projection_of_a_lora_layer():
    model, layer = lora_layer()
    base = assert_projects_as(layer.base_layer)
    projection = assert_projects_as(layer)
    assert not torch.equal(projection.weight, base.weight)
    lora = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    mine, plain = (
        torch.autograd.grad(f.square().sum(), lora) for f in (tf.linear(inputs(), *projection), layer(inputs()))
    )
    for got, want in zip(mine, plain, strict=True):
        assert_same(got, want, 1e-5)
    model.base_model.set_adapter(["default", "other"])
    assert_projects_as(layer)
    layer.scale_layer(0.3)
    assert_projects_as(layer)
    with model.disable_adapter():
        assert_same(assert_projects_as(layer).weight, base.weight, 0)
    layer.merge()
    assert_projects_as(layer)
    with model.disable_adapter():
        assert projection_of(layer) is None  # a call of the layer unmerges it


def test_projection_of_a_lora_layer_with_biases_in_half_precision():
    _, layer = lora_layer(lora_bias=True)
    nn.init.constant_(layer.lora_B["default"].bias, 0.7)
    assert_projects_as(layer)
    layer.base_layer.bfloat16()
    x = inputs().bfloat16()
    got, want = tf.linear(x.float(), *(t.float() for t in projection_of(layer))), layer(x).float()
    assert (got - want).norm() < 2**-7 * want.norm()


def test_no_projection_of_anything_else():
    _, layer = lora_layer(lora_dropout=0.5)
    assert projection_of(layer.train()) is None
    assert_projects_as(layer.eval())
    _, layer = lora_layer(use_dora=True)
    assert projection_of(layer) is None

    class Shifted(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    linear = lambda: nn.utils.skip_init(nn.Linear, 4, 4)
    hooked, replaced, quantised = linear(), linear(), linear()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    quantised.weight = nn.Parameter(quantised.weight.to(torch.float8_e4m3fn))
    with torch.random.fork_rng():
        subclass, conv = Shifted(4, 4), nn.Conv1d(4, 4, 1)
    for module in (hooked, replaced, quantised, subclass, conv, nn.Identity()):
        assert projection_of(module) is None
