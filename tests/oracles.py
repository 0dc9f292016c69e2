"""Every definition of the methods written out in float64, in the plainest words.

Nothing here is fast and nothing is shared with `attngen`: the loops say what is computed for one batch entry, one head
and one query at a time. Tensors are (B, H, N, D) for the functions that attend, (B, N, C) for tokens; every result is
float64. The layers at the end are those of the reference implementations, so that the definitions can be checked
against `tests/golden`.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Attention with a softmax


def softmax(row: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) of one vector, shifted by its maximum."""
    powers = torch.exp(row - row.max())
    return powers / powers.sum()


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, bias=None) -> Tensor:
    """O_i = sum_j softmax_j(q_i . k_j * scale + bias_ij) v_j. `scale` defaults to D**-0.5."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, num_queries, dim = query.shape
    num_keys = key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    bias = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    bias = bias.broadcast_to(batch, heads, num_queries, num_keys)
    out = torch.zeros(batch, heads, num_queries, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(num_queries):
                logits = (key[b, h] @ query[b, h, i]) * scale + bias[b, h, i]
                out[b, h, i] = softmax(logits) @ value[b, h]
    return out


def agent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    aggregation_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    shortcut: float = 0.0,
    gain: float = 1.0,
    correction: str | None = None,
) -> Tensor:
    """Agents read the values, queries read the agents, and each query keeps a share of its own value.

    w_m = sum_l softmax_l(a_m . k_l * scale + aggregation_bias_ml) v_l
    O_i = gain * sum_m softmax_m(q_i . a_m * broadcast_scale + broadcast_bias_im) w_m + shortcut * v_i

    With a correction the u_m with sum_n softmax_n(a_m . a_n * broadcast_scale) u_n + 0.03 u_m = 1.03 w_m are broadcast.
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    broadcast_scale = scale if broadcast_scale is None else broadcast_scale
    gathered = softmax_attention(agents, key, value, scale, aggregation_bias)
    if correction == "nystrom":
        identity = torch.eye(agents.shape[2], dtype=torch.float64).expand(*agents.shape[:2], -1, -1)
        mixing = softmax_attention(agents, agents, identity, broadcast_scale)
        gathered = 1.03 * torch.linalg.inv(mixing + 0.03 * identity) @ gathered
    out = gain * softmax_attention(query, agents, gathered, broadcast_scale, broadcast_bias)
    return out + shortcut * value.double() if shortcut else out


