"""Kernels of linear attention; the formulas and names are those of `linear`, its module beside this one.

The state of a head is C (D, E), z (D,) and m (E,), float32, one behind the other; its gradient is dS and r in their
places. One program handles a split of the tokens and a tile of the values' columns of one head. Strides are in units of
ALIGN elements (`common.alignment`).
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

from attngen.kernels.triton.tiles import kernel, load_tile, multiply, place, store_tile


@triton.jit
def features(x, keep, MAP: tl.constexpr, OPERAND: tl.constexpr):
    """φ(x) for float32 rows `x`, zero where not `keep`; comparisons are such that NaN stays NaN.

    Rounded as the matrix units want it, so that weights and what they weight see the same features.
    """
    if MAP == "elu":
        mapped = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == "relu":
        mapped = tl.where(x < 0, 0.0, x)
    elif MAP == "focused":
        direction, length, largest, _ = focus(x, keep)
        mapped = direction * (length * largest)[:, None]
    else:
        mapped = x
    return tl.where(keep, mapped, 0.0).to(OPERAND).to(tl.float32)


@triton.jit
def focus(x, keep):
    """Cubed relu(x) + 1e-6: unit direction, norm of u = relu(x) / max, max, and 3 u² / ‖u³‖, which is its slope."""
    positive = tl.where(keep, tl.where(x < 0, 0.0, x) + 1e-6, 0.0)
    largest = tl.max(positive, 1)
    # Rows beyond the last token have no column to keep.
    largest = tl.where(largest > 0, largest, 1.0)
    scaled = positive / largest[:, None]
    square = scaled * scaled
    cube = square * scaled
    inverse = 1.0 / tl.sqrt(tl.maximum(tl.sum(cube * cube, 1), 1e-30))
    return cube * inverse[:, None], tl.sqrt(tl.sum(square, 1)), largest, 3.0 * square * inverse[:, None]


@triton.jit
def features_backward(x, gradient, keep, MAP: tl.constexpr):
    """The gradient of x from that of φ(x), which must be zero where not `keep`."""
    if MAP == "elu":
        result = gradient * tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == "relu":
        result = tl.where(x > 0, gradient, 0.0)
    elif MAP == "focused":
        direction, length, largest, slope = focus(x, keep)
        along = tl.sum(direction * gradient, 1)[:, None]
        norm = length[:, None]
        scaled = tl.where(x < 0, 0.0, x) + 1e-6
        radial = scaled / (largest[:, None] * tl.maximum(norm, 1e-30)) * along
        result = tl.where(x > 0, radial + norm * slope * (gradient - along * direction), 0.0)
    else:
        result = gradient
    return result


@triton.jit
def load_vector(vector, first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers from `first`, zero from SIZE on."""
    index = first + tl.arange(0, BLOCK)
    return tl.load(vector + index, mask=index < SIZE, other=0.0)


