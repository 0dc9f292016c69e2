"""Attention to sparse tiles against its definition, and its properties."""

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as tf

from attngen import TileAttention
from attngen import functional as F
from attngen.kernels import flex, gathered
from attngen.methods import method_from_dict
from attngen.methods.tiles import Cut
from attngen.methods.tiling import Tiles
from tests import oracles
from tests.compare import assert_close, normal

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

TILES = [
    # grid, tile, key tile, density, frames
    ((8, 8), 4, 2, 0.3, 1),
    ((5, 7), 4, 2, 0.2, 1),  # sides of tiles differ
    ((7, 4), 2, 3, 0.5, 1),
    ((1, 9), 4, 2, 0.01, 1),  # one tile at least
    ((6, 6), 3, 1, 0.7, 1),
    ((3, 4, 4), 2, 2, 0.3, 1),
    ((5, 3, 4), 2, 2, 0.3, 2),
]


def inputs(grid, dtype=torch.float64, text=0, batch=1):
    query, key, value = (normal(batch, 2, math.prod(grid), size, seed=i).to(dtype) for i, size in enumerate((8, 8, 5)))
    context = (normal(batch, 2, text, 8, seed=5).to(dtype), normal(batch, 2, text, 5, seed=6).to(dtype))
    return (query * 1.5, key * 1.5, value), context if text else None


