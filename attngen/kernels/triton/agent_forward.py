"""Forward kernels of agent attention: aggregation split along the keys, its combination, and the broadcast.

One program handles one tile of one head of one batch element. Strides are in units of ALIGN elements
(`common.alignment`) and scores are to base 2. The state holds A, (B, H, S, M, E), and behind it the logarithms of the
sums, (B, H, S, M), both float32, for S splits of the keys; -inf is the sum of an agent without any key.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
import triton
import triton.language as tl

from attngen.kernels.triton.tiles import kernel, load_tile, multiply, place, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_bias(bias, token, tokens, token_stride, agent, agent_stride, M: tl.constexpr):
    """The bias of a tile to base 2. `token` and `agent` are a row and a column, or a column and a row."""
    mask = (token < tokens) & (agent < M)
    place = token * token_stride + agent * agent_stride
    return tl.load(bias + place, mask=mask, other=0.0).to(tl.float32) * LOG2E


@kernel
def aggregate(
    agents, key, value, bias, state, batch, heads, tokens, splits, split_size, scale,
    agents_b, agents_h, agents_n, key_b, key_h, key_n, value_b, value_h, value_n, bias_b, bias_h, bias_m, bias_n,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(P Kᵀ) V over the keys of one split, normalised in the split, and the log of its sum."""
    b, h, split = place(batch, heads, splits, bias is not None)
    agent, token = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    key += (b * key_b + h * key_h) * ALIGN
    value += (b * value_b + h * value_h) * ALIGN
    if bias is not None:
        bias += b * bias_b + h * bias_h
    p = load_tile(agents + (b * agents_b + h * agents_h) * ALIGN, agents_n * ALIGN, M, 0, D, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, tokens), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = tokens - start
        k = load_tile(key + start64 * key_n * ALIGN, key_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D)
        scores = multiply(p, tl.trans(k), OPERAND, PRECISION) * scale
        if bias is not None:
            scores += load_bias(bias + start64 * bias_n, token[None, :], left, bias_n, agent[:, None], bias_m, M)
        scores = tl.where((token < left)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A bias of -inf may leave no key so far: any finite number in place of the maximum gives zeros.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        v = load_tile(value + start64 * value_n * ALIGN, value_n * ALIGN, left, 0, E, BLOCK_N, BLOCK_E)
        result = result * decay[:, None] + multiply(weights, v, OPERAND, PRECISION)
        top = new_top
    row = ((b * heads + h) * splits + split) * M
    sums = tl.cast(batch, tl.int64) * heads * splits * M * E
    write_split(state + row * E, state + sums + row, result, total, top, M, E, BLOCK_M, BLOCK_E)


@triton.jit
def write_split(
    place, sum_place, result, total, top, M: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Write a weighted sum, divided by the sum of its weights, and the logarithm of that; zeros where there is none."""
    agent = tl.arange(0, BLOCK_M)
    found = total > 0.0
    total = tl.where(found, total, 1.0)
    tl.store(sum_place + agent, tl.where(found, top + tl.log2(total), float("-inf")), mask=agent < M)
    store_tile(place, E, M, 0, result * (1.0 / total)[:, None], E, BLOCK_M, BLOCK_E)


@kernel
def combine(
    state, whole, heads, splits, M: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """The splits of one head's aggregation weighed by their sums, as a state of one split. `heads` are of all B."""
    head, all_heads = tl.cast(tl.program_id(0), tl.int64), tl.cast(heads, tl.int64)
    agent = tl.arange(0, BLOCK_M)
    parts = state + head * splits * M * E
    sums = state + (all_heads * splits * M * E + head * splits * M)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for split in range(0, splits):
        top = tl.maximum(top, tl.load(sums + split * M + agent, mask=agent < M, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for split in range(0, splits):
        weight = tl.exp2(tl.load(sums + split * M + agent, mask=agent < M, other=float("-inf")) - top)
        total += weight
        result += weight[:, None] * load_tile(parts + split * M * E, E, M, 0, E, BLOCK_M, BLOCK_E)
    whole_sums = whole + all_heads * M * E + head * M
    write_split(whole + head * M * E, whole_sums, result, total, top, M, E, BLOCK_M, BLOCK_E)


@triton.jit
def value_branches(
    value, stride, start, tokens, height, width, weight, weight_bias, shortcut, FLIP: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """shortcut · V + convolution(V) for one tile of tokens, (BLOCK_N, BLOCK_E).

    The convolution has 3 x 3 filters, one a column, over the grid of tokens, zero beyond its edges; FLIP is for its
    adjoint. `value` points at token `start`, the weights at the head.
    """
    result = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    if shortcut is not None:
        result += shortcut * load_tile(value, stride, tokens - start, 0, E, BLOCK_N, BLOCK_E).to(tl.float32)
    token, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    if weight is not None:
        y, x = (start + token) // width, (start + token) % width
        for dy in range(-1, 2):
            for dx in range(-1, 2):  # loads on the way at once take registers that are not there
                inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width) & (start + token < tokens)
                shifted = value + tl.cast(dy * width + dx, tl.int64) * stride
                mask = inside[:, None] & (column < E)[None, :]
                v = tl.load(shifted + token[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
                tap = 3 * dy + dx
                filters = tl.load(weight + column * 9 + (4 - tap if FLIP else 4 + tap), mask=column < E, other=0.0)
                result += v * filters.to(tl.float32)[None, :]
    if weight_bias is not None:
        result += tl.load(weight_bias + column, mask=column < E, other=0.0).to(tl.float32)[None, :]
    return result


@kernel
def broadcast(
    query, agents, state, value, bias, weight, weight_bias, output, batch, heads, tokens, height, width,
    scale, gain, shortcut, query_b, query_h, query_n, agents_b, agents_h, agents_n, value_b, value_h, value_n,
    bias_b, bias_h, bias_n, bias_m,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gain · softmax(Q Pᵀ) A and what is added of the values, for one tile of queries. The state has one split."""
    b, h, tile = place(batch, heads, tl.cdiv(tokens, BLOCK_N), bias is not None)
    start = tile * BLOCK_N
    start64 = tl.cast(start, tl.int64)
    left = tokens - start
    head = b * heads + h
    agent, token = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    query += (b * query_b + h * query_h + start64 * query_n) * ALIGN
    q = load_tile(query, query_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D)
    p = load_tile(agents + (b * agents_b + h * agents_h) * ALIGN, agents_n * ALIGN, M, 0, D, BLOCK_M, BLOCK_D)
    scores = multiply(q, tl.trans(p), OPERAND, PRECISION) * scale
    if bias is not None:
        bias += b * bias_b + h * bias_h + start64 * bias_n
        scores += load_bias(bias, token[:, None], left, bias_n, agent[None, :], bias_m, M)
    scores = tl.where((agent < M)[None, :], scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weights, 1)
    a = load_tile(state + head * M * E, E, M, 0, E, BLOCK_M, BLOCK_E)
    result = multiply(weights, a, OPERAND, PRECISION) * (gain / tl.where(total > 0.0, total, 1.0))[:, None]
    if weight is not None:
        weight += h * E * 9
    if weight_bias is not None:
        weight_bias += h * E
    value += (b * value_b + h * value_h + start64 * value_n) * ALIGN
    result += value_branches(
        value, value_n * ALIGN, start, tokens, height, width, weight, weight_bias, shortcut, False, E, BLOCK_N, BLOCK_E
    )  # fmt: skip
    output += ((b * tokens + start64) * heads + h) * E
    store_tile(output, heads * E, left, 0, result, E, BLOCK_N, BLOCK_E)