@triton.jit
def kept(left, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Which numbers of a tile are inside of the tensor."""
    return (tl.arange(0, ROWS) < left)[:, None] & (tl.arange(0, COLUMNS) < WIDTH)[None, :]


@triton.jit
def write_state(
    state, summary, mean, first, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CENTRE: tl.constexpr,
):  # fmt: skip
    """Write columns from `first` of a (D, E) sum, centred if asked, the (D,) sum, and the (E,) centre if asked."""
    row = tl.arange(0, BLOCK_D)
    column = first + tl.arange(0, BLOCK_E)
    if CENTRE:
        total = tl.sum(mean, 0)
        # No feature at all, or features of both signs (identity): any centre is exact, and zero is safe.
        whole = tl.min(mean, 0) >= 0 and total > 0
        centre = tl.where(whole, tl.sum(summary, 0) / tl.where(whole, total, 1.0), 0.0)
        summary -= mean[:, None] * centre[None, :]
        tl.store(state + D * E + D + column, centre, mask=column < E)
    store_tile(state, E, D, first, summary, E, BLOCK_D, BLOCK_E)
    if first == 0:
        tl.store(state + D * E + row, mean, mask=row < D)


@kernel
def summarise(
    key, value, state, batch, heads, tokens, splits, split_size, scale, key_b, key_h, key_n, value_b, value_h, value_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, ALIGN: tl.constexpr, MAP: tl.constexpr, CENTRE: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """C, z and m of one split of the keys, times `scale`; S and z where not CENTRE, for `combine` to centre them."""
    b, h, part = place(batch, heads, splits * TILES, False)
    split, first = part // TILES, part % TILES * BLOCK_E
    key += (b * key_b + h * key_h) * ALIGN
    value += (b * value_b + h * value_h) * ALIGN
    summary = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, tokens), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = tokens - start
        k = load_tile(key + start64 * key_n * ALIGN, key_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D).to(tl.float32)
        v = load_tile(value + start64 * value_n * ALIGN, value_n * ALIGN, left, first, E, BLOCK_N, BLOCK_E)
        phi = features(k, kept(left, BLOCK_N, D, BLOCK_D), MAP, OPERAND)
        summary += multiply(tl.trans(phi), v, OPERAND, PRECISION)
        mean += tl.sum(phi, 0)
    state += ((b * heads + h) * splits + split) * (D * E + D + E)
    write_state(state, summary * scale, mean * scale, first, D, E, BLOCK_D, BLOCK_E, CENTRE)


@kernel
def combine(
    parts, state, heads, splits, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CENTRE: tl.constexpr,
):  # fmt: skip
    """The sum of the splits of one head, in their order. `heads` are those of the whole batch."""
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    first = tl.program_id(0) // heads * BLOCK_E
    parts += head * splits * (D * E + D + E)
    summary = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    mean = tl.zeros([BLOCK_D], tl.float32)
    for _ in tl.range(0, splits, loop_unroll_factor=8):  # many loads on the way at once
        summary += load_tile(parts, E, D, first, E, BLOCK_D, BLOCK_E)
        mean += load_vector(parts + D * E, 0, D, BLOCK_D)
        parts += D * E + D + E
    state += head * (D * E + D + E)
    write_state(state, summary, mean, first, D, E, BLOCK_D, BLOCK_E, CENTRE)


@kernel
def read(
    query, state, output, batch, heads, tokens, splits, split_size, eps, query_b, query_h, query_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, ALIGN: tl.constexpr, MAP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs (B, N, H, E) of one split of the queries."""
    b, h, part = place(batch, heads, splits * TILES, False)
    split, first = part // TILES, part % TILES * BLOCK_E
    query += (b * query_b + h * query_h) * ALIGN
    state += (b * heads + h) * (D * E + D + E)
    summary = load_tile(state, E, D, first, E, BLOCK_D, BLOCK_E).to(OPERAND)
    mean = load_vector(state + D * E, 0, D, BLOCK_D)
    centre = load_vector(state + D * E + D, first, E, BLOCK_E)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, tokens), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = tokens - start
        q = load_tile(query + start64 * query_n * ALIGN, query_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D).to(tl.float32)
        phi = features(q, kept(left, BLOCK_N, D, BLOCK_D), MAP, OPERAND)
        weight = tl.sum(phi * mean[None, :], 1)
        product = multiply(phi, summary, OPERAND, PRECISION) + weight[:, None] * centre[None, :]
        tile = output + ((b * tokens + start64) * heads + h) * E
        store_tile(tile, heads * E, left, first, product / (weight + eps)[:, None], E, BLOCK_N, BLOCK_E)


