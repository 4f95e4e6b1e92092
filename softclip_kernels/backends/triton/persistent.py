# mypy: disallow-untyped-defs=False
"""Programs that stay: as many as run at once, each with many tiles of a super-block.

Boxes of the operands come, and boxes of G go, by tensor descriptors (TMA), so that no thread computes their addresses.
For plain rows (shapes.py), without a teacher.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .call import Call
from .shapes import Shape

BOXES = {"x": "box rows", "y": "box columns", "g": "box tile"}  # what a kernel takes by boxes, if it takes it


@triton.jit
def box_product(x, y, corner_i, corner_j, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile of `x @ y.T` at a corner, fp32, from descriptors of boxes (BLOCK_M, BLOCK_D) and (BLOCK_N, BLOCK_D),
    which read zeros beyond the end."""
    tl.assume(width > 0)  # as in `product` of tiles.py
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, width, BLOCK_D):
        dot = tl.dot(x.load([corner_i, d]), y.load([corner_j, d]).T, dot)
    # Always true, and gone from the machine code: the product is waited for here. In the branch that takes it first,
    # triton 3.6's assembler would have each wgmma wait for the one before.
    return tl.where(tl.num_programs(0) > 0, dot, 0.0)


def box(kind: str, shape: Shape) -> list[int]:
    """Of a kind as the tables of arguments name it (tiles.py)."""
    return {
        "box rows": [shape.block_m, shape.block_d],
        "box columns": [shape.block_n, shape.block_d],
        "box tile": [shape.block_m, shape.block_n],
    }[kind]


def together(shape: Shape) -> int:
    """How many programs share a multiprocessor, as far as registers go."""
    return 8 // shape.warps


def flat(shape: Shape) -> bool:
    """Whether the kernel is one loop over the steps of all tiles, which loads the next tile's boxes during this one's
    epilogue. That keeps the stages of loads while sums, or a tile of G, pass through shared memory: more than half of
    it. A program with a neighbour leaves it to that to keep the multiprocessor busy."""
    return together(shape) == 1


class PersistentCall:
    """A `Call` of such a kernel for a number of tiles, by no more programs than run at once on a GPU of so many
    processors."""

    def __init__(self, kernel: Any, arguments: dict[str, Any], shape: Shape, processors: int) -> None:
        self.most = together(shape) * processors
        boxes = {
            name: TensorDescriptor.from_tensor(arguments[name], box(kind, shape))
            for name, kind in BOXES.items()
            if name in arguments
        }
        self.call = Call(kernel, arguments | boxes | {"FLATTEN": flat(shape)}, shape.options())

    def __call__(self, programs: int, **changing: Any) -> None:
        self.call(min(programs, self.most), **changing)
