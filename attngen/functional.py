"""The formulas as pure functions, for layers of your own. Tensors are (batch, heads, tokens, head size), as in
`torch.nn.functional.scaled_dot_product_attention`, where the docstring has no other shape."""

from attngen.methods.agent import agent_attention
from attngen.methods.focal import focal_attention
from attngen.methods.linear import focused_feature_map, linear_attention
from attngen.methods.matching import TokenMatching, match_tokens
from attngen.methods.tiles import tile_attention
from attngen.tokens import agent_grid, downsample_tokens, pool_tokens

__all__ = [
    "TokenMatching",
    "agent_attention",
    "agent_grid",
    "downsample_tokens",
    "focal_attention",
    "focused_feature_map",
    "linear_attention",
    "match_tokens",
    "pool_tokens",
    "tile_attention",
]
