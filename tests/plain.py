"""The formulas as plain PyTorch expressions in the dtype of their inputs, which bound the error, and such inputs."""

import torch
import torch.nn.functional as tf

from tests.compare import normal

FEATURE_MAPS = ["elu", "relu", "focused", "identity"]


def heads_of(tokens, heads):
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def tokens_of(x):
    return x.transpose(1, 2).flatten(2)


def agent_inputs(dtype, biases=True, **shape):
    """query, key, value, agents and two biases that are exact in `dtype`."""
    sizes = {"b": 2, "h": 3, "n": 70, "l": 70, "m": 6, "d": 16} | shape
    b, h, n, l, m, d = (sizes[name] for name in "bhnlmd")  # noqa: E741
    shapes = [(b, h, n, d), (b, h, l, d), (b, h, l, d), (b, h, m, d)] + [(b, h, m, l), (b, h, n, m)] * biases
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def plain_agent_attention(
    query, key, value, agents, aggregation_bias=0, broadcast_bias=0, scale=None, broadcast_scale=None, shortcut=0.0
):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    broadcast_scale = scale if broadcast_scale is None else broadcast_scale
    gathered = (agents @ key.mT * scale + aggregation_bias).softmax(-1) @ value
    return (query @ agents.mT * broadcast_scale + broadcast_bias).softmax(-1) @ gathered + shortcut * value


def plain_focused(x, factor=3):
    powers = x**factor
    return x.norm(dim=-1, keepdim=True) * powers / powers.norm(dim=-1, keepdim=True)


PLAIN_MAPS = {
    "elu": lambda x: tf.elu(x) + 1,
    "relu": torch.relu,
    "focused": lambda x: plain_focused(torch.relu(x) + 1e-6),
    "identity": lambda x: x,
}


def plain_linear_attention(query, key, value, feature_map="elu", eps=1e-6):
    phi = PLAIN_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    query, key = phi(query), phi(key)
    normaliser = query @ key.mean(-2, keepdim=True).mT + eps
    return query @ (key.mT @ value / key.shape[-2]) / normaliser


def linear_inputs(dtype, feature_map, b=2, h=3, n=50, l=70, d=16, e=16):  # noqa: E741
    shapes = [(b, h, n, d), (b, h, l, d), (b, h, l, e)]
    query, key, value = (normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    if feature_map == "identity":  # whoever passes features of their own has made them positive
        query, key = query.abs(), key.abs()
    return query, key, value


def whole_numbers(*shape, bound, seed):
    """Whole numbers in [-bound, bound]: exact in every dtype, and so are sums of their products in float32."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def zero_inputs(**shapes):
    """query, key, value and agents of matching shapes, but for those given."""
    sizes = {"query": (2, 3, 10, 8), "key": (2, 3, 12, 8), "value": (2, 3, 12, 8), "agents": (2, 3, 4, 8)} | shapes
    return {name: torch.zeros(size) for name, size in sizes.items()}
