"""Promises 7, 9, 10 and 11: any shape, type and option against the float64 definitions; extremes; NaN is no picture.

A hundred random cases run always, 2,000 by `python -m pytest -m slow tests/promises/test_numbers.py`, or as many as the
environment variable ATTNGEN_EXAMPLES says.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attngen
from attngen import (
    AgentAttention,
    AttnGenWarning,
    DownsampledKV,
    FocalAttention,
    LinearAttention,
    SiTTransformer2DModel,
    TokenMerging,
)
from attngen import functional as F
from tests import oracles
from tests.builders.hosts import HOSTS, fresh, normal, randomised
from tests.builders.pipelines import KINDS, denoisers
from tests.promises.readers import SIT

TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
"""Of the largest value, for scores of ordinary size."""

attend = torch.nn.functional.scaled_dot_product_attention
size = st.integers(1, 6)
number = st.floats(-1.5, 1.5, width=16)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == want.shape and torch.isfinite(got).all()
    error = (got.double() - want).abs().max()
    assert error <= TOLERANCES[dtype] * max(1.0, float(want.abs().max())), float(error)


@st.composite
def heads(draw: Any, num_queries: int | None = None, **sizes: int) -> list[torch.Tensor]:
    """Query, key, value and agents of a random shape and type, with (B, H, N, D) laid out in one of two ways."""
    batch, num_heads, n, m, d, e = (draw(size) for _ in range(6))
    batch, num_heads = min(batch, 2), min(num_heads, 3)
    n = num_queries or n
    keys = sizes.get("keys") or draw(size)
    dtype, seed = draw(st.sampled_from(list(TOLERANCES))), draw(st.integers(0, 999))
    tensors = []
    for i, (count, width) in enumerate(((n, d), (keys, d), (keys, e), (m, d))):
        x = normal(batch, count, num_heads, width, seed=4 * seed + i).to(dtype).transpose(1, 2)
        tensors.append(x.contiguous() if draw(st.booleans()) else x)
    return tensors


@st.composite
def agent_case(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, agents = draw(heads())
    shapes = {
        "aggregation_bias": (*query.shape[:2], agents.shape[2], key.shape[2]),
        "broadcast_bias": (*query.shape[:2], query.shape[2], agents.shape[2]),
    }
    options: dict[str, Any] = {
        name: normal(*shape, seed=5).to(query.dtype) for name, shape in shapes.items() if draw(st.booleans())
    }
    options |= {name: draw(number) for name in ("scale", "broadcast_scale") if draw(st.booleans())}
    if query.shape[2] == key.shape[2]:
        options["shortcut"] = draw(number)
    got = F.agent_attention(query, key, value, agents, **options)
    return got, oracles.agent_attention(query, key, value, agents, **options)


@st.composite
def linear_case(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, _ = draw(heads())
    name = draw(st.sampled_from(["elu", "relu", "focused", "identity"]))
    if name == "identity":  # for features that are positive already
        query, key = query.abs() + 0.1, key.abs() + 0.1
    got = F.linear_attention(query, key, value, feature_map=name)
    return got, oracles.linear_attention(query, key, value, name)


@st.composite
def downsampled_case(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grid = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    factor, tokens = draw(st.integers(1, min(grid))), grid[0] * grid[1]
    query, key, value, _ = draw(heads(tokens, keys=tokens))
    kept = [F.downsample_tokens(x.flatten(0, 1), grid, factor).unflatten(0, x.shape[:2]) for x in (key, value)]
    return attend(query, *kept), oracles.downsampled_attention(query, key, value, grid, factor)


@st.composite
def focal_case(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grid = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    tokens, options = grid[0] * grid[1], (draw(st.integers(1, 4)), draw(st.integers(0, 3)))
    query, key, value, _ = draw(heads(tokens, keys=tokens))
    num_cells = draw(st.integers(1, tokens))
    context = None
    if draw(st.booleans()):
        context = key[:, :, :1] * 0.5, value[:, :, :1] * 0.5
    got = F.focal_attention(
        query, key, value, grid, window=options[0], margin=options[1], num_cells=num_cells, context=context
    )
    cells = F.agent_grid(num_cells, grid)
    return got, oracles.focal_attention(query, key, value, grid, *options, cells, context)


@st.composite
def merging_case(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Wide float64 tokens: with rounding, which of two alike tokens is merged is a matter of taste."""
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    stride = draw(st.integers(1, min(4, height))), draw(st.integers(1, min(4, width)))
    ratio, seed = draw(st.floats(0, 0.95)), draw(st.integers(0, 999))
    metric, x = (normal(2, height * width, 8, seed=2 * seed + i).double() for i in (0, 1))
    matching = F.match_tokens(metric, (height, width), stride, ratio)
    oracle = oracles.Matching(metric, (height, width), stride, ratio)
    ours, theirs = matching.merge(x)[:, None], oracle.merge(x)[:, None]
    got = matching.unmerge(attend(ours, ours, ours)[:, 0])
    return got, oracle.unmerge(oracles.softmax_attention(theirs, theirs, theirs)[:, 0])


