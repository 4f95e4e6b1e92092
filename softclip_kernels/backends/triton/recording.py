"""What is kept of a pass, to launch it again (replay.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Block:
    """Memory that is allocated and freed at once.

    make     torch.empty or torch.zeros, of `size` and `dtype`
    members  places of values, and how many bytes from the start the memory lies that each points to
    boxes    places of descriptors of it, and what they are but for the memory
    """

    make: Callable[..., Tensor]
    size: tuple[int, ...]
    dtype: torch.dtype
    members: tuple[tuple[int, int], ...]
    boxes: tuple[tuple[int, TensorDescriptor], ...]


@dataclass(frozen=True)
class Step:
    """A launch: blocks that are allocated before it, a kernel and its launcher, its arguments out of all values, blocks
    that are freed after it."""

    begin: tuple[int, ...]
    compiled: CompiledKernel
    run: Callable[..., object]
    programs: int
    arguments: Callable[[Sequence[Any]], tuple[Any, ...]]
    end: tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """What a kind of pass does. Arguments are taken from its values: the tensors' pointers, the numbers, `fixed` ones,
    and after them pointers to blocks, and descriptors.

    boxes    places of descriptors of given tensors, whose they are, and what they are but for the memory
    results  a block's number, a tensor of no entries, or None
    """

    fixed: tuple[Any, ...]
    boxes: tuple[tuple[int, int, TensorDescriptor], ...]
    blocks: tuple[Block, ...]
    steps: tuple[Step, ...]
    results: tuple[int | Tensor | None, ...]

    def follow(
        self, tensors: Sequence[Tensor | None], pointers: Sequence[int], numbers: tuple[float, ...]
    ) -> list[Tensor | None]:
        first = tensors[0]
        assert first is not None
        device, watched = first.device, _launches_are_watched()
        values: list[Any] = [*pointers, *numbers, *self.fixed]
        for place, owner, box in self.boxes:
            values[place] = box_on(box, tensors[owner])
        stream = driver.active.get_current_stream(max(first.get_device(), 0))
        memory: list[Tensor | None] = [None] * len(self.blocks)
        allocated: Tensor | None = None
        for step in self.steps:
            for number in step.begin:
                block = self.blocks[number]
                memory[number] = allocated = block.make(block.size, dtype=block.dtype, device=device)
                pointer = allocated.data_ptr()
                for place, offset in block.members:
                    values[place] = pointer + offset
                for place, box in block.boxes:
                    values[place] = box_on(box, allocated)
            allocated = None
            if watched:
                step.compiled[(step.programs, 1, 1)](*step.arguments(values), stream=stream)
            else:  # what that comes to: nine arguments of the launcher's own, without hooks (triton 3.4 to 3.9)
                kernel = step.compiled
                own = (step.programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None)
                step.run(*own, *step.arguments(values))
            for number in step.end:
                memory[number] = None
                for place, _ in self.blocks[number].boxes:
                    values[place] = None
        return [result if result is None or isinstance(result, Tensor) else memory[result] for result in self.results]


def _launches_are_watched() -> bool:
    """Whether somebody has hooks, as profilers have: a function, or from triton 3.5 on a chain of them."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def box_on(box: TensorDescriptor, tensor: Tensor | None) -> TensorDescriptor:
    box = copy.copy(box)
    box.base = tensor
    return box
