"""Backward kernels of agent attention: two passes that compute their softmaxes again.

Through the broadcast, with W₂ = softmax(Q Pᵀ) and U = dO Aᵀ:  dS₂ = W₂ (U - Σ W₂ U),  dQ = dS₂ P,  dA = W₂ᵀ dO.
Through the aggregation, with W₁ = softmax(P Kᵀ) and U = dA Vᵀ:  dS₁ = W₁ (U - Σ A dA),  dK = dS₁ᵀ P,  dV = W₁ᵀ dA.
Both add to dP = dS₂ᵀ Q + dS₁ K; the bias gradients are dS₂ and dS₁, summed over the batch.

Sums over tokens are written by split and added in a fixed order, so that there are no atomic additions. All agents are
one chunk where SINGLE; else gradients of tokens, which sum over agents, have a kernel of their own. Conventions are
those of `triton_agent_forward`; `scale` is the factor to base 2, so a gradient takes `scale` times ln 2.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
import triton
import triton.language as tl

from attngen.kernels.triton.agent_forward import broadcast_scores, value_branches
from attngen.kernels.triton.tiles import accumulate, inner, load_rows, store_rows, zeros


@triton.jit
def broadcast_weights(
    q0,
    q1,
    p0,
    p1,
    bias,
    bias_n,
    bias_m,
    stats,
    token,
    left,
    agent,
    num_agents,
    scale,
    D1: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W₂ᵀ of one tile: (agents, queries), the layout in which sums over queries need no transposition.

    Where not SINGLE, the logarithms of the rows' sums are read from `stats`, which points at the tile.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    scores = inner(p0, p1, q0, q1, BLOCK_M, BLOCK_N, D1, PRECISION) * scale
    if bias is not None:
        mask = (agent < num_agents)[:, None] & (token < left)[None, :]
        place = agent[:, None] * bias_m + token[None, :] * bias_n
        scores += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32) * LOG2E
    scores = tl.where((agent < num_agents)[:, None], scores, float("-inf"))
    if SINGLE:
        weights = tl.exp2(scores - tl.max(scores, 0)[None, :])
        weights *= (1.0 / tl.sum(weights, 0))[None, :]
    else:
        lse = tl.load(stats + token, mask=token < left, other=float("inf"))
        weights = tl.exp2(scores - lse[None, :])
    return weights


@triton.jit
def broadcast_scores_gradient(
    weights,
    a0,
    a1,
    g0,
    g1,
    stats,
    token,
    left,
    E1: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS₂ᵀ of one tile. Where not SINGLE, Σ W₂ U is read from `stats`."""
    raised = inner(a0, a1, g0, g1, BLOCK_M, BLOCK_N, E1, PRECISION)
    if SINGLE:
        mean = tl.sum(weights * raised, 0)
    else:
        mean = tl.load(stats + token, mask=token < left, other=0.0)
    return weights * (raised - mean[None, :])


