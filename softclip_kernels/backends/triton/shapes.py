"""Tile shapes: a short list of candidates for every kind of kernel, architecture and element size.

Each compiles within the shared memory of its architecture and without spills, save those that SPILLED allows
(tests/backends/test_triton_aot.py). Which is fastest only a GPU can tell, and is asked (tuning.py); the first is the
guess.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

TIMED = ("forward", "backward", "products")  # kinds of kernel with candidates that the clock chooses from
SM90_ARCHITECTURE = "sm_90"
ARCHITECTURES = ("interpreter", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
GROUP = 8  # tile rows that advance together, for L2
LIBRARY = "library"  # the way of a product that torch makes
# Ways to a block of G with a teacher, beside a program that holds both products of a tile:
EXCHANGE = "exchange"  # transposed: each of the mirrored tiles by itself, what it brings to the other by scratch
SPLIT = "split"  # embeddings: the student's part, then the teacher's added to it
PAIR = "pair"  # the way of a forward pass, transposed: as the others, both tiles in one program, but larger
TMA = "tma"  # the way of a pass without a teacher whose programs stay and take boxes of the operands (persistent.py)
SM90 = "sm90"  # the way of a pass by the CUDA C++ kernels for Hopper (sm90.py), beside Triton's candidates
# Bytes that a thread may spill: little beside what larger tiles save, and whether it pays the clock tells. Else none.
SPILLED = {EXCHANGE: 512, SPLIT: 256, PAIR: 96}
SPILLED_WITH_BIASES = 96  # of every way's, beside a teacher's biases
UNBIASED = frozenset({PAIR, SPLIT})  # ways that spill more than that with them, and are left out


class Shape(NamedTuple):
    """Tile (block_m, block_n), the product's step along the width, warps and pipeline stages; `way`: of several ways to
    compute the same, "" where there is one."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    way: str = ""

    @property
    def name(self) -> str:
        """Such as 128x256x64w8s3, the way after a dash."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_d}w{self.warps}s{self.stages}"
        return f"{tile}-{self.way}" if self.way else tile

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_D": self.block_d}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# The CUDA kernels' tiles, with one product and with two; of stages at least so many.
SM90_SHAPE, SM90_PAIR = Shape(128, 128, 64, 12, 9, SM90), Shape(128, 64, 64, 12, 5, SM90)


@functools.cache
def candidates(kind: str, mode: str, plain: bool, itemsize: int, architecture: str) -> tuple[Shape, ...]:
    """Triton's.

    kind          forward, online or backward
    mode          where a teacher's logits come from: none, logits, embeddings, or transposed, where tiles (I, J) and
                  (J, I) are worked on together and block_m is a multiple of block_n, unless they are exchanged
    plain         no segments or ranks, and rows in whole steps of 16 bytes: masks take registers
    itemsize      bytes of the widest operand
    architecture  sm_90, gfx942, interpreter, ...
    """
    taught, mirrored = mode != "none", mode == "transposed"  # a teacher's tile is alive beside the student's
    if architecture == "interpreter":  # small, so that small problems have inner, edge and corner tiles
        usual = Shape(64, 32, 32, 4, 1) if mirrored else Shape(32, 64, 32, 4, 1)
        other = Shape(64, 64, 32, 4, 1) if mirrored and kind == "forward" else Shape(32, 64, 32, 4, 1)
        return (usual, *(other._replace(way=way) for way in _other_ways(kind, mode, plain)))
    amd = architecture.startswith("gfx")
    stages = 2 if amd else 3
    warps = 4 if amd else 8
    if itemsize > 2:
        # A tile too small for its warps is no error: some of them compute what others do. The count of exponentials in
        # the machine code shows it.
        if amd:
            return (Shape(64, 64, 32, 4, 2),) if taught else (Shape(128, 64, 32, 8, 2),)
        if architecture == "sm_80" and kind != "online":
            return (Shape(128, 32 if taught else 64, 32, 8, 2),)
        return (Shape(64, 32 if taught or kind == "online" else 64, 32, 8, 2),)
    if kind == "online":  # rarely reached
        return (Shape(64, 32, 64, warps, 2),)
    small, medium, large = (Shape(128, width, 64, 8, stages) for width in (64, 128, 256))
    shared = Shape(128, 128, 64, 4, 3)  # two programs of a multiprocessor
    if architecture == "sm_90" and not mirrored:
        if not plain:
            return (Shape(64, 64, 64, 8, 3),) if taught else (small,)
        deep = (medium if taught else large)._replace(stages=4)
        if taught:
            return medium, deep, small, *(large._replace(way=way) for way in _other_ways(kind, mode, plain))
        tall = (Shape(256, 128, 64, 8, 3),) if kind == "forward" else ()
        persistent = (shape._replace(way=way) for way in _other_ways(kind, mode, plain) for shape in (large, shared))
        return large, deep, *tall, shared, medium, *persistent
    if plain and taught and architecture == "sm_120":
        return (Shape(64, 64, 64, 8, stages),)
    if plain and not (mirrored and architecture == "sm_100"):
        if taught:
            ways = _other_ways(kind, mode, plain) if architecture == "sm_90" else ()
            return small, *(medium._replace(way=way) for way in ways)
        # On sm_100 a larger tile of programs that stay spills, and a flat loop (persistent.py) has its epilogue twice.
        return medium, small, *((shared._replace(way=TMA),) if architecture == "sm_100" else ())
    return (Shape(64, 32, 64, 4 if (kind, architecture) == ("backward", "sm_100") else warps, stages),)


_OTHER_WAYS = {
    ("forward", "none"): (TMA,),
    ("forward", "transposed"): (PAIR,),
    ("backward", "none"): (TMA,),
    ("backward", "transposed"): (EXCHANGE,),
    ("backward", "embeddings"): (SPLIT,),
}


def _other_ways(kind: str, mode: str, plain: bool) -> tuple[str, ...]:
    ways = _OTHER_WAYS.get((kind, mode), ())
    return tuple(way for way in ways if plain or way in (EXCHANGE, SPLIT))


@functools.cache
def product_candidates(plain: bool, itemsize: int, architecture: str) -> tuple[Shape, ...]:
    """For the products with G, of which block_d steps along the sum; the arguments as in `candidates`. Torch's own is
    among them: the only one for fp32, whose settings it follows, and for rows that do not stream."""
    library = Shape(128, 128, 64, 8, 3, LIBRARY)
    if architecture == "interpreter":
        return Shape(32, 32, 32, 4, 1), library
    if itemsize > 2 or not plain:
        return (library,)
    stages = 2 if architecture.startswith("gfx") or architecture == "sm_120" else 3
    medium = Shape(128, 128, 64, 8, stages)
    if architecture in ("sm_90", "sm_100"):
        large = medium._replace(block_n=256)
        return large, large._replace(stages=4), medium, library
    return medium, library


@functools.cache
def every_name(architecture: str) -> frozenset[str]:
    """Of every candidate that the clock may choose, for whatever problem, the CUDA kernels' way as a name too."""
    found: set[Shape] = {SM90_SHAPE, SM90_PAIR} if architecture == SM90_ARCHITECTURE else set()
    for plain, itemsize in itertools.product((True, False), (2, 4)):
        found.update(product_candidates(plain, itemsize, architecture))
        for kind, mode in itertools.product(("forward", "backward"), ("none", "logits", "embeddings", "transposed")):
            found.update(candidates(kind, mode, plain, itemsize, architecture))
    return frozenset(shape.name for shape in found) | ({SM90} if SM90_SHAPE in found else frozenset())
