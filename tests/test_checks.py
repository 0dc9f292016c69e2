"""Every size that does not fit is named."""

import pytest
import torch

from attngen import functional as F
from tests.compare import names
from tests.plain import zero_inputs

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ({"key": (2, 3, 12, 6)}, (6, 8)),
        ({"query": (2, 3, 10, 6), "agents": (2, 3, 4, 6)}, (6, 8)),
        ({"key": (5, 3, 12, 8), "value": (5, 3, 12, 8)}, (5, 2)),
        ({"value": (5, 3, 12, 8)}, (5, 2)),
        ({"key": (2, 7, 12, 8), "value": (2, 7, 12, 8)}, (7, 3)),
        ({"value": (2, 3, 11, 8)}, (11, 12)),
        ({"query": (3, 10, 8)}, (3, 10, 8)),
        ({"key": (3, 12, 8)}, (3, 12, 8)),
        ({"value": (1, 2, 3, 12, 8)}, (1, 2, 3, 12, 8)),
    ],
    ids=str,
)
def test_attention_names_sizes_that_do_not_fit(shapes, sizes):
    arguments = zero_inputs(**shapes)
    with pytest.raises(ValueError, match=names(*sizes)):
        F.agent_attention(**arguments)
    del arguments["agents"]
    with pytest.raises(ValueError, match=names(*sizes)):
        F.linear_attention(**arguments)


@pytest.mark.parametrize(
    ("shape", "grid", "sizes"),
    [((2, 16, 4), (3, 5), (16, 15)), ((2, 4, 4, 8), (4, 4), (2, 4, 4, 8)), ((16, 4), (4, 4), (16, 4))],
    ids=str,
)
def test_token_functions_name_sizes_that_do_not_fit(shape, grid, sizes):
    with pytest.raises(ValueError, match=names(*sizes)):
        F.pool_tokens(torch.zeros(shape), grid, (2, 2))
    with pytest.raises(ValueError, match=names(*sizes)):
        F.match_tokens(torch.zeros(shape), grid, (2, 2), 0.4)
