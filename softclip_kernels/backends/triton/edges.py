"""How long the edge of a super-block of the backward pass is: by a model of the time that its launches take.

A super-block is two launches, the one that fills G and the one of the products with it. A launch runs its tiles in
waves, one tile on each multiprocessor, and a wave that is not full takes as long as one that is. So the longest edge
that the memory holds is not always the best: with a width of 512, products of an edge of 3456 have 108 tiles of 128 x
256 for 132 multiprocessors, and the next edge may leave a narrow range of rows over.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

from .call import ceil_div
from .shapes import Shape

# What the two ends of a tile cost, in entries along its sum: the first loads, the sums read and written, the launch.
# Estimated from the code, not measured; a larger one favours longer edges.
ENDS = 512
# What an entry costs that streams in along the side of a tile, in products: by others on an H100, tiles of 128 x 256
# without multicast reach 0.84 of the largest products' rate, and L2 feeds tiles of 128 x 128 at 0.63 of it.
STREAM = 100
# MiB that the backward pass takes beyond operands and gradients, where it can be. An edge of 8192 is a fifth faster
# than what 64 MiB hold (docs/triton.md), to which SOFTCLIP_GPU_MIB=64 goes back.
MIB, VARIABLE = 384, "SOFTCLIP_GPU_MIB"


def most() -> int:
    """Bytes for matrices: a MiB less than the limit, for the vectors of several teachers. Raises ValueError where the
    variable is no number of MiB."""
    value = os.environ.get(VARIABLE, "") or str(MIB)
    if not value.isdecimal() or int(value) < 2:
        raise ValueError(f"{VARIABLE}={value!r}; allowed: a number of MiB from 2 on, or '' for {MIB}")
    return (int(value) - 1) * 2**20


def memory_for_scratch(kept: int, last: int) -> int:
    """The bytes that a super-block may take. kept: how much larger the sums that are whole are than the gradients that
    they become. last: of the gradient that is rounded last, and allocated when the scratch is free again: a scratch as
    large as that raises no peak."""
    return min(max(most() - kept, last), most())


class Work(NamedTuple):
    """What the backward pass of a problem computes, as far as the edge depends on it.

    rows, columns, width   N, M and D
    g_width      the width of all matrix products of an entry of G: D, 2 D for an entry and its mirror's, D + E, ...
    products     with each block of G: 1 or 2
    mirrored     super-blocks beside the diagonal come with their mirror
    entry_bytes  of memory for every entry of a super-block
    row_bytes    of memory for every row of a super-block
    """

    rows: int
    columns: int
    width: int
    g_width: int
    products: int
    mirrored: bool
    entry_bytes: int
    row_bytes: int

    def memory(self, edge: int) -> int:
        return edge * (edge * self.entry_bytes + self.row_bytes)


@functools.cache
def best_edge(
    work: Work, g_shapes: tuple[Shape, ...], product_shapes: tuple[Shape, ...], processors: int, memory: int
) -> int:
    """In whole tiles of every shape, within `memory` bytes unless a single tile is more; of edges that are as good the
    longest. The shapes are the candidates for the two launches."""
    step = max(max(shape.block_m, shape.block_n) for shape in g_shapes)
    step = max(step, *(shape.block_m for shape in product_shapes))
    longest = ceil_div(max(work.rows, work.columns), step) * step
    edges = [edge for edge in range(step, longest + 1, step) if work.memory(edge) <= memory] or [step]
    return min(reversed(edges), key=lambda edge: modelled_time(work, edge, g_shapes, product_shapes, processors))


def modelled_time(
    work: Work, edge: int, g_shapes: Sequence[Shape], product_shapes: Sequence[Shape], processors: int
) -> int:
    """Of all super-blocks, those at the ends taken as whole, each launch with the shape that suits it best. In products
    of two numbers on one multiprocessor."""

    def launch(shapes: Sequence[Shape], height: int, width: int, depth: int) -> int:
        times = []
        for shape in shapes:
            tiles = ceil_div(height, shape.block_m) * ceil_div(width, shape.block_n)
            step = max(shape.block_m * shape.block_n, STREAM * (shape.block_m + shape.block_n))
            times.append(ceil_div(tiles, processors) * step * (depth + ENDS))
        return min(times)

    def super_block(g_height: int, products: int) -> int:
        g = launch(g_shapes, g_height, edge, work.g_width)
        return g + launch(product_shapes, products * edge, work.width, edge)

    rows, columns = ceil_div(work.rows, edge), ceil_div(work.columns, edge)
    if not work.mirrored:
        return rows * columns * super_block(edge, work.products)
    beside = rows * (rows - 1) // 2
    return beside * super_block(edge, 2 * work.products) + rows * super_block(edge // 2, work.products)