def places(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All coordinates of a grid, in row-major order."""
    return list(itertools.product(*map(range, sizes)))


def token(place: Sequence[int], grid: Sequence[int]) -> int:
    """The number of the token at a place."""
    number = 0
    for at, length in zip(place, grid, strict=True):
        number = number * length + at
    return number


def nearest_exact(x: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Each of the p x q kept tokens is the one whose cell its centre falls into: row floor((i + 1/2) h / p).

    Args:
        x: tokens (B, N, C) of the grid, row by row.
        grid: (h, w) or (f, h, w), N in all.
        size: (p, q), or as many as the grid has sides.
    """
    kept = []
    for place in places(size):
        centre = [math.floor((i + 0.5) * length / n) for i, length, n in zip(place, grid, size, strict=True)]
        kept.append(x[:, token(centre, grid)])
    return torch.stack(kept, 1)


def downsampled_attention(
    query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, ...], factor: int, scale: float | None = None
) -> Tensor:
    """All queries attend to the keys and values of a grid `factor` times smaller in each direction (ToDo)."""
    size = (*grid[:-2], grid[-2] // factor, grid[-1] // factor)
    heads = range(query.shape[1])
    key = torch.stack([nearest_exact(key[:, h], grid, size) for h in heads], 1)
    value = torch.stack([nearest_exact(value[:, h], grid, size) for h in heads], 1)
    return softmax_attention(query, key, value, scale)


def focal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, ...],
    window: int = 8,
    margin: int = 4,
    cells: tuple[int, ...] = (8, 8),
    context: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    frames: int = 1,
    margin_frames: int = 1,
) -> Tensor:
    """Each query weighs the tokens around its window by exp(q . k), each cell by how many of its tokens are not there.

    The cell with the set of tokens C weighs |C without the region| exp(q . mean of k over C) and gives the mean of v.
    Tokens of `context` are weighed like those of the region. `cells` has a number for each side of the grid.
    """
    query, key, value = query.double(), key.double(), value.double()
    windows, margins = (frames, window, window)[-len(grid) :], (margin_frames, margin, margin)[-len(grid) :]
    scale = query.shape[3] ** -0.5 if scale is None else scale

    def near(axis: int, at: int) -> range:
        length, side = grid[axis], min(windows[axis], grid[axis])
        reach = min(side + 2 * margins[axis], length)
        first = max(0, min(at // side * side - margins[axis], length - reach))
        return range(first, first + reach)

    members: dict[tuple[int, ...], list[int]] = {}
    for place in places(grid):
        cell = tuple(at * n // length for at, n, length in zip(place, cells, grid, strict=True))
        members.setdefault(cell, []).append(token(place, grid))
    assert len(members) == math.prod(cells)
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i, place in enumerate(places(grid)):
                around = itertools.product(*(near(axis, at) for axis, at in enumerate(place)))
                region = [token(each, grid) for each in around]
                logits = [query[b, h, i] @ key[b, h, j] * scale for j in region]
                values = [value[b, h, j] for j in region]
                for cell in members.values():
                    outside = len(set(cell) - set(region))
                    if outside:
                        logits.append(query[b, h, i] @ key[b, h, cell].mean(0) * scale + math.log(outside))
                        values.append(value[b, h, cell].mean(0))
                if context is not None:
                    logits += list(context[0][b, h].double() @ query[b, h, i] * scale)
                    values += list(context[1][b, h].double())
                out[b, h, i] = softmax(torch.stack(logits)) @ torch.stack(values)
    return out


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, ...],
    tile: int = 8,
    key_tile: int = 4,
    density: float = 0.125,
    gain: float | Tensor = 0.0,
    context: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    frames: int = 1,
) -> Tensor:
    """Each tile of queries picks tiles of keys by mass and spread; what it does not pick counts as one mean each.

    A query weighs a token of a picked tile, or of `context`, by exp(s q . k), and a tile of n tokens that is not picked
    by n exp(s q . mean k), with the value mean v. Then gain s / N q . H is added times the share r of all means in the
    weight, H = sum_t (k_t - mean of its tile) v_t^T. A tile scores

        s mean q . mean k + log n + 3 s sqrt(sum_d mean(q_d^2) var(k_d)).
    """
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[3] ** -0.5 if scale is None else scale
    gains = [float(g) for g in torch.as_tensor(gain).expand(query.shape[1])]

    def members(side: int) -> list[list[int]]:
        sides = [min(each, length) for each, length in zip((frames, side, side)[-len(grid) :], grid, strict=True)]
        parts = [math.ceil(length / each) for length, each in zip(grid, sides, strict=True)]
        tiles: list[list[int]] = [[] for _ in range(math.prod(parts))]
        for place in places(grid):
            part = [at * n // length for at, n, length in zip(place, parts, grid, strict=True)]
            tiles[token(part, parts)].append(token(place, grid))
        return tiles

    own, others = members(tile), members(key_tile)
    picked = min(len(others), max(1, round(density * len(others))))
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    for b, h in places(query.shape[:2]):
        q, k, v = query[b, h], key[b, h], value[b, h]
        slope = sum(torch.outer(k[t] - k[each].mean(0), v[t]) for each in others for t in each)
        for tokens in own:
            scores = []
            for each in others:
                spread = (q[tokens].square().mean(0) @ k[each].var(0, correction=0)).sqrt()
                mass = q[tokens].mean(0) @ k[each].mean(0) * scale + math.log(len(each))
                scores.append(float(mass + 3 * scale * spread))
            near = sorted(range(len(others)), key=lambda j: -scores[j])[:picked]
            for i in tokens:
                logits = [q[i] @ k[t] * scale for j in near for t in others[j]]
                values = [v[t] for j in near for t in others[j]]
                if context is not None:
                    logits += list(context[0][b, h].double() @ q[i] * scale)
                    values += list(context[1][b, h].double())
                exact = len(logits)
                for j in range(len(others)):
                    if j not in near:
                        logits.append(q[i] @ k[others[j]].mean(0) * scale + math.log(len(others[j])))
                        values.append(v[others[j]].mean(0))
                weights = softmax(torch.stack(logits))
                out[b, h, i] = weights @ torch.stack(values)
                out[b, h, i] += gains[h] * scale / len(q) * weights[exact:].sum() * (q[i] @ slope)
    return out


def focused_feature_map(x: Tensor, factor: float = 3) -> Tensor:
    """f(x) = |x| x^p / |x^p| of each vector along the last axis: the direction is sharpened, the length stays."""
    x = x.double()
    out = torch.zeros_like(x).reshape(-1, x.shape[-1])
    for i, row in enumerate(x.reshape(-1, x.shape[-1])):
        if row.abs().max() == 0:
            continue  # a zero vector has no direction; its length is 0
        powers = row**factor
        out[i] = row.square().sum().sqrt() * powers / powers.square().sum().sqrt()
    return out.reshape(x.shape)


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 for positive x, exp(x) otherwise."""
    return torch.where(x > 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))


def relu(x: Tensor) -> Tensor:
    """x for positive x, 0 otherwise."""
    return torch.where(x > 0, x, torch.zeros_like(x))


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": relu,
    "focused": lambda x: focused_feature_map(relu(x) + 1e-6),
    "identity": lambda x: x,
}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: str | Callable[[Tensor], Tensor] = "elu",
    eps: float = 1e-6,
    weight_query: Tensor | None = None,
    weight_key: Tensor | None = None,
) -> Tensor:
    """O_i = mean_j(phi(q_i) . phi(k_j) v_j) / (mean_j(phi(q_i) . phi(k_j)) + eps).

    `weight_query` and `weight_key`, where given, replace phi(q) and phi(k) in the numerator only (rotary embeddings).
    """
    phi = FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    query, key, value = phi(query.double()), phi(key.double()), value.double()
    weight_query = query if weight_query is None else weight_query.double()
    weight_key = key if weight_key is None else weight_key.double()
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    out = torch.zeros(batch, heads, num_queries, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(num_queries):
                numerator = (weight_key[b, h] @ weight_query[b, h, i]) @ value[b, h] / num_keys
                denominator = (key[b, h] @ query[b, h, i]).sum() / num_keys
                out[b, h, i] = numerator / (denominator + eps)
    return out


def rotate(x: Tensor, grid: tuple[int, int], base: float = 10000.0) -> Tensor:
    """Rotary embedding over a grid: channel pairs (0, 1), (2, 3), ... turn by position times frequency.

    Of the C/2 pairs the first C/4 turn with the row, the others with the column; the f-th of each by base^(-f / (C/4))
    a step. `x` are tokens (B, N, C) of an h x w `grid`.
    """
    x = x.double()
    height, width = grid
    quarter = x.shape[2] // 4
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            for pair in range(2 * quarter):
                position, f = (i, pair) if pair < quarter else (j, pair - quarter)
                angle = position * base ** (-f / quarter)
                real, imaginary = x[:, i * width + j, 2 * pair], x[:, i * width + j, 2 * pair + 1]
                out[:, i * width + j, 2 * pair] = real * math.cos(angle) - imaginary * math.sin(angle)
                out[:, i * width + j, 2 * pair + 1] = real * math.sin(angle) + imaginary * math.cos(angle)
    return out


# Tokens on a grid


def pool_tokens(x: Tensor, grid: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Mean over p x q windows; window i covers rows floor(i h / p) up to, not including, ceil((i + 1) h / p).

    Args:
        x: tokens (B, N, C), row by row.
        grid: (h, w) or (f, h, w), N in all.
        size: (p, q), or as many as the grid has sides.
    """
    x = x.double()
    pooled = []
    for place in places(size):
        covered = [
            range(i * length // n, -(-(i + 1) * length // n)) for i, length, n in zip(place, grid, size, strict=True)
        ]
        window = [x[:, token(each, grid)] for each in itertools.product(*covered)]
        pooled.append(sum(window) / len(window))
    return torch.stack(pooled, 1)


class Matching:
    """Bipartite matching of tokens on a grid (ToMe), decided on `metric` and applicable to any (B, N, C).

    One token of each stride cell is a target, all others are sources; what does not fill a cell at the bottom and right
    is source too. Each source picks the target with the greatest cosine, and the r best pairs are merged.

    Args:
        metric: (B, N, C), what decides who is alike.
        grid: (h, w), with N = h w.
        stride: (sy, sx), the size of a cell.
        ratio: the share of all tokens to merge away; r = min(sources, int(N ratio)).
        choice: for each cell the place of its target, dy sx + dx, (h // sy, w // sx); top left if not given.
    """

    def __init__(self, metric: Tensor, grid, stride, ratio: float, choice: Tensor | None = None):
        (height, width), (sy, sx) = grid, stride
        metric = metric.double()
        self.num_tokens = height * width
        self.targets = []
        for i in range(height // sy):
            for j in range(width // sx):
                place = 0 if choice is None else int(choice[i, j])
                self.targets.append((i * sy + place // sx) * width + j * sx + place % sx)
        self.targets.sort()  # in the order of the grid, whatever the cell
        self.sources = [token for token in range(self.num_tokens) if token not in set(self.targets)]
        self.num_merged = min(len(self.sources), int(self.num_tokens * ratio))
        self.merged, self.kept = [], []  # for each batch entry: [(source, target)], [source]
        for tokens in metric:
            pairs = []
            for source in self.sources:
                cosines = [self.cosine(tokens[source], tokens[target]) for target in self.targets]
                best = max(range(len(cosines)), key=cosines.__getitem__)
                pairs.append((cosines[best], source, self.targets[best]))
            pairs.sort(key=lambda pair: -pair[0])
            self.merged.append([(source, target) for _, source, target in pairs[: self.num_merged]])
            self.kept.append([source for _, source, _ in pairs[self.num_merged :]])

    @staticmethod
    def cosine(x: Tensor, y: Tensor) -> float:
        """The cosine of the angle between two vectors; 0 if one of them is zero."""
        lengths = float(x.square().sum().sqrt() * y.square().sum().sqrt())
        return float(x @ y) / lengths if lengths > 0 else 0.0

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N - r, C): the sources left over, most alike first, then each target's mean."""
        x = x.double()
        out = []
        for b in range(x.shape[0]):
            if self.num_merged == 0:
                out.append(x[b])
                continue
            tokens = [x[b, source] for source in self.kept[b]]
            for target in self.targets:
                group = [x[b, target]] + [x[b, source] for source, its_target in self.merged[b] if its_target == target]
                tokens.append(sum(group) / len(group))
            out.append(torch.stack(tokens))
        return torch.stack(out)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, N - r, C) -> (B, N, C): every token back to its place, a merged one as a copy of its target."""
        x = x.double()
        if self.num_merged == 0:
            return x
        out = torch.zeros(x.shape[0], self.num_tokens, x.shape[2], dtype=torch.float64)
        for b in range(x.shape[0]):
            row = {token: i for i, token in enumerate([*self.kept[b], *self.targets])}
            row.update({source: row[target] for source, target in self.merged[b]})
            for token in range(self.num_tokens):
                out[b, token] = x[b, row[token]]
        return out


def match_counts(grid, stride, ratio: float, agent_ratio: float) -> tuple[int, int | None]:
    """How many tokens are left after merging, and how many agents; None unless agents are fewer than half of them."""
    (height, width), (sy, sx) = grid, stride
    num_tokens = height * width
    num_sources = num_tokens - (height // sy) * (width // sx)
    num_merged = num_tokens - min(num_sources, int(num_tokens * ratio))
    num_agents = num_tokens - min(num_sources, int(num_tokens * agent_ratio))
    return num_merged, num_agents if 2 * num_agents < num_merged else None


# Schedules


def change_switch(latents: Tensor, warmup: int, ratios: tuple[float, float], distance: str) -> list[int]:
    """The level in force during each step, given the latents after each: 0 at first, then 1, then 2, never back.

    The mean change of the steps 1 ... warmup is the base; after them, a change below ratios[level] times the base
    raises the level from the next step on. Both levels may be reached in one step. Change is mean absolute ("mae") or
    mean squared ("mse") over the whole of a latent; `latents` are (steps, ...).
    """
    level, base, levels = 0, 0.0, []
    for step, latent in enumerate(latents.double()):
        levels.append(level)
        if step == 0:
            continue
        difference = latent - latents[step - 1].double()
        change = float(difference.abs().mean() if distance == "mae" else difference.square().mean())
        if step <= warmup:
            base += change / warmup
            continue
        if level == 0 and change < ratios[0] * base:
            level = 1
        if level == 1 and change < ratios[1] * base:
            level = 2
    return levels


# The layers of the reference implementations, for the golden vectors


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """W x + b with the weights `name.weight` and, where there is one, `name.bias`."""
    out = x.double() @ state[f"{name}.weight"].double().T
    return out + state[f"{name}.bias"].double() if f"{name}.bias" in state else out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, H, N, D): head h has the channels h D ... (h + 1) D - 1."""
    dim = x.shape[2] // heads
    return torch.stack([x[:, :, h * dim : (h + 1) * dim] for h in range(heads)], 1)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, C)."""
    return torch.cat([x[:, h] for h in range(x.shape[1])], -1)


def depthwise_conv(x: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    """Each channel of each token gets its neighbours' values of that channel, weighed; outside of the grid is 0.

    Args:
        x: tokens (B, N, C).
        grid: (h, w), with N = h w.
        weight: (C, 1, K, K), K odd.
        bias: (C,).
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    height, width = grid
    kernel = weight.shape[2]
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            out[:, i * width + j] = bias
            for u in range(kernel):
                for v in range(kernel):
                    y, z = i + u - kernel // 2, j + v - kernel // 2
                    if 0 <= y < height and 0 <= z < width:
                        out[:, i * width + j] += weight[:, 0, u, v] * x[:, y * width + z]
    return out


def bilinear(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table (..., P, Q) read at the centres of an h x w grid: linear between its own centres, flat beyond them."""
    table = table.double()
    rows, columns = table.shape[-2:]
    height, width = grid
    out = torch.zeros(*table.shape[:-2], height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * rows / height - 0.5, 0.0)
            z = max((j + 0.5) * columns / width - 0.5, 0.0)
            top, left = math.floor(y), math.floor(z)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = table[..., top, left] * (left + 1 - z) + table[..., top, right] * (z - left)
            lower = table[..., bottom, left] * (left + 1 - z) + table[..., bottom, right] * (z - left)
            out[..., i, j] = upper * (top + 1 - y) + lower * (y - top)
    return out


def mediator_biases(state: dict[str, Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The biases of the mediator layer: for mediators reading tokens (H, M, N), for tokens reading mediators (H, N, M).

    Each is a 7 x 7 map stretched over the grid, plus a term for the token's row, plus one for its column.
    """
    reading, writing = bilinear(state["an_bias"], grid), bilinear(state["na_bias"], grid)
    heads, mediators, height, width = reading.shape
    aggregation = torch.zeros(heads, mediators, height * width, dtype=torch.float64)
    broadcast = torch.zeros(heads, height * width, mediators, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            token = i * width + j
            row, column = state["ah_bias"][0, :, :, i, 0].double(), state["aw_bias"][0, :, :, 0, j].double()
            aggregation[:, :, token] = reading[:, :, i, j] + row + column
            row, column = state["ha_bias"][0, :, i, 0, :].double(), state["wa_bias"][0, :, 0, j, :].double()
            broadcast[:, token, :] = writing[:, :, i, j] + row + column
    return aggregation, broadcast


def mediator_layer(x: Tensor, state: dict[str, Tensor], heads: int, grid: tuple[int, int], mediators: int) -> Tensor:
    """Attention with mediators: pooled queries as agents, learned biases, and a 3 x 3 convolution of the values."""
    query, key, value = linear(x, state, "qkv").chunk(3, -1)
    side = math.isqrt(mediators)
    agents = pool_tokens(query, grid, (side, side))
    aggregation_bias, broadcast_bias = mediator_biases(state, grid)
    out = agent_attention(
        *(split_heads(tokens, heads) for tokens in (query, key, value, agents)),
        aggregation_bias=aggregation_bias,
        broadcast_bias=broadcast_bias,
    )
    out = join_heads(out) + depthwise_conv(value, grid, state["dwc.weight"], state["dwc.bias"])
    return linear(out, state, "proj")


def agentsd_layer(x: Tensor, agents: Tensor, state: dict[str, Tensor], heads: int, k_scale2: float, k_shortcut: float):
    """Training-free agent attention: agents are projected as queries, the second softmax is sharper than the first."""
    query, key, value = (split_heads(linear(x, state, f"to_{name}"), heads) for name in "qkv")
    scale = query.shape[3] ** -0.5
    agents = split_heads(linear(agents, state, "to_q"), heads)
    out = agent_attention(query, key, value, agents, scale, broadcast_scale=scale**k_scale2, shortcut=k_shortcut)
    return linear(join_heads(out), state, "to_out.0")


def focused_linear_layer(
    x: Tensor, state: dict[str, Tensor], heads: int, grid: tuple[int, int], factor: float
) -> Tensor:
    """Focused linear attention: sharpened over all channels at once, one 5 x 5 convolution shared by the heads."""
    query, key, value = linear(x, state, "qkv").chunk(3, -1)
    key = key + state["positional_encoding"].double()
    scale = torch.log1p(torch.exp(state["scale"].double()))
    query = focused_feature_map((relu(query) + 1e-6) / scale, factor)
    key = focused_feature_map((relu(key) + 1e-6) / scale, factor)
    query, key, value = (split_heads(tokens, heads) for tokens in (query, key, value))
    out = linear_attention(query, key, value, "identity")
    for h in range(heads):
        out[:, h] += depthwise_conv(value[:, h], grid, state["dwc.weight"], state["dwc.bias"])
    return linear(join_heads(out), state, "proj")


def mlla_linear_layer(x: Tensor, state: dict[str, Tensor], heads: int, grid: tuple[int, int]) -> Tensor:
    """MLLA's linear attention: the input is the value; rotations over all channels, and in the numerator only."""
    query, key = linear(x, state, "qk").chunk(2, -1)
    query, key = elu_plus_one(query), elu_plus_one(key)
    rotated_query, rotated_key = rotate(query, grid), rotate(key, grid)
    out = linear_attention(
        *(split_heads(tokens, heads) for tokens in (query, key, x.double())),
        feature_map="identity",
        weight_query=split_heads(rotated_query, heads),
        weight_key=split_heads(rotated_key, heads),
    )
    return join_heads(out) + depthwise_conv(x, grid, state["lepe.weight"], state["lepe.bias"])
