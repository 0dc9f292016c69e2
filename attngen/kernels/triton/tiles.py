"""Pieces of kernels: tiles of rows cut in one or two parts, see `triton_common.split_width`."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl


@triton.jit
def load_part(pointer, stride, row, num_rows, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START to START + SIZE of the given rows; zero outside of the tensor."""
    column = START + tl.arange(0, SIZE)
    mask = (row < num_rows)[:, None]
    if START + SIZE > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(pointer, stride, row, num_rows, WIDTH: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr):
    """Both parts of the given rows; the first one twice where there is only one."""
    first = load_part(pointer, stride, row, num_rows, 0, PART0, WIDTH)
    second = first
    if PART1 > 0:
        second = load_part(pointer, stride, row, num_rows, PART0, PART1, WIDTH)
    return first, second


@triton.jit
def store_part(pointer, stride, row, num_rows, tile, START: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Write columns START to START + SIZE of the given rows."""
    column = START + tl.arange(0, SIZE)
    mask = (row < num_rows)[:, None]
    if START + SIZE > WIDTH:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * stride + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    pointer, stride, row, num_rows, first, second, WIDTH: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr
):
    """Write both parts of the given rows."""
    store_part(pointer, stride, row, num_rows, first, 0, PART0, WIDTH)
    if PART1 > 0:
        store_part(pointer, stride, row, num_rows, second, PART0, PART1, WIDTH)


@triton.jit
def multiply(x, y, total, PRECISION: tl.constexpr):
    """total + x y, see `triton_common.dot_precision`."""
    if PRECISION == "wide":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(x, y, total, input_precision=PRECISION)


@triton.jit
def inner(x0, x1, y0, y1, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART1: tl.constexpr, PRECISION: tl.constexpr):
    """x yᵀ, (ROWS, COLUMNS), of two tiles of rows in parts."""
    product = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    product = multiply(x0, tl.trans(y0), product, PRECISION)
    if PART1 > 0:
        product = multiply(x1, tl.trans(y1), product, PRECISION)
    return product


@triton.jit
def zeros(ROWS: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr):
    """Accumulators for both parts of some rows."""
    first = tl.zeros([ROWS, PART0], dtype=tl.float32)
    second = first
    if PART1 > 0:
        second = tl.zeros([ROWS, PART1], dtype=tl.float32)
    return first, second


@triton.jit
def accumulate(weights, x0, x1, sum0, sum1, PART1: tl.constexpr, PRECISION: tl.constexpr):
    """sum + weights x for rows x in parts; the weights are rounded to the dtype of x."""
    weights = weights.to(x0.dtype)
    sum0 = multiply(weights, x0, sum0, PRECISION)
    if PART1 > 0:
        sum1 = multiply(weights, x1, sum1, PRECISION)
    return sum0, sum1
