"""Watches a pass, and makes of what it saw a Recording (replay.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from . import call
from .recording import Block, Recording, Step, box_on

MOST_LAUNCHES = 512  # of a pass; a larger problem's take the GPU longer than the host
VECTOR = 2**18  # bytes, up to which memory is shared with others
ALIGNED = 512  # as torch's allocator aligns
ALLOCATIONS = frozenset(["empty", "new_empty", "empty_like", "new_zeros"])
VIEWS = frozenset(["view", "select", "slice", "unbind", "expand", "detach", "alias", "as_strided", "unsqueeze", "t"])


@dataclass
class Allocation:
    """What an operator allocated: before which launch, and before which it was free again, if it was."""

    storage: StorageWeakRef
    pointer: int
    nbytes: int
    dtype: torch.dtype
    zeroed: bool
    born: int
    died: int | None = None


class Place(NamedTuple):
    """What an argument points to: of the given tensors, of the numbers or of the allocations (`of`) the number-th, at
    an offset in bytes; or, of "fixed", what `content` says. box: a descriptor of that memory instead of a pointer."""

    of: str
    number: int = 0
    offset: int = 0
    content: Any = None
    box: TensorDescriptor | None = None


class Recorder(TorchDispatchMode):
    """Notes allocations, and the launches of every Call and CudaCall of this thread."""

    def __init__(self, tensors: Sequence[Tensor | None], numbers: tuple[float, ...]) -> None:
        super().__init__()
        self.count, self.numbers, self.thread = len(tensors), numbers, threading.get_ident()
        self.tensors: dict[int, int] = {}  # by pointer
        for index, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                self.tensors.setdefault(tensor.data_ptr(), index)
        self.allocations: list[Allocation] = []
        self.launches: list[tuple[CompiledKernel, int, list[Place]]] = []
        self.interrupted = self.impossible = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name in ALLOCATIONS:
            self._free()
            storage, born = result.untyped_storage(), len(self.launches)
            size = storage.data_ptr(), storage.nbytes(), result.dtype
            self.allocations.append(Allocation(StorageWeakRef(storage), *size, name == "new_zeros", born))
        elif name not in VIEWS:
            self.impossible = True
        return result

    def _free(self) -> None:
        for allocation in self.allocations:
            if allocation.died is None and allocation.storage.expired():
                allocation.died = len(self.launches)

    def interrupt(self) -> None:
        """Something happens that the next pass of the kind will not need, such as a choice of tiles."""
        self.interrupted |= self.thread == threading.get_ident()

    def note(self, launched: call.Launched, programs: int) -> None:
        if self.thread != threading.get_ident() or self.impossible or self.interrupted:
            return
        self._free()
        assert launched.compiled is not None
        places = [self._place(value, at in launched.pointers) for at, value in enumerate(launched.plain)]
        self.launches.append((launched.compiled, programs, places))
        self.impossible |= len(self.launches) > MOST_LAUNCHES

    def _place(self, value: Any, points: bool) -> Place:
        if type(value) is float:
            same = [place for place, number in enumerate(self.numbers) if number is value]
            self.impossible |= not same
            return Place("numbers", *same[:1])
        if type(value) is TensorDescriptor:
            of = self._memory(value.base.data_ptr())
            self.impossible |= of.offset > 0
            return of._replace(box=box_on(value, None))
        return self._memory(value) if points and value else Place("fixed", content=value)

    def _memory(self, pointer: int) -> Place:
        if pointer in self.tensors:
            return Place("tensors", self.tensors[pointer])
        for number, allocation in enumerate(self.allocations):
            if allocation.died is None and 0 <= pointer - allocation.pointer < allocation.nbytes:
                return Place("allocations", number, pointer - allocation.pointer)
        self.impossible = True
        return Place("fixed")

    def recording(self, results: Sequence[Tensor | None]) -> Recording | None:
        """None where the pass cannot be replayed."""
        self._free()
        owners = [self._owner(result) for result in results]
        if self.impossible or not self.launches:
            return None
        values = Values(self)
        grouped = self._grouped({owner for owner in owners if owner is not None}, values)
        blocks = [
            self._block(group, values, results[owners.index(group[0])] if group[0] in owners else None)
            for group in grouped
        ]
        born = [min(self.allocations[each].born for each in group) for group in grouped]
        died = [max(self._end(each) for each in group) for group in grouped]
        steps = [
            Step(
                tuple(number for number, when in enumerate(born) if when == index),
                compiled,
                compiled.run,
                programs,
                _together([values.place(place) for place in places]),
                tuple(number for number, when in enumerate(died) if when == index + 1),
            )
            for index, (compiled, programs, places) in enumerate(self.launches)
        ]
        numbers = {group[0]: number for number, group in enumerate(grouped)}
        found = [
            None if result is None else _nothing(result) if owner is None else numbers[owner]
            for result, owner in zip(results, owners, strict=True)
        ]
        boxes = [(at, each.number, each.box) for at, each in values.changing if each.of == "tensors" and each.box]
        return Recording(values.fixed, tuple(boxes), tuple(blocks), tuple(steps), tuple(found))

    def _owner(self, result: Tensor | None) -> int | None:
        """The number of the allocation that is this result, whole."""
        if result is None or not result.numel():
            return None
        for number, allocation in enumerate(self.allocations):
            whole = allocation.pointer == result.data_ptr() and allocation.nbytes == result.nbytes
            if whole and allocation.died is None and allocation.born < len(self.launches) and result.is_contiguous():
                return number
        self.impossible = True
        return None

    def _end(self, number: int) -> int:
        """The launch before which an allocation was free again; beyond all of them where it was not."""
        died = self.allocations[number].died
        return len(self.launches) + 1 if died is None else died

    def _grouped(self, results: set[int], values: Values) -> list[list[int]]:
        """The allocations that launches use, by block. Few vectors share one, more share two, one of which is free
        before the last launch."""
        groups: dict[Hashable, list[int]] = {number: [number] for number in results}
        boxed = {each.number for _, each in values.changing if each.of == "allocations" and each.box}
        sizes = [self.allocations[each].nbytes for each in values.used - results]
        many = sum(size for size in sizes if size <= VECTOR) > VECTOR
        for number in sorted(values.used - results):
            allocation = self.allocations[number]
            alone = allocation.nbytes > VECTOR or allocation.zeroed or number in boxed
            group = number if alone else many and self._end(number) < len(self.launches)
            groups.setdefault(("alone", group) if alone else ("shared", group), []).append(number)
        return list(groups.values())

    def _block(self, group: list[int], values: Values, result: Tensor | None) -> Block:
        starts, length = {}, 0
        for number in group:
            starts[number] = length
            length += -(-self.allocations[number].nbytes // ALIGNED) * ALIGNED
        members, boxes = [], []
        for at, each in values.changing:
            if each.of != "allocations" or each.number not in starts:
                continue
            if each.box is None:
                members.append((at, starts[each.number] + each.offset))
            else:
                boxes.append((at, each.box))
        make = torch.zeros if self.allocations[group[0]].zeroed else torch.empty
        dtype = self.allocations[group[0]].dtype if boxes else torch.uint8
        size: tuple[int, ...] = (length // dtype.itemsize,)
        if result is not None:
            size, dtype = tuple(result.shape), result.dtype
        return Block(make, size, dtype, tuple(members), tuple(boxes))


class Values:
    """Where every argument of a recorded pass lies among a recording's values."""

    def __init__(self, recorder: Recorder) -> None:
        every = [each for *_, places in recorder.launches for each in places]
        self._starts = {"tensors": 0, "numbers": recorder.count}
        fixed = {_key(each): each.content for each in every if each.of == "fixed"}
        start = recorder.count + len(recorder.numbers)
        self._places = {key: start + at for at, key in enumerate(fixed)}
        start += len(fixed)
        changing = {_key(each): each for each in every if each.of == "allocations" or each.box is not None}
        self._places |= {key: start + at for at, key in enumerate(changing)}
        self.fixed = (*fixed.values(), *[None] * len(changing))
        self.changing = [(self._places[key], each) for key, each in changing.items()]
        self.used = {each.number for each in every if each.of == "allocations"}

    def place(self, each: Place) -> int:
        key = _key(each)
        return self._places[key] if key in self._places else self._starts[each.of] + each.number


def _key(each: Place) -> Hashable:
    return each.of, each.number, each.offset, type(each.content), each.content, id(each.box)


def _nothing(like: Tensor) -> Tensor:
    """A tensor of no entries that any mode may take."""
    with torch.inference_mode(False):
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _together(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes what lies at these places."""
    first, *others = places
    return itemgetter(first, *others) if others else lambda values: (values[first],)
