# mypy: disallow-untyped-defs=False
"""What the kernels share: the order of tiles, the streamed matrix product, masks, the places and types of arguments.

Legend: a tile has BLOCK_M rows i and BLOCK_N columns j of the block of logits; products stream over the width in steps
of BLOCK_D. Row and column numbers are positions in the whole problem. Every index is widened to 64 bits before it meets
a stride; tests/backends/test_triton_aot.py proves it on the compiled code. Logits are in units of log 2, so an
exponential is exp2.

Beside every kernel stands ARGUMENTS, a table of its arguments' types, constants aside. It is what the kernels are
compiled with ahead of time, and the tests hold it against what a launch passes:

    *fp32 *i64 *i8           pointers as Triton names them; *fp32? may be None
    *student *teacher *grad  pointers to the dtype of the student's embeddings, of the teacher's, of G
    *previous                one to fp32, where several teachers add up, or to the dtype of G
    box rows, box columns    descriptors of the student's embeddings by boxes of a tile's rows or columns and a step
    box tile                 one of G by boxes of a tile
    i32                      an integer
    i32 stride, i32 width    one that is divisible by 16 in the usual case
    i32 step                 the stride along the width, 1 in the usual case and then a constant of the code
    i32 edge                 one that is always divisible by 16
"""

import triton
import triton.language as tl

from ...problem import Source
from ...stats import SCALARS

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Where a teacher's logits come from, within a tile.
NONE = tl.constexpr(-1)
EMBEDDINGS = tl.constexpr(int(Source.EMBEDDINGS))  # a matrix product of its own
LOGITS = tl.constexpr(int(Source.LOGITS))  # the student's own
TRANSPOSED = tl.constexpr(int(Source.TRANSPOSED))  # the student's of the mirror: tiles (I, J) and (J, I) in one program

# The places of `scalars` (fp32), a launch's numbers that are known on the device alone; passes.py fills them.
SCALE = tl.constexpr(0)  # z = product * SCALE
FACTOR = tl.constexpr(1)  # the same in units of log 2, as everything below
BOUND = tl.constexpr(2)  # no logit of the student's is larger in size
TEACHER_FACTOR = tl.constexpr(3)  # on the teacher's own product, with LOGITS and TRANSPOSED on the student's
TEACHER_BOUND = tl.constexpr(4)
TOP_ROW_BIAS = tl.constexpr(5)  # the largest bias of the teacher's
TOP_COLUMN_BIAS = tl.constexpr(6)
ALL_SCALARS = tl.constexpr(SCALARS)  # of which the last ones are 0, and without a teacher the teacher's

# The part of ARGUMENTS that all kernels with tiles have in common: embeddings, and how they lie in memory.
MATRICES = {"x": "*student", "y": "*student", "teacher_x": "*teacher", "teacher_y": "*teacher"}
LAYOUT = {
    "x_stride": "i32 stride",
    "x_step": "i32 step",
    "y_stride": "i32 stride",
    "y_step": "i32 step",
    "teacher_x_stride": "i32 stride",
    "teacher_x_step": "i32 step",
    "teacher_y_stride": "i32 stride",
    "teacher_y_step": "i32 step",
    "width": "i32 width",
    "teacher_width": "i32 width",
}
# Of those that work on a super-block: its rows and columns, and the edge of the scratch.
RANGES = {"row_start": "i32", "row_end": "i32", "column_start": "i32", "column_end": "i32"}
SUPER_BLOCK = {**RANGES, "edge": "i32 edge"}


