"""One forward and backward pass, for tools that look at a whole process:

python -m bench.gpu_tools.once LOSS DTYPE N D DEVICE [small-super-blocks]
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import torch

from softclip_kernels.testing import Result

from ..problems import Case

SMALL = "small-super-blocks"


@contextlib.contextmanager
def small_super_blocks() -> Iterator[None]:
    """Within, super-blocks of both passes are as small as tiles allow: small problems have several, as large ones."""
    from softclip_kernels.backends.triton import edges, launch  # triton may be missing where this is imported

    with mock.patch.object(edges, "most", return_value=0), mock.patch.object(launch, "SCRATCH", 0):
        yield


def main(arguments: Sequence[str]) -> None:
    loss, dtype, n, d, device, *options = arguments
    case = Case(loss, getattr(torch, dtype), int(n), int(d), device)
    with small_super_blocks() if SMALL in options else contextlib.nullcontext():
        result = Result.of(case.fused("triton"), *(leaf.detach() for leaf in case.operands()))
    print(f"loss {result.loss.item():.6g}")


if __name__ == "__main__":
    main(sys.argv[1:])
