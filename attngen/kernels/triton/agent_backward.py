"""The backward kernel of agent attention: one streaming pass through the broadcast, then one through the aggregation.

Both compute their softmax again and have the same gradients, with rows X, values Y and a matrix A of the agents:

    broadcast      X = Q,  Y = dO,  A = A     W = softmax(Q Pᵀ) over agents    r = Σ W U over agents
    aggregation    X = K,  Y = V,   A = dA    W = softmax(K Pᵀ) over tokens    r = Σ A dA over columns

    U = Y Aᵀ,  dS = W (U - r),  dX = dS P,  dP += dSᵀ X;  the bias gradients are dS;  dA = Wᵀ dO,  dV = W dA

Sums over tokens are written by split and added in a fixed order, so there are no atomic additions. `scale` is the
factor to base 2, so a gradient takes `scale` times ln 2; A and dA are without the gain, which multiplies dS and dV.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
import triton
import triton.language as tl

from attngen.kernels.triton.agent_forward import load_bias, value_branches
from attngen.kernels.triton.tiles import kernel, load_tile, multiply, place, store_tile

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def normalised(scores, token, left, agent, log_sums, M: tl.constexpr):
    """W of a tile, (tokens, agents): over the agents where there are no `log_sums`, else over the tokens by them."""
    if log_sums is None:
        scores = tl.where((agent < M)[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(weights, 1)
        return weights * (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
    else:
        # A score of zero beyond the last key could exceed every sum.
        scores = tl.where((token < left)[:, None], scores, float("-inf"))
        return tl.exp2(scores - log_sums[None, :])


@kernel
def differentiate(
    rows, values, agents, matrix, state, bias, weight, grad,
    rows_grad, values_grad, agents_grad, matrix_grad, bias_grad,
    batch, heads, tokens, splits, split_size, first_split, all_splits, height, width, scale, gain, shortcut,
    rows_b, rows_h, rows_n, values_b, values_h, values_n, agents_b, agents_h, agents_n, grad_b, grad_h, grad_n,
    bias_b, bias_h, bias_n, bias_m,
    M: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX of one split of the tokens, its parts of dP (from `first_split` of `all_splits`) and, by the broadcast, of dA.

    `state` is that of the forward pass, in one split, for the aggregation, and None for the broadcast. `grad` is dO, of
    which the branches of the values take their share of dV. `bias_grad` is (B, H, N, M) for the broadcast and
    (B, H, M, N) for the aggregation, or None.
    """
    b, h, split = place(batch, heads, splits, bias is not None)
    head = b * heads + h
    agent, token = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    rows += (b * rows_b + h * rows_h) * ALIGN
    values += (b * values_b + h * values_h) * ALIGN
    if bias is not None:
        bias += b * bias_b + h * bias_h
    if weight is not None:
        weight += h * E * 9
    p = load_tile(agents + (b * agents_b + h * agents_h) * ALIGN, agents_n * ALIGN, M, 0, D, BLOCK_M, BLOCK_D)
    a = load_tile(matrix + head * M * E, E, M, 0, E, BLOCK_M, BLOCK_E)
    log_sums = None
    if state is not None:
        mean = tl.sum(a * load_tile(state + head * M * E, E, M, 0, E, BLOCK_M, BLOCK_E), 1)
        sums = state + tl.cast(batch, tl.int64) * heads * M * E + head * M
        log_sums = tl.load(sums + agent, mask=agent < M, other=float("inf"))
        log_sums = tl.where(log_sums == float("-inf"), float("inf"), log_sums)
    a = a.to(OPERAND)
    agents_sum = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    matrix_sum = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, tokens), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = tokens - start
        place_of_rows = (b * tokens + start64) * heads + h
        x = load_tile(rows + start64 * rows_n * ALIGN, rows_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D)
        y = load_tile(values + start64 * values_n * ALIGN, values_n * ALIGN, left, 0, E, BLOCK_N, BLOCK_E)
        scores = multiply(x, tl.trans(p), OPERAND, PRECISION) * scale
        if bias is not None:
            scores += load_bias(bias + start64 * bias_n, token[:, None], left, bias_n, agent[None, :], bias_m, M)
        weights = normalised(scores, token, left, agent, log_sums, M)
        raised = multiply(y, tl.trans(a), OPERAND, PRECISION)
        if state is None:
            raised -= tl.sum(weights * raised, 1)[:, None]
            matrix_sum += multiply(tl.trans(weights.to(OPERAND)), y, OPERAND, PRECISION)
        else:
            raised -= mean[None, :]
            dv = multiply(weights, a, OPERAND, PRECISION) * gain
            tile_grad = grad + (b * grad_b + h * grad_h + start64 * grad_n) * ALIGN
            dv += value_branches(
                tile_grad, grad_n * ALIGN, start, tokens, height, width, weight, None, shortcut, True, E, BLOCK_N,
                BLOCK_E,
            )  # fmt: skip
            store_tile(values_grad + place_of_rows * E, heads * E, left, 0, dv, E, BLOCK_N, BLOCK_E)
        raised *= weights * gain
        if bias_grad is not None:
            mask = (token < left)[:, None] & (agent < M)[None, :]
            tile = bias_grad + head * M * tokens
            if state is None:
                tile += start64 * M + (token[:, None] * M + agent[None, :])
            else:
                tile += start64 + (tl.cast(agent, tl.int64)[None, :] * tokens + token[:, None])
            tl.store(tile, raised.to(bias_grad.dtype.element_ty), mask=mask)
        raised = raised.to(OPERAND)
        dx = multiply(raised, p, OPERAND, PRECISION) * (scale * LN2)
        store_tile(rows_grad + place_of_rows * D, heads * D, left, 0, dx, D, BLOCK_N, BLOCK_D)
        agents_sum += multiply(tl.trans(raised), x, OPERAND, PRECISION)
    part = (head * all_splits + first_split + split) * M * D
    store_tile(agents_grad + part, D, M, 0, agents_sum * (scale * LN2), D, BLOCK_M, BLOCK_D)
    if state is None:
        part = (head * splits + split) * M * E
        store_tile(matrix_grad + part, E, M, 0, matrix_sum, E, BLOCK_M, BLOCK_E)
