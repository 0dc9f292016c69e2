"""Which code computes a layer: whether absorbing its projections pays."""

import pytest

from attngen.kernels.crossovers import AbsorbedCost
from attngen.layers.route import AbsorbedSize


@pytest.mark.parametrize(("channels", "heads", "head_dim"), [(384, 6, 64), (1152, 16, 72), (320, 8, 40)])
def test_pays_for_few_agents(channels, heads, head_dim):
    def absorbs(agents, tokens, kept_projections=0):
        size = AbsorbedSize(agents, head_dim, heads, channels, tokens, kept_projections)
        return size.gain(AbsorbedCost()) > 1

    for tokens in (256, 1024, 4096):
        assert absorbs(4, tokens=tokens)
        assert absorbs(4, tokens=tokens, kept_projections=2)
        assert not absorbs(head_dim, tokens=tokens)
    assert absorbs(16, tokens=256)
    assert not absorbs(64, tokens=64)
    assert not absorbs(16, tokens=64, kept_projections=2)
