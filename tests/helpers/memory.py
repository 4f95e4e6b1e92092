"""Peak resident memory of a loss, measured in an interpreter of its own.

The measure is the benchmarks' own. ru_maxrss would not do: a process inherits it over fork and exec, so a child of a
grown test process sees no growth. VmHWM belongs to the address space, which is new at exec.
"""

from __future__ import annotations

from typing import Any

from bench.memory import AT_ONCE, growth

from . import interpreter


def in_a_new_process(function: str, *arguments: Any, plant: str = "", allocator: dict[str, str] = AT_ONCE) -> Any:
    """interpreter.result_of a function of this module."""
    return interpreter.result_of("helpers.memory", function, *arguments, plant=plant, **allocator)


def loss_growth(
    backend: str, cases: list[tuple[str, str]], sizes: list[int], width: int, threads: int
) -> dict[str, list[int]]:
    """The growth, in bytes, of a loss's forward and backward pass beyond its inputs: "target dtype" to one for each N.
    `cases` are pairs of a name of conftest.ALL_TARGETS and a dtype."""
    import torch

    from softclip_kernels import softclip_loss
    from softclip_kernels.testing import ALL_TARGETS

    torch.set_num_threads(threads)

    def measure(name: str, dtype: str, n: int) -> int:
        x, y = (torch.nn.functional.normalize(torch.randn(n, width)).to(getattr(torch, dtype)) for _ in range(2))
        target, scale = ALL_TARGETS[name](n, n), torch.tensor(14.3, requires_grad=True)
        x.requires_grad_(), y.requires_grad_()
        return growth(lambda: softclip_loss(x, y, scale, target, backend=backend).backward())

    for name, dtype in cases:
        measure(name, dtype, sizes[0])  # libraries load, and workspaces that stay have been made
    return {f"{name} {dtype}": [measure(name, dtype, n) for n in sizes] for name, dtype in cases}
