"""Token matching against its definition, published reference outputs, tomesd, and its properties."""

import pytest
import torch

from attngen import functional as F
from tests import oracles
from tests.compare import DTYPES, assert_close, assert_matching, names, normal
from tests.golden_cases import golden_cases

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.mark.parametrize("case", golden_cases("agentsd_merge_*"), ids=lambda case: case[0])
def test_golden_agentsd_merge(case):
    _, tensors, arguments = case
    x, grid, stride = tensors["x"], (arguments["height"], arguments["width"]), (arguments["sy"], arguments["sx"])
    ratio, agent_ratio = arguments["ratio"], arguments["agent_ratio"]
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    merged, agents = matching.merge(x), matching.agents(x)
    num_targets = (grid[0] // stride[0]) * (grid[1] // stride[1])
    # The reference lists targets in the order of an unstable sort, which differs between processors.
    assert_matching(merged, tensors["merged"], num_targets)
    assert_matching(agents, tensors["agents"], num_targets)
    assert_close(matching.unmerge(merged), tensors["unmerged"])
    oracle, agent_oracle = (oracles.Matching(x, grid, stride, r) for r in (ratio, agent_ratio))
    assert_matching(oracle.merge(x), tensors["merged"], num_targets, 2e-6)
    assert_matching(agent_oracle.merge(x), tensors["agents"], num_targets, 2e-6)
    assert_close(oracle.unmerge(oracle.merge(x)), tensors["unmerged"], 2e-6)


@pytest.mark.parametrize(
    ("grid", "stride", "ratio", "agent_ratio", "num_merged", "num_agents"),
    [
        ((64, 64), (4, 4), 0.4, 0.95, 2458, 256),
        ((64, 64), (2, 2), 0.4, 0.5, 2458, None),
        ((64, 64), (2, 2), 0.5, 0.8, 2048, None),  # 2 * 1024 is not less than 2048
        ((72, 40), (4, 4), 0.4, 0.95, 1728, 180),
        ((40, 72), (4, 4), 0.4, 0.95, 1728, 180),
        ((64, 96), (4, 4), 0.4, 0.95, 3687, 384),
        ((65, 63), (4, 4), 0.4, 0.95, 2457, 240),
        ((64, 64), (2, 2), 0.9, 0.95, 1024, None),  # no more can go than there are sources
        ((16, 16), (4, 4), 0.0, 0.95, 256, 16),
        ((16, 16), (4, 4), 0.875, 0.95, 32, None),
        ((16, 16), (4, 4), 0.87, 0.95, 34, 16),
    ],
)
def test_match_counts(grid, stride, ratio, agent_ratio, num_merged, num_agents):
    assert oracles.match_counts(grid, stride, ratio, agent_ratio) == (num_merged, num_agents)
    x = normal(1, grid[0] * grid[1], 4)
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    assert matching.merge(x).shape == (1, num_merged, 4)
    if num_agents is None:
        assert matching.agents is None
    else:
        assert matching.agents(x).shape == (1, num_agents, 4)
    assert matching.unmerge(matching.merge(x)).shape == x.shape


def test_no_agents_without_an_agent_ratio():
    x = normal(1, 256, 4)
    assert F.match_tokens(x, (16, 16), (4, 4), 0.4).agents is None


MATCHINGS = [
    ((6, 8), (2, 2), 0.4, 0.7),
    ((8, 6), (2, 3), 0.3, 0.8),
    ((6, 8), (3, 2), 0.3, 0.8),
    ((5, 12), (1, 4), 0.25, 0.7),
    ((12, 5), (4, 1), 0.25, 0.7),
    ((9, 7), (2, 3), 0.5, 0.8),
    ((7, 9), (4, 4), 0.9, 0.95),
]


@pytest.mark.parametrize(("grid", "stride", "ratio", "agent_ratio"), MATCHINGS, ids=str)
def test_match_tokens_equals_oracle(grid, stride, ratio, agent_ratio):
    """On uneven grids and strides, so that a swap of the axes shows; applied also to a tensor that was not matched."""
    x, other = normal(2, grid[0] * grid[1], 6), normal(2, grid[0] * grid[1], 3, seed=1)
    matching = F.match_tokens(x, grid, stride, ratio, agent_ratio)
    oracle = oracles.Matching(x, grid, stride, ratio)
    agent_oracle = oracles.Matching(x, grid, stride, agent_ratio)
    for tokens in (x, other):
        merged = matching.merge(tokens)
        assert_matching(merged, oracle.merge(tokens), len(oracle.targets))
        assert_close(matching.unmerge(merged), oracle.unmerge(oracle.merge(tokens)))
        if oracles.match_counts(grid, stride, ratio, agent_ratio)[1] is None:
            assert matching.agents is None
        else:
            assert_matching(matching.agents(tokens), agent_oracle.merge(tokens), len(oracle.targets))


def test_top_left_tokens_are_the_targets():
    """With every source merged, what is left is one token a cell, and alike tokens return to where they came from."""
    grid, stride = (4, 6), (2, 3)
    cell = (torch.arange(4)[:, None] // 2 * 2 + torch.arange(6)[None] // 3).flatten()
    directions = torch.eye(4)[cell][None] * (1 + torch.arange(24.0))[None, :, None]  # one direction a cell, any length
    matching = F.match_tokens(directions, grid, stride, 0.99)
    position = torch.arange(24.0)[None, :, None]
    merged = matching.merge(position)
    means = torch.stack([position[0, cell == c].mean() for c in range(4)])
    assert_close(merged[0, :, 0].sort().values, means.sort().values, 1e-6)
    assert_close(matching.unmerge(merged)[0, :, 0], means[cell], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_keeps_the_dtype(dtype):
    x = normal(2, 48, 6, dtype=dtype)
    matching = F.match_tokens(x, (6, 8), (2, 2), 0.4, 0.75)
    merged = matching.merge(x)
    assert merged.dtype == matching.agents(x).dtype == matching.unmerge(merged).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thousands_of_tokens_merge_into_one(dtype):
    """The mean of equal tokens is that token: a sum in half precision would stop growing long before."""
    x = torch.full((1, 4096, 8), 3.0, dtype=dtype)
    matching = F.match_tokens(x, (64, 64), (4, 4), 0.9)
    merged = matching.merge(x)
    assert torch.equal(merged, x[:, : merged.shape[1]])
    assert torch.equal(matching.unmerge(merged), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_matching_does_not_depend_on_magnitude(dtype, magnitude):
    """One direction a row of the grid: each row merges into itself, though lengths leave the range of float16."""
    row = torch.arange(24) // 6
    x = (torch.eye(4)[row].repeat_interleave(64, 1)[None] * magnitude).to(dtype)
    matching = F.match_tokens(x, (4, 6), (1, 6), 0.99)
    merged = matching.merge(x)
    assert merged.shape == (1, 4, 256)
    assert torch.equal(matching.unmerge(merged), x)


def test_ratio_zero_is_the_identity():
    x = normal(2, 63, 6)
    for agent_ratio in (None, 0.8):
        matching = F.match_tokens(x, (9, 7), (2, 2), 0.0, agent_ratio)
        assert torch.equal(matching.merge(x), x)
        assert torch.equal(matching.unmerge(x), x)
    assert_matching(matching.agents(x), oracles.Matching(x, (9, 7), (2, 2), 0.8).merge(x), 12)


def test_merging_what_was_unmerged():
    x = normal(2, 63, 6)
    matching = F.match_tokens(x, (9, 7), (2, 2), 0.5)
    merged = normal(*matching.merge(x).shape, seed=1)
    assert_close(matching.merge(matching.unmerge(merged)), merged, 1e-6)
    constant = torch.full_like(x, 3.5)
    assert torch.equal(matching.unmerge(matching.merge(constant)), constant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [None, 0], ids=["top-left", "random"])
def test_zero_tokens_do_not_spoil_the_matching(dtype, seed):
    """A zero token has no direction: its cosine counts as 0, and it must not win the sort as NaN does."""
    x = (normal(2, 48, 4) + 1).abs().to(dtype)  # all cosines positive, so that zero sources come last
    x[0, 9] = x[0, 20] = x[1, 47] = 0
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    choice = None if seed is None else torch.randint(4, (3, 4, 1), generator=torch.Generator().manual_seed(seed))
    matching = F.match_tokens(x, (6, 8), (2, 2), 0.4, generator=generator)
    merged = matching.merge(x)
    assert merged.isfinite().all()
    assert matching.unmerge(merged).isfinite().all()
    if dtype == torch.float32:
        oracle = oracles.Matching(x, (6, 8), (2, 2), 0.4, choice)
        assert_close(matching.unmerge(merged), oracle.unmerge(oracle.merge(x)))
    zeros = torch.zeros_like(x)
    matching = F.match_tokens(zeros, (6, 8), (2, 2), 0.4, 0.75)
    assert matching.unmerge(matching.merge(x)).isfinite().all()


@pytest.mark.parametrize("grid", [(6, 8), (9, 7), (5, 13), (16, 16)], ids=str)
@pytest.mark.parametrize("stride", [(2, 2), (2, 3), (4, 2)], ids=str)
def test_random_targets_equal_tomesd(grid, stride):
    tomesd = pytest.importorskip("tomesd")
    (height, width), (sy, sx) = grid, stride
    x = normal(2, height * width, 6)
    for seed, ratio in enumerate((0.1, 0.4, 0.9)):
        generator, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        num_merged = int(height * width * ratio)
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            x, width, height, sx, sy, num_merged, generator=other
        )
        matching = F.match_tokens(x, grid, stride, ratio, generator=generator)
        merged, want = matching.merge(x), merge(x)
        assert_close(merged, want, 1e-6)
        assert_close(matching.unmerge(merged), unmerge(want), 1e-6)
        assert torch.equal(generator.get_state(), other.get_state())
        choice = torch.randint(sy * sx, (height // sy, width // sx, 1), generator=generator.manual_seed(seed))
        oracle = oracles.Matching(x, grid, stride, ratio, choice)
        assert_close(matching.unmerge(merged), oracle.unmerge(oracle.merge(x)))


def test_top_left_targets_equal_tomesd():
    tomesd = pytest.importorskip("tomesd")
    for grid, stride in (((6, 8), (2, 2)), ((9, 7), (2, 3)), ((16, 12), (4, 4))):
        (height, width), (sy, sx) = grid, stride
        x, num_merged = normal(2, height * width, 6), int(height * width * 0.4)
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
            x, width, height, sx, sy, num_merged, no_rand=True
        )
        matching = F.match_tokens(x, grid, stride, 0.4)
        assert_close(matching.merge(x), merge(x), 1e-6)
        assert_close(matching.unmerge(matching.merge(x)), unmerge(merge(x)), 1e-6)


def test_generators_decide_alone():
    x = normal(2, 256, 6)

    def merged(seed):
        generator = torch.Generator().manual_seed(seed)
        return F.match_tokens(x, (16, 16), (4, 4), 0.4, generator=generator).merge(x)

    assert torch.equal(merged(0), merged(0))
    assert not torch.equal(merged(0), merged(1))


def test_global_random_state_decides_nothing():
    """The same result from two global states. That none is changed is checked around every test."""
    x, before = normal(2, 63, 6), torch.get_rng_state()
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(7)
        results.append(F.match_tokens(x, (9, 7), (2, 2), 0.4, generator=generator).merge(x))
        results.append(F.match_tokens(x, (9, 7), (2, 2), 0.4).merge(x))
    torch.set_rng_state(before)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_matching_names_sizes_that_do_not_fit():
    x = normal(2, 48, 6)
    with pytest.raises(ValueError, match=names(9, 8)):
        F.match_tokens(x, (6, 8), (2, 9), 0.4)  # no cell fits, so there is no target
    matching = F.match_tokens(x, (6, 8), (2, 2), 0.4, 0.74)
    for function, sizes in ((matching.merge, (47, 48)), (matching.unmerge, (47, 29))):
        with pytest.raises(ValueError, match=names(*sizes)):
            function(x[:, :47])
    with pytest.raises(ValueError, match=names(1, 2)):
        matching.merge(x[:1])