@triton.jit
def grouped_tile(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile row and tile column of the index-th program: GROUP tile rows advance through the tile columns together, so
    that programs that run at the same time share their operands in L2."""
    width = GROUP * tiles_n
    first = index // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = index % width
    return first + inside % height, inside // height


@triton.jit
def relation(row_start, column_start, tile_m, tile_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile lies when tiles (I, J) and (J, I) are worked on together: negative, below the diagonal of the whole
    problem, done with its mirror; 0, on it, where the square of BLOCK_M is its own mirror; positive, with a mirror to
    do. BLOCK_M is a multiple of BLOCK_N, and only super-blocks on the diagonal have row_start == column_start."""
    return tl.where(row_start == column_start, tile_n * BLOCK_N // BLOCK_M - tile_m, 1)


@triton.jit
def product(
    a,
    b,
    i,
    j,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`a[i] @ b[j].T` (BLOCK_M, BLOCK_N), fp32; a and b are (pointer, stride of rows, stride along the width). EVEN:
    the width is a multiple of BLOCK_D, and needs no mask."""
    a_pointer, a_stride, a_step = a
    b_pointer, b_stride, b_step = b
    d = tl.arange(0, BLOCK_D)
    wide = d.to(tl.int64)
    a_tile = a_pointer + i.to(tl.int64)[:, None] * a_stride + wide[None, :] * a_step
    b_tile = b_pointer + j.to(tl.int64)[None, :] * b_stride + wide[:, None] * b_step
    a_advance = tl.full((), BLOCK_D, tl.int64) * a_step
    b_advance = tl.full((), BLOCK_D, tl.int64) * b_step
    # Without this triton 3.6's assembler, which sees zeros leave a loop of no steps, waits for each wgmma alone.
    tl.assume(width > 0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        if EVEN:
            left = tl.load(a_tile)
            right = tl.load(b_tile)
        else:
            left = tl.load(a_tile, mask=(d < width - start)[None, :], other=0.0)
            right = tl.load(b_tile, mask=(d < width - start)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_tile += a_advance
        b_tile += b_advance
    return total


@triton.jit
def sum_rows(tile):
    """`tl.sum(tile, 0)` of a product's tile, with its entries moved once instead of shuffled column by column.

    Of eight neighbouring rows each thread of a warp holds one, at many columns: the tree of shuffles that a plain sum
    becomes takes three for each of them, more than anything else of an epilogue. `split` wants its pair in one thread,
    so these eight come to one thread all at once, through shared memory, and what is left are additions. The order of
    the axes (rows 16 r + 8 h + g, columns 8 c + 2 q + p) lets them come by stmatrix and ldmatrix on sm_90.
    """
    ROWS: tl.constexpr = tile.shape[0] // 16
    COLUMNS: tl.constexpr = tile.shape[1] // 8
    part = tl.sum(tl.reshape(tile, (ROWS, 2, 8, tile.shape[1])), 1)  # (r, g, columns), from a thread's own entries
    part = tl.permute(tl.reshape(part, (ROWS, 8, COLUMNS, 4, 2)), (0, 2, 4, 3, 1))  # (r, c, p, q, g)
    part = tl.reshape(part, (ROWS, COLUMNS, 2, 4, 2, 2, 2))
    for _ in tl.static_range(3):
        even, odd = tl.split(part)
        part = even + odd
    return tl.reshape(tl.permute(tl.sum(part, 0), (0, 2, 1)), (tile.shape[1],))


@triton.jit
def positives(positive_column, index, inside, start, end, BLOCK: tl.constexpr):
    """The positives of the given rows as numbers within the tile's columns, which begin at `start`: (rows,) int32, -1
    where the positive is not in the tile. The same with rows and columns exchanged."""
    within = tl.load(positive_column + index, mask=inside, other=-1) - start
    here = (within >= 0) & (within < BLOCK) & (within < end - start)
    return tl.where(here, within, -1).to(tl.int32)


@triton.jit
def without_positives(tile, positive_column, index, inside, start, end, ALONG: tl.constexpr):
    """The tile with 0 at the positives of its rows, ALONG = 1, or of its columns, ALONG = 0."""
    place = positives(positive_column, index, inside, start, end, tile.shape[ALONG])
    if tl.max(place) >= 0:
        along = tl.expand_dims(tl.arange(0, tile.shape[ALONG]), 1 - ALONG)
        tile = tl.where(along == tl.expand_dims(place, ALONG), 0.0, tile)
    return tile


@triton.jit
def center(bound, HEADROOM: tl.constexpr):
    """The common reference of a problem whose logits are at most `bound`: HEADROOM below it, or 0 where none is needed.
    Subtracting a reference costs the digits that its size takes; at usual scales there is none to subtract."""
    return tl.maximum(bound - HEADROOM, 0.0)


@triton.jit
def exponents(scalars, HEADROOM: tl.constexpr, TIED: tl.constexpr):
    """What makes a product the exponent of a power of 2, `product * factor - reference`: the factor and the reference
    of the student's, then the teacher's, which are the same where it is TIED."""
    factor = tl.load(scalars + FACTOR)
    reference = center(tl.load(scalars + BOUND), HEADROOM)
    if TIED:
        teacher_factor = factor
        teacher_reference = reference
    else:
        teacher_factor = tl.load(scalars + TEACHER_FACTOR)
        teacher_reference = center(tl.load(scalars + TEACHER_BOUND), HEADROOM)
    return factor, reference, teacher_factor, teacher_reference


@triton.jit
def visible(at, segment_i, segment_j):
    """Which entries of the tile count (BLOCK_M, BLOCK_N): inside the block and, with segments, of equal segments. `at`:
    row positions, column positions, and which of each are inside."""
    i, j, inside_i, inside_j = at
    seen = inside_i[:, None] & inside_j[None, :]
    if segment_i is not None:
        of_i = tl.load(segment_i + i, mask=inside_i, other=0)
        of_j = tl.load(segment_j + j, mask=inside_j, other=0)
        seen = seen & (of_i[:, None] == of_j[None, :])
    return seen


@triton.jit
def store(pointers, tile, whole, mask):
    """Without a mask where the tile is whole: 16 bytes at a time instead of an entry."""
    tile = tile.to(pointers.dtype.element_ty)
    if whole:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=mask)