@kernel
def query_backward(
    query, grad, state, query_grad, state_grad, batch, heads, tokens, splits, split_size, eps,
    query_b, query_h, query_n, grad_b, grad_h, grad_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, ALIGN: tl.constexpr, MAP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B, N, H, D) of one split of the queries, and their part of dS and r."""
    b, h, part = place(batch, heads, splits * TILES, False)
    split, first = part // TILES, part % TILES * BLOCK_E
    query += (b * query_b + h * query_h) * ALIGN
    grad += (b * grad_b + h * grad_h) * ALIGN
    state += (b * heads + h) * (D * E + D + E)
    mean = load_vector(state + D * E, 0, D, BLOCK_D)
    # The compiler moves no load out of a loop that stores. Here and below: what fits a tile is read once.
    summary = load_tile(state, E, D, 0, E, BLOCK_D, BLOCK_E).to(OPERAND)
    centre = load_vector(state + D * E + D, 0, E, BLOCK_E)
    summary_grad = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    mean_grad = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, tokens), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = tokens - start
        q = load_tile(query + start64 * query_n * ALIGN, query_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D).to(tl.float32)
        keep = kept(left, BLOCK_N, D, BLOCK_D)
        phi = features(q, keep, MAP, OPERAND)
        inverse = 1.0 / (tl.sum(phi * mean[None, :], 1) + eps)
        tile_grad = grad + start64 * grad_n * ALIGN
        g = load_tile(tile_grad, grad_n * ALIGN, left, first, E, BLOCK_N, BLOCK_E)
        if TILES == 1:
            product = multiply(g, tl.trans(summary), OPERAND, PRECISION)
            along = tl.sum(g.to(tl.float32) * centre[None, :], 1)
        else:
            product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            along = tl.zeros([BLOCK_N], tl.float32)
            for other in range(0, TILES * BLOCK_E, BLOCK_E):
                g_other = load_tile(tile_grad, grad_n * ALIGN, left, other, E, BLOCK_N, BLOCK_E)
                summary = load_tile(state, E, D, other, E, BLOCK_D, BLOCK_E).to(OPERAND)
                centre = load_vector(state + D * E + D, other, E, BLOCK_E)
                product += multiply(g_other, tl.trans(summary), OPERAND, PRECISION)
                along += tl.sum(g_other.to(tl.float32) * centre[None, :], 1)
        c = (eps * along - tl.sum(phi * product, 1)) * inverse
        summary_grad += multiply(tl.trans(phi), g.to(tl.float32) * inverse[:, None], OPERAND, PRECISION)
        mean_grad += tl.sum(phi * (c * inverse)[:, None], 0)
        dq = features_backward(q, (product + c[:, None] * mean[None, :]) * inverse[:, None], keep, MAP)
        if first == 0:
            tile = query_grad + ((b * tokens + start64) * heads + h) * D
            store_tile(tile, heads * D, left, 0, dq, D, BLOCK_N, BLOCK_D)
    state_grad += ((b * heads + h) * splits + split) * (D * E + D + E)
    write_state(state_grad, summary_grad, mean_grad, first, D, E, BLOCK_D, BLOCK_E, False)


@kernel
def key_backward(
    key, value, state, state_grad, key_grad, value_grad, batch, heads, tokens, splits, split_size, scale,
    key_b, key_h, key_n, value_b, value_h, value_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr, ALIGN: tl.constexpr, MAP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (B, L, H, D) and dv (B, L, H, E) of one split of the keys."""
    b, h, split = place(batch, heads, splits, False)
    key += (b * key_b + h * key_h) * ALIGN
    value += (b * value_b + h * value_h) * ALIGN
    state += (b * heads + h) * (D * E + D + E)
    state_grad += (b * heads + h) * (D * E + D + E)
    mean_grad = load_vector(state_grad + D * E, 0, D, BLOCK_D)
    matrix = load_tile(state_grad, E, D, 0, E, BLOCK_D, BLOCK_E).to(OPERAND)
    centre = load_vector(state + D * E + D, 0, E, BLOCK_E)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, tokens), BLOCK_N):
        start64 = tl.cast(start, tl.int64)
        left = tokens - start
        row = (b * tokens + start64) * heads + h
        k = load_tile(key + start64 * key_n * ALIGN, key_n * ALIGN, left, 0, D, BLOCK_N, BLOCK_D).to(tl.float32)
        keep = kept(left, BLOCK_N, D, BLOCK_D)
        phi = features(k, keep, MAP, OPERAND)
        product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(0, TILES * BLOCK_E, BLOCK_E):
            v = load_tile(value + start64 * value_n * ALIGN, value_n * ALIGN, left, first, E, BLOCK_N, BLOCK_E)
            if TILES > 1:
                centre = load_vector(state + D * E + D, first, E, BLOCK_E)
                matrix = load_tile(state_grad, E, D, first, E, BLOCK_D, BLOCK_E).to(OPERAND)
            dv = multiply(phi, matrix, OPERAND, PRECISION) * scale
            store_tile(value_grad + row * E, heads * E, left, first, dv, E, BLOCK_N, BLOCK_E)
            product += multiply(v.to(tl.float32) - centre[None, :], tl.trans(matrix), OPERAND, PRECISION)
        dk = features_backward(k, (product + mean_grad[None, :]) * scale, keep, MAP)
        store_tile(key_grad + row * D, heads * D, left, 0, dk, D, BLOCK_N, BLOCK_D)
