"""Forward kernels of agent attention: aggregation split along the keys, its combination, and the broadcast.

One program handles one tile of one head of one batch element. Programs that read the same bias, or the same keys,
follow each other, so that it is read from memory once and from the L2 cache by the others. Strides are in units of
ALIGN elements (`triton_common.alignment`), scores are to base 2, and offsets that grow with the batch or the tokens are
64-bit.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
import triton
import triton.language as tl

from attngen.kernels.triton.tiles import accumulate, inner, load_part, load_rows, store_rows, zeros


@triton.jit
def aggregate(
    agents,
    key,
    value,
    bias,
    partial,
    partial_lse,
    batch,
    num_agents,
    num_keys,
    splits,
    split_size,
    num_heads,
    scale,
    agents_b,
    agents_h,
    agents_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    bias_b,
    bias_h,
    bias_m,
    bias_n,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax(P Kᵀ) V over the keys of one split, normalised in the split, and the log of its sum."""
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    chunks = tl.cdiv(num_agents, BLOCK_M)
    chunk = program % chunks
    b = (program // chunks) % batch
    split = (program // chunks // batch) % splits
    h = program // chunks // batch // splits
    b64 = tl.cast(b, tl.int64)
    h64 = tl.cast(h, tl.int64)

    agent = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_N)
    agents += (b64 * agents_b + h64 * agents_h) * ALIGN
    key += (b64 * key_b + h64 * key_h) * ALIGN
    value += (b64 * value_b + h64 * value_h) * ALIGN
    if bias is not None:
        bias += b64 * bias_b + h64 * bias_h
    p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)

    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    sum0, sum1 = zeros(BLOCK_M, E0, E1)
    first = split * split_size
    last = tl.minimum(first + split_size, num_keys)
    for start in range(first, last, BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = num_keys - start
        k0, k1 = load_rows(key + start64 * key_n * ALIGN, key_n * ALIGN, token, left, D, D0, D1)
        scores = inner(p0, p1, k0, k1, BLOCK_M, BLOCK_N, D1, PRECISION) * scale
        if bias is not None:
            mask = (agent < num_agents)[:, None] & (token < left)[None, :]
            place = agent[:, None] * bias_m + token[None, :] * bias_n
            scores += tl.load(bias + start64 * bias_n + place, mask=mask, other=0.0).to(tl.float32) * LOG2E
        scores = tl.where((token < left)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A bias of -inf may leave no key so far: any finite number in place of the maximum gives zeros.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        sum0 *= decay[:, None]
        if E1 > 0:
            sum1 *= decay[:, None]
        v0, v1 = load_rows(value + start64 * value_n * ALIGN, value_n * ALIGN, token, left, E, E0, E1)
        sum0, sum1 = accumulate(weights, v0, v1, sum0, sum1, E1, PRECISION)
        top = new_top

    found = total > 0.0
    share = 1.0 / tl.where(found, total, 1.0)
    lse = tl.where(found, top + tl.log2(tl.where(found, total, 1.0)), float("-inf"))
    place = ((b64 * num_heads + h64) * splits + split) * num_agents
    tl.store(partial_lse + place + agent, lse, mask=agent < num_agents)
    sum0 *= share[:, None]
    if E1 > 0:
        sum1 *= share[:, None]
    store_rows(partial + place * E, E, agent, num_agents, sum0, sum1, E, E0, E1)


@triton.jit
def combined(
    partial,
    partial_lse,
    head,
    splits,
    agent,
    num_agents,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The splits of one head's aggregation weighed by their sums: both parts, and the log of the whole sum."""
    present = agent < num_agents
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    for split in range(0, splits):
        lse = tl.load(partial_lse + (head * splits + split) * num_agents + agent, mask=present, other=0.0)
        top = tl.maximum(top, lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    sum0, sum1 = zeros(BLOCK_M, E0, E1)
    for split in range(0, splits):
        place = (head * splits + split) * num_agents
        weight = tl.exp2(tl.load(partial_lse + place + agent, mask=present, other=0.0) - top)
        total += weight
        sum0 += weight[:, None] * load_part(partial + place * E, E, agent, num_agents, 0, E0, E)
        if E1 > 0:
            sum1 += weight[:, None] * load_part(partial + place * E, E, agent, num_agents, E0, E1, E)
    # An absent agent has loaded zeros, so that its total is the number of splits.
    share = 1.0 / total
    sum0 *= share[:, None]
    if E1 > 0:
        sum1 *= share[:, None]
    return sum0, sum1, top + tl.log2(total)


@triton.jit
def combine(
    partial,
    partial_lse,
    aggregated,
    aggregated_lse,
    num_agents,
    splits,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write what `combined` gives, for the backward pass or where every broadcast program would read too much."""
    program = tl.program_id(0)
    chunks = tl.cdiv(num_agents, BLOCK_M)
    agent = (program % chunks) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.cast(program // chunks, tl.int64)
    sum0, sum1, lse = combined(partial, partial_lse, head, splits, agent, num_agents, E, E0, E1, BLOCK_M)
    tl.store(aggregated_lse + head * num_agents + agent, lse, mask=agent < num_agents)
    store_rows(aggregated + head * num_agents * E, E, agent, num_agents, sum0, sum1, E, E0, E1)


@triton.jit
def convolve(
    tokens,
    stride,
    start,
    token,
    num_tokens,
    height,
    width,
    weight,
    FLIP: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """3 x 3 filters, one a column, over the grid of tokens, zero beyond its edges; flipped for the adjoint.

    `tokens` points at token `start`, and `token` counts from there.
    """
    column = START + tl.arange(0, SIZE)
    present = column < WIDTH
    y = (start + token) // width
    x = (start + token) % width
    result = tl.zeros([BLOCK_N, SIZE], dtype=tl.float32)
    for tap in range(0, 9):
        dy = tap // 3 - 1
        dx = tap % 3 - 1
        inside = (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width) & (start + token < num_tokens)
        place = (token + dy * width + dx)[:, None] * stride + column[None, :]
        mask = inside[:, None]
        if START + SIZE > WIDTH:
            mask = mask & present[None, :]
        shifted = tl.load(tokens + place, mask=mask, other=0.0).to(tl.float32)
        if FLIP:
            filters = tl.load(weight + column * 9 + (8 - tap), mask=present, other=0.0)
        else:
            filters = tl.load(weight + column * 9 + tap, mask=present, other=0.0)
        result += shifted * filters.to(tl.float32)[None, :]
    return result


@triton.jit
def value_branches(
    value,
    value_n,
    start,
    token,
    num_tokens,
    height,
    width,
    weight,
    weight_bias,
    shortcut,
    SHORTCUT: tl.constexpr,
    FLIP: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """shortcut · V + convolution(V) of one tile and part. `value` points at token `start`, the weights at the head."""
    result = tl.zeros([BLOCK_N, SIZE], dtype=tl.float32)
    if SHORTCUT:
        result += shortcut * load_part(value, value_n, token, num_tokens - start, START, SIZE, WIDTH).to(tl.float32)
    if weight is not None:
        result += convolve(
            value, value_n, start, token, num_tokens, height, width, weight, FLIP, START, SIZE, WIDTH, BLOCK_N
        )
    if weight_bias is not None:
        column = START + tl.arange(0, SIZE)
        result += tl.load(weight_bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def broadcast_scores(
    q0,
    q1,
    p0,
    p1,
    bias,
    bias_n,
    bias_m,
    token,
    left,
    agent,
    num_agents,
    scale,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of a tile of queries on a chunk of agents, to base 2; -inf where there is no agent."""
    LOG2E: tl.constexpr = 1.4426950408889634
    scores = inner(q0, q1, p0, p1, BLOCK_N, BLOCK_M, D1, PRECISION) * scale
    if bias is not None:
        mask = (token < left)[:, None] & (agent < num_agents)[None, :]
        place = token[:, None] * bias_n + agent[None, :] * bias_m
        scores += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32) * LOG2E
    return tl.where((agent < num_agents)[None, :], scores, float("-inf"))


@triton.jit
def broadcast(
    query,
    agents,
    aggregated,
    partial_lse,
    bias,
    value,
    weight,
    weight_bias,
    output,
    batch,
    num_agents,
    num_queries,
    splits,
    num_heads,
    height,
    width,
    scale,
    shortcut,
    query_b,
    query_h,
    query_n,
    agents_b,
    agents_h,
    agents_n,
    value_b,
    value_h,
    value_n,
    bias_b,
    bias_h,
    bias_n,
    bias_m,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    ALIGN: tl.constexpr,
    SHORTCUT: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax(Q Pᵀ) A and what is added of the values, for one tile of queries.

    `aggregated` is A, or with `partial_lse` its splits. All agents are one chunk where SINGLE.
    """
    program = tl.program_id(0)
    b = program % batch
    tiles = tl.cdiv(num_queries, BLOCK_N)
    start = ((program // batch) % tiles) * BLOCK_N
    h = program // batch // tiles
    b64 = tl.cast(b, tl.int64)
    h64 = tl.cast(h, tl.int64)
    start64 = tl.cast(start, tl.int64)
    head = b64 * num_heads + h64

    token = tl.arange(0, BLOCK_N)
    left = num_queries - start
    agents += (b64 * agents_b + h64 * agents_h) * ALIGN
    query += (b64 * query_b + h64 * query_h + start64 * query_n) * ALIGN
    if bias is not None:
        bias += b64 * bias_b + h64 * bias_h + start64 * bias_n
    q0, q1 = load_rows(query, query_n * ALIGN, token, left, D, D0, D1)
    sum0, sum1 = zeros(BLOCK_N, E0, E1)
    agent = tl.arange(0, BLOCK_M)
    if SINGLE:
        p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
        scores = broadcast_scores(
            q0, q1, p0, p1, bias, bias_n, bias_m, token, left, agent, num_agents, scale, D1, BLOCK_M, BLOCK_N, PRECISION
        )
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)
        if partial_lse is not None:
            a0, a1, lse = combined(aggregated, partial_lse, head, splits, agent, num_agents, E, E0, E1, BLOCK_M)
        else:
            a0, a1 = load_rows(aggregated + head * num_agents * E, E, agent, num_agents, E, E0, E1)
        sum0, sum1 = accumulate(weights, a0.to(q0.dtype), a1.to(q0.dtype), sum0, sum1, E1, PRECISION)
    else:
        top = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for chunk in range(0, num_agents, BLOCK_M):
            agent = chunk + tl.arange(0, BLOCK_M)
            p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
            scores = broadcast_scores(
                q0, q1, p0, p1, bias, bias_n, bias_m, token, left, agent, num_agents, scale, D1, BLOCK_M, BLOCK_N,
                PRECISION,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(weights, 1)
            sum0 *= decay[:, None]
            if E1 > 0:
                sum1 *= decay[:, None]
            a0, a1 = load_rows(aggregated + head * num_agents * E, E, agent, num_agents, E, E0, E1)
            sum0, sum1 = accumulate(weights, a0.to(q0.dtype), a1.to(q0.dtype), sum0, sum1, E1, PRECISION)
            top = new_top

    value += (b64 * value_b + h64 * value_h + start64 * value_n) * ALIGN
    if weight is not None:
        weight += h64 * E * 9
    if weight_bias is not None:
        weight_bias += h64 * E
    share = 1.0 / total
    sum0 *= share[:, None]
    sum0 += value_branches(
        value, value_n * ALIGN, start, token, num_queries, height, width, weight, weight_bias, shortcut, SHORTCUT,
        False, 0, E0, E, BLOCK_N,
    )  # fmt: skip
    if E1 > 0:
        sum1 *= share[:, None]
        sum1 += value_branches(
            value, value_n * ALIGN, start, token, num_queries, height, width, weight, weight_bias, shortcut, SHORTCUT,
            False, E0, E1, E, BLOCK_N,
        )  # fmt: skip
    output += ((b64 * num_queries + start64) * num_heads + h64) * E
    store_rows(output, num_heads * E, token, left, sum0, sum1, E, E0, E1)
