"""Pieces of kernels: which program this is, tiles of rows, and their products.

Offsets that grow with the batch or the tokens are 64-bit. Heads whose size is no power of two are padded to one:
columns beyond the size are masked, so they cost no memory traffic.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
import triton
import triton.language as tl

_FREE = {
    # Arguments for which Triton makes no binaries of their own where they are 1 or a multiple of 16.
    *("batch", "heads", "tokens", "splits", "split_size", "first_split", "all_splits", "height", "width"),
    *(f"{x}_{axis}" for x in ("query", "key", "value", "agents", "grad", "rows", "values") for axis in "bhn"),
}


def kernel(function):
    """A kernel with one binary for all batches, tokens and strides: what loads need of a stride is in ALIGN."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _FREE])


@triton.jit
def place(batch, heads, tiles, BATCH_FIRST: tl.constexpr):
    """(b, h, tile) of this program.

    Programs that follow each other run together. Heads lie beside each other in a row of the tensors, and those of 40
    or 72 numbers share sectors of memory; a bias that the batch shares is read from memory once if the batch is first.
    """
    program = tl.program_id(0)
    fast = batch if BATCH_FIRST else heads
    first = tl.cast(program % fast, tl.int64)
    tile = (program // fast) % tiles
    last = tl.cast(program // fast // tiles, tl.int64)
    return (first, last, tile) if BATCH_FIRST else (last, first, tile)


@triton.jit
def load_tile(pointer, stride, rows, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows and COLUMNS columns from `first`, zero from row `rows` and column WIDTH on."""
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, stride, rows, first, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The opposite of `load_tile`."""
    row = tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * stride + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def multiply(x, y, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """x y in float32, of factors rounded to OPERAND, see `common.precision`."""
    if PRECISION == "rounded":
        return tl.dot(x.to(OPERAND).to(tl.float32), y.to(OPERAND).to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(x.to(OPERAND), y.to(OPERAND), input_precision=PRECISION)