@st.composite
def pooling_case(draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grid = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    cells = draw(st.integers(1, grid[0])), draw(st.integers(1, grid[1]))
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    x = normal(2, grid[0] * grid[1], 3, seed=draw(st.integers(0, 999))).to(dtype)
    return F.pool_tokens(x, grid, cells), oracles.pool_tokens(x.double(), grid, cells)


CASES = {
    "agent": agent_case(),
    "linear": linear_case(),
    "downsampled": downsampled_case(),
    "focal": focal_case(),
    "merging": merging_case(),
    "pooling": pooling_case(),
}


def check(name: str, examples: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(CASES[name])
    def run(case: tuple[torch.Tensor, torch.Tensor]) -> None:
        close(*case, case[0].dtype)

    run()


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_random_cases(name):
    """Seventeen of each method."""
    check(name, 17)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_thousand_random_cases(name):
    check(name, int(os.environ.get("ATTNGEN_EXAMPLES", "2000")) // len(CASES))


# Any size of picture

METHODS = (
    AgentAttention(num_agents=4),
    TokenMerging(0.5),
    DownsampledKV(2),
    FocalAttention(2, 1, 4),
    LinearAttention("elu"),
)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sit"])
def test_any_size_of_picture(name):
    """Odd, prime, thin and tiny grids: a finite result of the right shape, and a row in the report for every layer."""
    host, model = HOSTS[name], fresh(name)
    step = 1 if name == "sd15" else 2
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        for rows, columns in ((4, 4), (5, 7), (13, 11), (4, 37), (23, 4)):
            stock = host(model, (step * rows, step * columns), batch=1)
            for method in METHODS:
                with attngen.apply(model, method) as handle:
                    out = host(model, (step * rows, step * columns), batch=1)
                    layers = handle.report().patched
                assert out.shape == stock.shape and torch.isfinite(out).all()
                for layer in layers:
                    assert layer.is_active or layer.stages, layer


# Extremes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS[:1] + METHODS[3:], ids=lambda method: method.kind)
def test_a_patched_model_at_16384_tokens_and_scores_of_a_million(method, dtype):
    """A whole transformer of one layer, whose queries and keys are far beyond what float16 can multiply."""
    with torch.random.fork_rng():
        model = randomised(SiTTransformer2DModel(**{**SIT, "sample_size": 256}))
    attn = model.transformer_blocks[0].attn
    with torch.no_grad():
        for layer in (attn.to_q, attn.to_k):
            layer.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(300)
            layer.bias.zero_()
        inside = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(2))
        assert (attn.to_q(inside) @ attn.to_k(inside).mT).abs().max() > 1e6
        latents, label = normal(1, 3, 256, 256), torch.tensor([1])
        attngen.apply(model, method)
        wide = model(latents, torch.tensor([0.4]), label).sample
        narrow = model.to(dtype)(latents.to(dtype), torch.tensor([0.4], dtype=dtype), label).sample
    assert torch.isfinite(wide).all() and narrow.dtype == dtype and torch.isfinite(narrow).all()


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_path_at_scores_of_a_million(kernel, dtype):
    """Whole numbers, which every type holds exactly; their products are beyond float16."""
    generator = torch.Generator().manual_seed(0)
    query, key, agents = (torch.randint(-125, 126, (1, 2, n, 64), generator=generator) for n in (40, 50, 4))
    query[:, :, 0], agents[:, :, 0], key[:, :, 0] = 125, 125, 125
    assert (agents @ key.mT).max() == 1_000_000
    value = normal(1, 2, 50, 8).to(dtype)
    query, key, agents = (x.to(dtype) for x in (query, key, agents))
    got = F.agent_attention(query, key, value, agents, kernel=kernel)
    assert torch.isfinite(got).all()
    if (kernel, dtype) != ("matmul", torch.bfloat16):  # it rounds its scores: here to thousands
        want = oracles.agent_attention(query, key, value, agents)
        assert (got - want).abs().max() <= 1e-2 * want.abs().max()


# NaN is no picture: of the programs in `tests/pipelines`; here the pipeline of ours, and ours alone checks


@pytest.mark.parametrize("where", ["transformer", "vae", "latents"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error(where, value):
    pipe = KINDS["sit"].build()
    attngen.apply(pipe, AgentAttention(num_agents=4))
    latents = {}
    if where == "latents":
        latents = {"latents": torch.full((1, 4, 16, 16), value)}
    else:
        weights = getattr(pipe, where)
        target = weights.proj_out if where == "transformer" else weights.decoder.conv_out
        torch.nn.init.constant_(target.weight, value)
    with pytest.raises((FloatingPointError, ValueError), match="finite|NaN"):
        KINDS["sit"](pipe, **latents)


# Exact where it says so


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "dit", "pixart-alpha"])
def test_methods_that_keep_everything_are_softmax_attention(kind):
    pipe = KINDS[kind].build()
    exact = KINDS[kind](pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnGenWarning)
        for method in (
            "softmax",
            AgentAttention(num_agents=4096),
            TokenMerging(0.0),
            DownsampledKV(1),
            FocalAttention(64),
        ):
            with attngen.apply(pipe, method):
                assert (KINDS[kind](pipe) - exact).abs().max() <= 1e-5
    assert all(not hasattr(module, "attngen") for model in denoisers(pipe).values() for module in model.modules())