@pytest.mark.parametrize(("grid", "tile", "key_tile", "density", "frames"), TILES)
@pytest.mark.parametrize("text", [0, 3])
def test_tile_attention_equals_oracle(grid, tile, key_tile, density, frames, text):
    options = {"tile": tile, "key_tile": key_tile, "density": density, "frames": frames, "scale": 0.4}
    for gain in (0.0, torch.tensor([0.7, 0.2])):
        tensors, options["context"] = inputs(grid, text=text)
        got = F.tile_attention(*tensors, grid, gain=gain, **options)
        assert_close(got, oracles.tile_attention(*tensors, grid, gain=gain, **options), 1e-12)
    tensors, options["context"] = inputs(grid, torch.float32, text)
    assert_close(F.tile_attention(*tensors, grid, **options), oracles.tile_attention(*tensors, grid, **options), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_worse_than_softmax_attention(dtype):
    """Of the same logits, biases in half precision would be off by half a percent."""
    tensors, context = inputs((6, 7), dtype, 3)
    options = {"tile": 4, "key_tile": 2, "density": 0.3, "context": context}
    want = oracles.tile_attention(*tensors, (6, 7), **options)
    got = F.tile_attention(*tensors, (6, 7), **options)
    assert got.dtype == dtype
    plain = tf.scaled_dot_product_attention(*tensors)
    slack = (plain.double() - oracles.softmax_attention(*tensors)).norm() / plain.double().norm()
    assert (got.double() - want).norm() / want.norm() < 4 * slack


@pytest.mark.parametrize(("grid", "tile", "key_tile", "density", "frames"), TILES)
@pytest.mark.parametrize("text", [0, 3])
def test_every_path_has_the_same_numbers(grid, tile, key_tile, density, frames, text, monkeypatch):
    """By a backend without masks, by `flex_attention`, and in chunks of any size."""
    (query, key, value), context = inputs(grid, torch.float32, text, batch=2)
    value, context = tf.pad(value, (0, 3)), context and (context[0], tf.pad(context[1], (0, 3)))
    cut = Cut.of(grid, tile, key_tile, density, frames)
    gain = torch.tensor([0.5, 0.1])
    want = cut.attend(query, key, value, context, 0.4, gain)
    monkeypatch.setattr(gathered, "CHUNK", 1)
    assert_close(cut.attend(query, key, value, context, 0.4, gain), want, 2e-6)

    def backend(query, key, value, scale=None):
        assert query.shape[-1] % 8 == 0 and query.shape[-1] == key.shape[-1] == value.shape[-1]
        return tf.scaled_dot_product_attention(query, key, value, scale=scale)

    assert_close(cut.attend(query, key, value, context, 0.4, gain, backend), want, 1e-5)
    queries, keys, values = cut.queries.cut(query), cut.keys.cut(key), cut.keys.cut(value)
    mean_key, mean_value = cut.keys.means(keys), cut.keys.means(values)
    order = cut._order(queries, keys, mean_key, 0.4)
    pairs = (keys, mean_key), (values, mean_value), context or (key[:, :, :0], value[:, :, :0])
    mixed, _ = flex.tile_attention(queries, *pairs, order, cut.chosen, cut.keys.filled(key.device), 0.4)
    assert_close(cut.queries.join(mixed, 2), cut.attend(query, key, value, context, 0.4), 1e-5)


def test_all_tiles_are_softmax_attention():
    tensors, context = inputs((5, 7), text=3)
    want = oracles.softmax_attention(tensors[0], *(torch.cat(pair, 2) for pair in zip(tensors[1:], context)))  # noqa: B905
    assert_close(F.tile_attention(*tensors, (5, 7), density=1, gain=0.9, context=context), want, 1e-12)
    assert_close(F.tile_attention(*tensors, (5, 7), density=0.01, tile=2, key_tile=8, context=context), want, 1e-12)
    cut = Cut.of((5, 7), 4, 2, 1.0, 1)  # all tiles by the general path
    assert_close(cut.attend(*tensors, context, 8**-0.5, 0.9), want, 1e-12)


def test_uniform_tiles_lose_nothing():
    (query, key, value), _ = inputs((8, 8))
    place = (torch.arange(64) // 8 // 4) * 2 + torch.arange(64) % 8 // 4
    key, value = key[:, :, place], value[:, :, place]
    got = F.tile_attention(query, key, value, (8, 8), tile=4, density=0.25, gain=1.0)
    assert_close(got, oracles.softmax_attention(query, key, value), 1e-12)


def test_a_tile_of_large_spread_is_chosen_before_one_of_larger_mean():
    """Its mean is small and one of its keys is what the queries look for."""
    query = torch.tensor([4.0, 0.0]).expand(1, 1, 16, 2)
    key = torch.zeros(1, 1, 16, 2)
    key[..., 0] = (torch.arange(16) % 4 < 2).float()  # the left half means more
    key[0, 0, 3, 0], key[0, 0, 2, 0] = 6.0, -6.0
    value = torch.eye(16)[None, None]
    got = F.tile_attention(query, key, value, (4, 4), tile=4, key_tile=2, density=0.25)
    assert (got.argmax(-1) == 3).all()


def test_gradients():
    tensors, context = inputs((3, 4), text=2)
    tensors = [x.requires_grad_() for x in (*tensors, *context)]

    def attend(query, key, value, *context):
        gain = torch.tensor([0.3, 0.6], dtype=torch.float64)
        return F.tile_attention(query, key, value, (3, 4), tile=2, key_tile=2, density=0.3, gain=gain, context=context)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


def test_compiles_to_one_graph_and_keeps_its_gradient():
    torch._dynamo.reset()
    (query, key, value), _ = inputs((5, 7), torch.float32)
    query.requires_grad_()

    def attend(query):
        return F.tile_attention(query, key, value, (5, 7), tile=4, key_tile=2, density=0.3, gain=0.4)

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(query)
    assert_close(got, attend(query), 1e-6)
    (ours,), (theirs,) = (torch.autograd.grad(x.square().sum(), query) for x in (got, attend(query)))
    assert_close(ours, theirs, 1e-5)


def test_threads_and_inference_mode_share_index_tensors():
    """Those made in inference mode would be of no use to a gradient."""
    tensors, _ = inputs((9, 5), torch.float32)
    want = oracles.tile_attention(*tensors, (9, 5))

    def attend(train):
        with torch.inference_mode(not train):
            query = tensors[0].clone().requires_grad_(train)
            out = F.tile_attention(query, *tensors[1:], (9, 5))
            return out.detach(), torch.autograd.grad(out.sum(), query)[0] if train else None

    with ThreadPoolExecutor(4) as pool:
        for out, _ in pool.map(attend, [False, True] * 4):
            assert_close(out, want, 2e-6)


def test_under_autocast_it_runs_in_half_precision():
    tensors, _ = inputs((6, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.tile_attention(*tensors, (6, 6), tile=3, key_tile=2)
    assert got.dtype == torch.bfloat16
    assert_close(got, oracles.tile_attention(*tensors, (6, 6), tile=3, key_tile=2), 3e-2)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 9), (3, 4, 6), (5, 3, 4)], ids=str)
def test_cutting_and_joining(grid):
    """Tiles have near-equal sides, hold every token once, and do not cross the edge of a frame."""
    tiles = Tiles.of(grid, (2, 3, 3)[-len(grid) :])
    numbers = torch.arange(math.prod(grid)).double().view(1, 1, -1, 1)
    cut = tiles.cut(numbers)
    assert torch.equal(tiles.join(cut, 1), numbers)
    filled, place = tiles.filled(cut.device), torch.tensor(oracles.places(grid))
    own = cut[0, ..., 0].long()
    assert torch.equal(own[filled].sort().values, torch.arange(math.prod(grid)))
    for tokens, real in zip(own, filled, strict=True):
        spans = place[tokens[real]].amax(0) - place[tokens[real]].amin(0) + 1
        assert math.prod(spans.tolist()) == real.sum() and (spans <= torch.tensor(tiles.side)).all()
        assert (spans >= torch.tensor(tiles.side) - 1).all()
        assert set(tokens.tolist()) == set(tokens[real].tolist())
    assert_close(tiles.means(cut).sum(1), sum(own[i][filled[i]].double().mean() for i in range(len(own))).view(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 5)}, "12 queries and 12 keys do not fill a grid of 3 x 5 = 15"),
        ({"grid": (12,)}, "a grid is (height, width) or (frames, height, width) in tokens, got (12,)"),
        ({"tile": 0}, "tile must be a whole number >= 1, got 0"),
        ({"key_tile": 1.5}, "key_tile must be a whole number >= 1, got 1.5"),
        ({"frames": 0}, "frames must be a whole number >= 1, got 0"),
        ({"density": 1.5}, "density must be in [0, 1], got 1.5"),
        ({"gain": torch.ones(3)}, "gain has shape (3,), but there are 2 heads"),
        ({"key": torch.zeros(1, 2, 12, 6)}, "key has head size 6, but query has 4"),
        ({"context": (torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 3, 4))}, "key has head size 6, but query has 4"),
        ({"scale": 0.0}, "scale must not be 0"),
    ],
)
def test_tile_attention_refuses(change, message):
    given = {name: torch.zeros(1, 2, 12, 4) for name in ("query", "key", "value")} | {"grid": (3, 4)} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        F.tile_attention(**given)


def test_options():
    method = TileAttention(density=0.25, head_gains=(0.5, 0.1))
    assert method_from_dict(method.to_dict()) == method
    assert method_from_dict({**method.to_dict(), "head_gains": [0.5, 0.1]}) == method and hash(method)
    assert method.label == "tiles 8/4 0.25"
    for bad in ({"density": 1.5}, {"head_gains": (-1.0,)}, {"tile": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            dataclasses.replace(method, **bad)


@pytest.mark.parametrize(
    ("method", "grid", "message"),
    [
        (TileAttention(density=1.0), (32, 32), "a density of 1 keeps all 64 tiles"),
        (TileAttention(tile=8, key_tile=1), (8, 8), "8 tiles and means of 56 are no fewer keys than 64 tokens"),
        (TileAttention(), (32, 32), None),
        (TileAttention(), (4, 16, 16), None),
    ],
)
def test_why_exact(method, grid, message):
    assert method.why_exact(grid) == message
