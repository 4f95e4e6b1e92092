"""Triton's kernel with the tile of the CUDA kernels, compiled ahead of time (tests/cuda/test_compiled.py)."""

from __future__ import annotations

from typing import Any


def compiled(dtype: str, tile: list[int]) -> dict[str, Any]:
    """Its PTX, and what it asks of the boxes that its host code describes to the driver."""
    from bench.aot.variants import Variant, compile_variant
    from softclip_kernels.backends.triton.shapes import TMA, Shape

    found = compile_variant(Variant("forward-persistent", "none", Shape(*tile, 8, 3, TMA), dtype=dtype), "sm_90")
    return {"ptx": found.asm["ptx"], "boxes": found.metadata.tensordesc_meta}
