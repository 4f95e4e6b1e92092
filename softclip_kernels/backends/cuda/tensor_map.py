"""How the tensor memory accelerator (TMA) finds a matrix."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64

import torch
from torch import Tensor

from .driver import Driver, driver

# Of cuda.h: CU_TENSOR_MAP_...
DTYPES = {torch.float16: 6, torch.bfloat16: 9}  # DATA_TYPE_FLOAT16, DATA_TYPE_BFLOAT16
INTERLEAVE_NONE = 0
SWIZZLE_128B = 3
L2_PROMOTION_256B = 3  # L2_PROMOTION_L2_256B
FILL_ZERO = 0  # FLOAT_OOB_FILL_NONE

SWIZZLE_BYTES = 128  # the most that a row of a box has
MOST_BOX_ROWS = 256
MOST_SIZE = 2**32
MOST_STRIDE = 2**40  # bytes; less than this


class TensorMap:
    """A matrix of 16-bit elements, to be read and written in boxes of `box` = (rows, columns).

    In shared memory a box is row after row, each of 2 · columns bytes, with the swizzle of 128 bytes. What a box has
    beyond the matrix is read as 0 and not written. A kernel takes the map by value, as a `const __grid_constant__`
    parameter of 128 bytes aligned to 64.
    """

    BYTES = 128

    def __init__(self, box: tuple[int, int], using: Driver | None = None) -> None:
        rows, columns = box
        if not 1 <= rows <= MOST_BOX_ROWS:
            raise ValueError(f"a box of {rows} rows; TMA takes 1 to {MOST_BOX_ROWS}")
        if columns < 1 or columns % 8 or 2 * columns > SWIZZLE_BYTES:
            raise ValueError(f"a box of {columns} columns; with this swizzle TMA takes multiples of 8 up to 64")
        self._driver = using or driver()
        self._memory = (c_uint64 * (2 * self.BYTES // 8))()
        start = ctypes.addressof(self._memory)
        self.address = start + -start % self.BYTES  # cuda.h asks for 64 bytes, from CUDA 13 on for 128
        self._sizes, self._strides = (c_uint64 * 2)(), (c_uint64 * 1)()
        box_sizes, steps = (c_uint32 * 2)(columns, rows), (c_uint32 * 2)(1, 1)
        self._fixed = (
            *(self._sizes, self._strides, box_sizes, steps),
            *(INTERLEAVE_NONE, SWIZZLE_128B, L2_PROMOTION_256B, FILL_ZERO),
        )
        self._entry = self._driver.entries["cuTensorMapEncodeTiled"]

    @classmethod
    def of(cls, matrix: Tensor, box: tuple[int, int], using: Driver | None = None) -> TensorMap:
        """matrix: (rows, columns), as `encode` takes it."""
        result = cls(box, using)
        result.encode(matrix)
        return result

    def encode(self, matrix: Tensor) -> None:
        """Of this matrix from now on; launches that were made before are not affected.

        matrix: (rows, columns) in bfloat16 or float16, elements of a row next to each other, rows apart by a multiple
        of 16 bytes and not overlapping, the first one at a multiple of 16 bytes. Raises ValueError otherwise,
        DriverError where the driver refuses.
        """
        address, shape, dtype = matrix.data_ptr(), matrix.shape, DTYPES.get(matrix.dtype)
        if dtype is None:
            raise ValueError(f"a matrix of {matrix.dtype}; these kernels read bfloat16 and float16")
        if len(shape) != 2 or not 0 < shape[0] <= MOST_SIZE or not 0 < shape[1] <= MOST_SIZE:
            raise ValueError(f"a matrix of shape {tuple(shape)}; TMA takes two sizes of 1 to {MOST_SIZE}")
        if address % 16:
            raise ValueError(f"a matrix at address {address:#x}; TMA takes multiples of 16 bytes")
        rows, columns = shape
        self._sizes[0], self._sizes[1] = columns, rows
        self._strides[0] = _stride_bytes(rows, columns, *matrix.stride())
        self._dtype = dtype
        self._encode(address)

    def move(self, address: int) -> None:
        """The same of a matrix that lies elsewhere, at a multiple of 16."""
        if address != self._matrix:
            self._encode(address)

    def _encode(self, address: int) -> None:
        code = self._entry(self.address, self._dtype, 2, address, *self._fixed)
        if code:
            raise self._driver.error("cuTensorMapEncodeTiled", code)
        self._matrix = address


def _stride_bytes(rows: int, columns: int, row_stride: int, step: int) -> int:
    """From row to row. Raises ValueError where TMA cannot follow these strides."""
    if step != 1 and columns > 1:
        raise ValueError(f"a matrix with elements {step} apart along its rows; TMA takes contiguous rows")
    if rows == 1:  # how far the next row would be is of no account
        return (2 * columns + 15) // 16 * 16
    stride = 2 * row_stride
    if stride % 16 or not 2 * columns <= stride < MOST_STRIDE:
        raise ValueError(
            f"a matrix with rows {stride} bytes apart; TMA takes multiples of 16 from the {2 * columns} bytes of a row "
            "up to 2^40"
        )
    return stride
