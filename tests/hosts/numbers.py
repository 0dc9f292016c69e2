"""What a patched layer must compute, by the definitions in `tests/oracles.py`, from the layer's weights and input."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from attngen import AgentAttention, DownsampledKV, FocalAttention, LinearAttention, TokenMerging
from tests import oracles

POOLED = {
    ((8, 8), 4): (2, 2),
    ((4, 12), 4): (1, 4),
    ((4, 12), 12): (2, 6),
    ((12, 4), 12): (6, 2),
    ((5, 7), 6): (2, 3),
    ((8, 8), 9): (3, 3),
}
"""(grid, number of agents) -> rows and columns of the agents."""


@contextlib.contextmanager
def recorded(model, layers):
    """Input, output and keyword arguments of layers, and the input of the block around each, in the last call."""
    calls: dict[str, dict[str, Any]] = {name: {} for name in layers}
    hooks = []
    for name in layers:
        block, _, _ = name.rpartition(".")

        def before(module, args, kwargs, name=name):
            calls[name]["metric"] = args[0] if args else kwargs["hidden_states"]

        def after(module, args, kwargs, out, name=name):
            calls[name].update(x=args[0] if args else kwargs["hidden_states"], kwargs=kwargs, out=out)

        hooks.append(model.get_submodule(block).register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(model.get_submodule(name).register_forward_hook(after, with_kwargs=True))
    yield calls
    for hook in hooks:
        hook.remove()


def project(layer, x: Tensor) -> Tensor:
    out = x.double() @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


def normed(norm, x: Tensor) -> Tensor:
    """(B, H, N, D) over the root of its mean square, as SD3.5 and FLUX have it; unchanged without a norm."""
    if norm is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def heads(attn, layer, norm, x: Tensor) -> Tensor:
    return normed(norm, oracles.split_heads(project(layer, x), attn.heads))


def rotate(x: Tensor, tables, positions) -> Tensor:
    """Channel pairs (0, 1), (2, 3), … of (B, H, N, D) by the angle of each token's position."""
    if tables is None:
        return x
    cos, sin = (table.double()[positions] for table in tables)
    out = torch.zeros_like(x)
    out[..., 0::2] = x[..., 0::2] * cos[..., 0::2] - x[..., 1::2] * sin[..., 0::2]
    out[..., 1::2] = x[..., 1::2] * cos[..., 1::2] + x[..., 0::2] * sin[..., 1::2]
    return out


def centres(grid, size) -> list[int]:
    """The token in which the centre of each cell lies."""
    number = torch.arange(grid[0] * grid[1])[None, :, None]
    return oracles.nearest_exact(number, grid, size).flatten().tolist()


def wanted(attn, method, x, grid, text=None, tables=None, text_length=0) -> Tensor:
    """Mixed values in front of the output projection, (B, N, C) of the image.

    `text` are queries, keys and values of the text (B, H, T, D), or None; `tables` rotary cosines and sines, those of
    the text first.
    """
    norm_q, norm_k = getattr(attn, "norm_q", None), getattr(attn, "norm_k", None)
    query, key = heads(attn, attn.to_q, norm_q, x), heads(attn, attn.to_k, norm_k, x)
    value = heads(attn, attn.to_v, None, x)
    everywhere = torch.arange(text_length, text_length + x.shape[1])
    exponent = getattr(method, "broadcast_exponent", 0.0)
    sharp = (query.shape[-1] ** -0.5) ** exponent

    def attend(query, key, value, agents=None):
        joint_key = key if text is None else torch.cat([key, text[1]], 2)
        joint_value = value if text is None else torch.cat([value, text[2]], 2)
        if agents is None:
            return oracles.softmax_attention(query, joint_key, joint_value)
        options = {"gain": method.gain, "correction": method.correction}
        mixed = oracles.agent_attention(query, joint_key, joint_value, agents, broadcast_scale=sharp, **options)
        return mixed + method.shortcut * value

    if isinstance(method, AgentAttention):
        agents, positions = _agents(attn, norm_q, method, x, query, grid)
        agents = rotate(agents, tables, text_length + torch.tensor(positions))
        mixed = attend(rotate(query, tables, everywhere), rotate(key, tables, everywhere), value, agents)
    elif isinstance(method, DownsampledKV):
        kept = torch.tensor(centres(grid, tuple(max(1, side // method.factor) for side in grid)))
        key = rotate(key[:, :, kept], tables, text_length + kept)
        mixed = attend(rotate(query, tables, everywhere), key, value[:, :, kept])
    elif isinstance(method, FocalAttention):
        cells, read = POOLED[grid, method.num_cells], None if text is None else (text[1], text[2])
        mixed = oracles.focal_attention(query, key, value, grid, method.window, method.margin, cells, read)
    elif isinstance(method, LinearAttention):
        mixed = oracles.linear_attention(query, key, value, method.feature_map)
        if text is not None:
            share = x.shape[1] / (x.shape[1] + text[1].shape[2])
            mixed = share * mixed + (1 - share) * oracles.softmax_attention(query, text[1], text[2])
    else:
        raise NotImplementedError(method)
    return oracles.join_heads(mixed)


def _agents(attn, norm, method: AgentAttention, x, query, grid) -> tuple[Tensor, list[int]]:
    """(B, H, M, D), without positions, and the token whose position each agent has."""
    rows, columns = size = POOLED[grid, method.num_agents]
    if method.agents == "merged":
        cell = (-(-grid[0] // rows), -(-grid[1] // columns))
        matching = oracles.Matching(x, grid, cell, 1.0)
        return heads(attn, attn.to_q, norm, matching.merge(x)), matching.targets
    pooled = [oracles.pool_tokens(query[:, h], grid, size) for h in range(attn.heads)]
    return torch.stack(pooled, 1), centres(grid, size)


def wanted_merging(attn, method: TokenMerging, x, metric, grid) -> Tensor:
    """The output (B, N, C) of a layer with token merging, without text."""
    cell = (method.stride, method.stride)
    matching = oracles.Matching(metric, grid, cell, method.ratio)
    merged = matching.merge(x)
    query, key, value = (heads(attn, layer, None, merged) for layer in (attn.to_q, attn.to_k, attn.to_v))
    counts = None
    if method.agent_ratio is not None:
        counts = oracles.match_counts(grid, cell, method.ratio, method.agent_ratio)[1]
    if counts is None:
        mixed = oracles.softmax_attention(query, key, value)
    else:
        tokens = oracles.Matching(metric, grid, cell, method.agent_ratio).merge(x)
        assert tokens.shape[1] == counts
        agents = heads(attn, attn.to_q, None, tokens)
        sharp = (query.shape[-1] ** -0.5) ** method.broadcast_exponent
        mixed = oracles.agent_attention(query, key, value, agents, broadcast_scale=sharp, shortcut=method.shortcut)
    return matching.unmerge(project(attn.to_out[0], oracles.join_heads(mixed)))


def assert_close(got, want, tolerance=2e-5):
    assert got.shape == want.shape, (tuple(got.shape), tuple(want.shape))
    error = (got.double() - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= tolerance, f"{error:.1e} > {tolerance:.0e}"
