"""Memory of what PyTorch allocates, counted rather than measured: it works on the meta device, where nothing is."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The most bytes of storage that were alive at once, of tensors that operators returned, the operands' aside."""

    def __init__(self, *operands):
        super().__init__()
        self.operands = {operand.untyped_storage()._cdata for operand in operands}
        self.tensors, self.most = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor):
            self.tensors = [each for each in self.tensors if each() is not None] + [weakref.ref(result)]
            storages = [tensor.untyped_storage() for tensor in (each() for each in self.tensors) if tensor is not None]
            sizes = {s._cdata: s.nbytes() for s in storages if s._cdata not in self.operands}
            self.most = max(self.most, sum(sizes.values()))
        return result