@triton.jit
def broadcast_backward(
    grad,
    query,
    agents,
    aggregated,
    bias,
    stats,
    query_grad,
    agents_grad,
    aggregated_grad,
    batch,
    num_agents,
    num_queries,
    splits,
    split_size,
    all_splits,
    num_heads,
    scale,
    grad_b,
    grad_h,
    grad_n,
    query_b,
    query_h,
    query_n,
    agents_b,
    agents_h,
    agents_n,
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
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dA and dP of one split of the queries (parts of `all_splits` for dP), and dQ where SINGLE."""
    LN2: tl.constexpr = 0.6931471805599453
    program = tl.program_id(0)
    chunks = tl.cdiv(num_agents, BLOCK_M)
    chunk = program % chunks
    b64 = tl.cast((program // chunks) % batch, tl.int64)
    split = (program // chunks // batch) % splits
    h64 = tl.cast(program // chunks // batch // splits, tl.int64)
    head = b64 * num_heads + h64

    agent = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_N)
    grad += (b64 * grad_b + h64 * grad_h) * ALIGN
    query += (b64 * query_b + h64 * query_h) * ALIGN
    agents += (b64 * agents_b + h64 * agents_h) * ALIGN
    if bias is not None:
        bias += b64 * bias_b + h64 * bias_h
    p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
    a0, a1 = load_rows(aggregated + head * num_agents * E, E, agent, num_agents, E, E0, E1)
    a0 = a0.to(p0.dtype)
    a1 = a1.to(p0.dtype)
    agents_sum0, agents_sum1 = zeros(BLOCK_M, D0, D1)
    aggregated_sum0, aggregated_sum1 = zeros(BLOCK_M, E0, E1)

    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, num_queries), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = num_queries - start
        q0, q1 = load_rows(query + start64 * query_n * ALIGN, query_n * ALIGN, token, left, D, D0, D1)
        g0, g1 = load_rows(grad + start64 * grad_n * ALIGN, grad_n * ALIGN, token, left, E, E0, E1)
        tile_bias = bias
        if bias is not None:
            tile_bias = bias + start64 * bias_n
        lse = stats
        mean = stats
        if not SINGLE:
            lse = stats + head * 2 * num_queries + start
            mean = lse + num_queries
        weights = broadcast_weights(
            q0, q1, p0, p1, tile_bias, bias_n, bias_m, lse, token, left, agent, num_agents, scale, D1, SINGLE,
            BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        aggregated_sum0, aggregated_sum1 = accumulate(
            weights, g0, g1, aggregated_sum0, aggregated_sum1, E1, PRECISION
        )  # fmt: skip
        raised = broadcast_scores_gradient(
            weights, a0, a1, g0, g1, mean, token, left, E1, SINGLE, BLOCK_M, BLOCK_N, PRECISION
        )
        agents_sum0, agents_sum1 = accumulate(raised, q0, q1, agents_sum0, agents_sum1, D1, PRECISION)
        if SINGLE:
            dq0, dq1 = zeros(BLOCK_N, D0, D1)
            dq0, dq1 = accumulate(tl.trans(raised.to(p0.dtype)), p0, p1, dq0, dq1, D1, PRECISION)
            dq0 *= scale * LN2
            if D1 > 0:
                dq1 *= scale * LN2
            place = query_grad + ((b64 * num_queries + start64) * num_heads + h64) * D
            store_rows(place, num_heads * D, token, left, dq0, dq1, D, D0, D1)

    place = aggregated_grad + (head * splits + split) * num_agents * E
    store_rows(place, E, agent, num_agents, aggregated_sum0, aggregated_sum1, E, E0, E1)
    agents_sum0 *= scale * LN2
    if D1 > 0:
        agents_sum1 *= scale * LN2
    place = agents_grad + (head * all_splits + split) * num_agents * D
    store_rows(place, D, agent, num_agents, agents_sum0, agents_sum1, D, D0, D1)


@triton.jit
def query_backward(
    grad,
    query,
    agents,
    aggregated,
    bias,
    stats,
    query_grad,
    batch,
    num_agents,
    num_queries,
    num_heads,
    scale,
    grad_b,
    grad_h,
    grad_n,
    query_b,
    query_h,
    query_n,
    agents_b,
    agents_h,
    agents_n,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of one tile over all chunks of agents, and to `stats` the rows' log-sums and Σ W₂ U, (B, H, 2, N)."""
    LN2: tl.constexpr = 0.6931471805599453
    program = tl.program_id(0)
    tiles = tl.cdiv(num_queries, BLOCK_N)
    b64 = tl.cast(program % batch, tl.int64)
    start = ((program // batch) % tiles) * BLOCK_N
    h64 = tl.cast(program // batch // tiles, tl.int64)
    start64 = tl.cast(start, tl.int64)
    head = b64 * num_heads + h64

    token = tl.arange(0, BLOCK_N)
    left = num_queries - start
    agents += (b64 * agents_b + h64 * agents_h) * ALIGN
    aggregated += head * num_agents * E
    if bias is not None:
        bias += b64 * bias_b + h64 * bias_h + start64 * bias_n
    place = query + (b64 * query_b + h64 * query_h + start64 * query_n) * ALIGN
    q0, q1 = load_rows(place, query_n * ALIGN, token, left, D, D0, D1)
    place = grad + (b64 * grad_b + h64 * grad_h + start64 * grad_n) * ALIGN
    g0, g1 = load_rows(place, grad_n * ALIGN, token, left, E, E0, E1)

    top = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    mean = tl.zeros([BLOCK_N], dtype=tl.float32)
    for chunk in range(0, num_agents, BLOCK_M):
        agent = chunk + tl.arange(0, BLOCK_M)
        p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
        a0, a1 = load_rows(aggregated, E, agent, num_agents, E, E0, E1)
        scores = broadcast_scores(
            q0, q1, p0, p1, bias, bias_n, bias_m, token, left, agent, num_agents, scale, D1, BLOCK_M, BLOCK_N, PRECISION
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        raised = inner(g0, g1, a0.to(q0.dtype), a1.to(q0.dtype), BLOCK_N, BLOCK_M, E1, PRECISION)
        total = total * decay + tl.sum(weights, 1)
        mean = mean * decay + tl.sum(weights * raised, 1)
        top = new_top
    mean /= total
    lse = top + tl.log2(total)
    stats += head * 2 * num_queries + start64
    tl.store(stats + token, lse, mask=token < left)
    tl.store(stats + num_queries + token, mean, mask=token < left)

    dq0, dq1 = zeros(BLOCK_N, D0, D1)
    for chunk in range(0, num_agents, BLOCK_M):
        agent = chunk + tl.arange(0, BLOCK_M)
        p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
        a0, a1 = load_rows(aggregated, E, agent, num_agents, E, E0, E1)
        scores = broadcast_scores(
            q0, q1, p0, p1, bias, bias_n, bias_m, token, left, agent, num_agents, scale, D1, BLOCK_M, BLOCK_N, PRECISION
        )
        weights = tl.exp2(scores - lse[:, None])
        raised = inner(g0, g1, a0.to(q0.dtype), a1.to(q0.dtype), BLOCK_N, BLOCK_M, E1, PRECISION)
        raised = weights * (raised - mean[:, None])
        dq0, dq1 = accumulate(raised, p0, p1, dq0, dq1, D1, PRECISION)
    dq0 *= scale * LN2
    if D1 > 0:
        dq1 *= scale * LN2
    place = query_grad + ((b64 * num_queries + start64) * num_heads + h64) * D
    store_rows(place, num_heads * D, token, left, dq0, dq1, D, D0, D1)


@triton.jit
def broadcast_bias_backward(
    grad,
    query,
    agents,
    aggregated,
    bias,
    stats,
    bias_grad,
    batch,
    batch_share,
    num_agents,
    num_queries,
    num_heads,
    scale,
    grad_b,
    grad_h,
    grad_n,
    query_b,
    query_h,
    query_n,
    agents_b,
    agents_h,
    agents_n,
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
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS₂ᵀ of one tile summed over `batch_share` batch elements, to (shares, H, M, N)."""
    program = tl.program_id(0)
    chunks = tl.cdiv(num_agents, BLOCK_M)
    tiles = tl.cdiv(num_queries, BLOCK_N)
    shares = tl.cdiv(batch, batch_share)
    share = program % shares
    chunk = (program // shares) % chunks
    start = ((program // shares // chunks) % tiles) * BLOCK_N
    h64 = tl.cast(program // shares // chunks // tiles, tl.int64)
    start64 = tl.cast(start, tl.int64)

    agent = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_N)
    left = num_queries - start
    gathered = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for b in range(share * batch_share, tl.minimum((share + 1) * batch_share, batch)):
        b64 = tl.cast(b, tl.int64)
        head = b64 * num_heads + h64
        place = agents + (b64 * agents_b + h64 * agents_h) * ALIGN
        p0, p1 = load_rows(place, agents_n * ALIGN, agent, num_agents, D, D0, D1)
        a0, a1 = load_rows(aggregated + head * num_agents * E, E, agent, num_agents, E, E0, E1)
        place = query + (b64 * query_b + h64 * query_h + start64 * query_n) * ALIGN
        q0, q1 = load_rows(place, query_n * ALIGN, token, left, D, D0, D1)
        place = grad + (b64 * grad_b + h64 * grad_h + start64 * grad_n) * ALIGN
        g0, g1 = load_rows(place, grad_n * ALIGN, token, left, E, E0, E1)
        lse = stats
        mean = stats
        if not SINGLE:
            lse = stats + head * 2 * num_queries + start
            mean = lse + num_queries
        weights = broadcast_weights(
            q0, q1, p0, p1, bias + b64 * bias_b + h64 * bias_h + start64 * bias_n, bias_n, bias_m, lse, token, left,
            agent, num_agents, scale, D1, SINGLE, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        gathered += broadcast_scores_gradient(
            weights, a0.to(p0.dtype), a1.to(p0.dtype), g0, g1, mean, token, left, E1, SINGLE, BLOCK_M, BLOCK_N,
            PRECISION,
        )  # fmt: skip
    place = bias_grad + (tl.cast(share, tl.int64) * num_heads + h64) * num_agents * num_queries + start64
    place += tl.cast(agent, tl.int64)[:, None] * num_queries + token[None, :]
    tl.store(place, gathered, mask=(agent < num_agents)[:, None] & (token < left)[None, :])


@triton.jit
def aggregation_weights(
    k0,
    k1,
    p0,
    p1,
    bias,
    bias_m,
    bias_n,
    lse,
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
    """W₁ᵀ of one tile, (keys, agents); zero beyond the last key, whose score of zero could exceed every sum."""
    LOG2E: tl.constexpr = 1.4426950408889634
    scores = inner(k0, k1, p0, p1, BLOCK_N, BLOCK_M, D1, PRECISION) * scale
    if bias is not None:
        mask = (token < left)[:, None] & (agent < num_agents)[None, :]
        place = token[:, None] * bias_n + agent[None, :] * bias_m
        scores += tl.load(bias + place, mask=mask, other=0.0).to(tl.float32) * LOG2E
    scores = tl.where((token < left)[:, None], scores, float("-inf"))
    return tl.exp2(scores - lse[None, :])


@triton.jit
def aggregation_backward(
    grad,
    key,
    value,
    agents,
    aggregated_grad,
    lse,
    mean,
    bias,
    weight,
    key_grad,
    value_grad,
    agents_grad,
    batch,
    num_agents,
    num_keys,
    splits,
    split_size,
    first_split,
    all_splits,
    num_heads,
    height,
    width,
    scale,
    shortcut,
    grad_b,
    grad_h,
    grad_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    agents_b,
    agents_h,
    agents_n,
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
    SHORTCUT: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dP of one split of the keys (from `first_split` of `all_splits`), and dK and dV where SINGLE."""
    LN2: tl.constexpr = 0.6931471805599453
    program = tl.program_id(0)
    chunks = tl.cdiv(num_agents, BLOCK_M)
    chunk = program % chunks
    b64 = tl.cast((program // chunks) % batch, tl.int64)
    split = (program // chunks // batch) % splits
    h64 = tl.cast(program // chunks // batch // splits, tl.int64)
    head = b64 * num_heads + h64

    agent = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_N)
    grad += (b64 * grad_b + h64 * grad_h) * ALIGN
    key += (b64 * key_b + h64 * key_h) * ALIGN
    value += (b64 * value_b + h64 * value_h) * ALIGN
    agents += (b64 * agents_b + h64 * agents_h) * ALIGN
    if bias is not None:
        bias += b64 * bias_b + h64 * bias_h
    if weight is not None:
        weight += h64 * E * 9
    p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
    a0, a1 = load_rows(aggregated_grad + head * num_agents * E, E, agent, num_agents, E, E0, E1)
    a0 = a0.to(p0.dtype)
    a1 = a1.to(p0.dtype)
    sums = tl.load(lse + head * num_agents + agent, mask=agent < num_agents, other=float("inf"))
    means = tl.load(mean + head * num_agents + agent, mask=agent < num_agents, other=0.0)
    agents_sum0, agents_sum1 = zeros(BLOCK_M, D0, D1)

    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, num_keys), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = num_keys - start
        k0, k1 = load_rows(key + start64 * key_n * ALIGN, key_n * ALIGN, token, left, D, D0, D1)
        v0, v1 = load_rows(value + start64 * value_n * ALIGN, value_n * ALIGN, token, left, E, E0, E1)
        tile_bias = bias
        if bias is not None:
            tile_bias = bias + start64 * bias_n
        weights = aggregation_weights(
            k0, k1, p0, p1, tile_bias, bias_m, bias_n, sums, token, left, agent, num_agents, scale, D1, BLOCK_M,
            BLOCK_N, PRECISION,
        )  # fmt: skip
        raised = inner(v0, v1, a0, a1, BLOCK_N, BLOCK_M, E1, PRECISION)
        raised = weights * (raised - means[None, :])
        if SINGLE:
            dv0, dv1 = zeros(BLOCK_N, E0, E1)
            dv0, dv1 = accumulate(weights, a0, a1, dv0, dv1, E1, PRECISION)
            store_value_gradient(
                dv0, dv1, grad + start64 * grad_n * ALIGN, grad_n * ALIGN, start, token, num_keys, height, width,
                weight, shortcut, value_grad + ((b64 * num_keys + start64) * num_heads + h64) * E, num_heads * E,
                SHORTCUT, E, E0, E1, BLOCK_N,
            )  # fmt: skip
            dk0, dk1 = zeros(BLOCK_N, D0, D1)
            dk0, dk1 = accumulate(raised, p0, p1, dk0, dk1, D1, PRECISION)
            dk0 *= scale * LN2
            if D1 > 0:
                dk1 *= scale * LN2
            place = key_grad + ((b64 * num_keys + start64) * num_heads + h64) * D
            store_rows(place, num_heads * D, token, left, dk0, dk1, D, D0, D1)
        agents_sum0, agents_sum1 = accumulate(
            tl.trans(raised.to(k0.dtype)), k0, k1, agents_sum0, agents_sum1, D1, PRECISION
        )

    agents_sum0 *= scale * LN2
    if D1 > 0:
        agents_sum1 *= scale * LN2
    place = agents_grad + (head * all_splits + first_split + split) * num_agents * D
    store_rows(place, D, agent, num_agents, agents_sum0, agents_sum1, D, D0, D1)


@triton.jit
def store_value_gradient(
    dv0,
    dv1,
    grad,
    grad_n,
    start,
    token,
    num_keys,
    height,
    width,
    weight,
    shortcut,
    value_grad,
    value_grad_n,
    SHORTCUT: tl.constexpr,
    E: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dV of a tile with what the shortcut and the convolution add. `grad` and `value_grad` point at the tile."""
    dv0 += value_branches(
        grad, grad_n, start, token, num_keys, height, width, weight, None, shortcut, SHORTCUT, True, 0, E0, E, BLOCK_N
    )
    if E1 > 0:
        dv1 += value_branches(
            grad, grad_n, start, token, num_keys, height, width, weight, None, shortcut, SHORTCUT, True, E0, E1, E,
            BLOCK_N,
        )  # fmt: skip
    store_rows(value_grad, value_grad_n, token, num_keys - start, dv0, dv1, E, E0, E1)


@triton.jit
def key_backward(
    grad,
    key,
    value,
    agents,
    aggregated_grad,
    lse,
    mean,
    bias,
    weight,
    key_grad,
    value_grad,
    batch,
    num_agents,
    num_keys,
    num_heads,
    height,
    width,
    scale,
    shortcut,
    grad_b,
    grad_h,
    grad_n,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    agents_b,
    agents_h,
    agents_n,
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
    SHORTCUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one tile over all chunks of agents."""
    LN2: tl.constexpr = 0.6931471805599453
    program = tl.program_id(0)
    tiles = tl.cdiv(num_keys, BLOCK_N)
    b64 = tl.cast(program % batch, tl.int64)
    start = ((program // batch) % tiles) * BLOCK_N
    h64 = tl.cast(program // batch // tiles, tl.int64)
    start64 = tl.cast(start, tl.int64)
    head = b64 * num_heads + h64

    token = tl.arange(0, BLOCK_N)
    left = num_keys - start
    agents += (b64 * agents_b + h64 * agents_h) * ALIGN
    aggregated_grad += head * num_agents * E
    if bias is not None:
        bias += b64 * bias_b + h64 * bias_h + start64 * bias_n
    if weight is not None:
        weight += h64 * E * 9
    place = key + (b64 * key_b + h64 * key_h + start64 * key_n) * ALIGN
    k0, k1 = load_rows(place, key_n * ALIGN, token, left, D, D0, D1)
    place = value + (b64 * value_b + h64 * value_h + start64 * value_n) * ALIGN
    v0, v1 = load_rows(place, value_n * ALIGN, token, left, E, E0, E1)
    dk0, dk1 = zeros(BLOCK_N, D0, D1)
    dv0, dv1 = zeros(BLOCK_N, E0, E1)
    for chunk in range(0, num_agents, BLOCK_M):
        agent = chunk + tl.arange(0, BLOCK_M)
        p0, p1 = load_rows(agents, agents_n * ALIGN, agent, num_agents, D, D0, D1)
        a0, a1 = load_rows(aggregated_grad, E, agent, num_agents, E, E0, E1)
        a0 = a0.to(p0.dtype)
        a1 = a1.to(p0.dtype)
        sums = tl.load(lse + head * num_agents + agent, mask=agent < num_agents, other=float("inf"))
        means = tl.load(mean + head * num_agents + agent, mask=agent < num_agents, other=0.0)
        weights = aggregation_weights(
            k0, k1, p0, p1, bias, bias_m, bias_n, sums, token, left, agent, num_agents, scale, D1, BLOCK_M, BLOCK_N,
            PRECISION,
        )  # fmt: skip
        raised = inner(v0, v1, a0, a1, BLOCK_N, BLOCK_M, E1, PRECISION)
        raised = weights * (raised - means[None, :])
        dv0, dv1 = accumulate(weights, a0, a1, dv0, dv1, E1, PRECISION)
        dk0, dk1 = accumulate(raised, p0, p1, dk0, dk1, D1, PRECISION)
    store_value_gradient(
        dv0, dv1, grad + (b64 * grad_b + h64 * grad_h + start64 * grad_n) * ALIGN, grad_n * ALIGN, start, token,
        num_keys, height, width, weight, shortcut, value_grad + ((b64 * num_keys + start64) * num_heads + h64) * E,
        num_heads * E, SHORTCUT, E, E0, E1, BLOCK_N,
    )  # fmt: skip
    dk0 *= scale * LN2
    if D1 > 0:
        dk1 *= scale * LN2
    place = key_grad + ((b64 * num_keys + start64) * num_heads + h64) * D
    store_rows(place, num_heads * D, token, left, dk0, dk1, D, D0, D1)


@triton.jit
def aggregation_bias_backward(
    key,
    value,
    agents,
    aggregated_grad,
    lse,
    mean,
    bias,
    bias_grad,
    batch,
    batch_share,
    num_agents,
    num_keys,
    num_heads,
    scale,
    key_b,
    key_h,
    key_n,
    value_b,
    value_h,
    value_n,
    agents_b,
    agents_h,
    agents_n,
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
    """dS₁ of one tile summed over `batch_share` batch elements, to (shares, H, M, L)."""
    program = tl.program_id(0)
    chunks = tl.cdiv(num_agents, BLOCK_M)
    tiles = tl.cdiv(num_keys, BLOCK_N)
    shares = tl.cdiv(batch, batch_share)
    share = program % shares
    chunk = (program // shares) % chunks
    start = ((program // shares // chunks) % tiles) * BLOCK_N
    h64 = tl.cast(program // shares // chunks // tiles, tl.int64)
    start64 = tl.cast(start, tl.int64)

    agent = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.arange(0, BLOCK_N)
    left = num_keys - start
    gathered = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for b in range(share * batch_share, tl.minimum((share + 1) * batch_share, batch)):
        b64 = tl.cast(b, tl.int64)
        head = b64 * num_heads + h64
        place = agents + (b64 * agents_b + h64 * agents_h) * ALIGN
        p0, p1 = load_rows(place, agents_n * ALIGN, agent, num_agents, D, D0, D1)
        a0, a1 = load_rows(aggregated_grad + head * num_agents * E, E, agent, num_agents, E, E0, E1)
        place = key + (b64 * key_b + h64 * key_h + start64 * key_n) * ALIGN
        k0, k1 = load_rows(place, key_n * ALIGN, token, left, D, D0, D1)
        place = value + (b64 * value_b + h64 * value_h + start64 * value_n) * ALIGN
        v0, v1 = load_rows(place, value_n * ALIGN, token, left, E, E0, E1)
        sums = tl.load(lse + head * num_agents + agent, mask=agent < num_agents, other=float("inf"))
        means = tl.load(mean + head * num_agents + agent, mask=agent < num_agents, other=0.0)
        weights = aggregation_weights(
            k0, k1, p0, p1, bias + b64 * bias_b + h64 * bias_h + start64 * bias_n, bias_m, bias_n, sums, token, left,
            agent, num_agents, scale, D1, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        raised = inner(v0, v1, a0.to(p0.dtype), a1.to(p0.dtype), BLOCK_N, BLOCK_M, E1, PRECISION)
        gathered += weights * (raised - means[None, :])
    place = bias_grad + (tl.cast(share, tl.int64) * num_heads + h64) * num_agents * num_keys + start64
    place += tl.cast(agent, tl.int64)[None, :] * num_keys + token[:, None]
    tl.store(place, gathered, mask=(token < left)[:, None] & (agent < num_agents)[None, :])
