"""Gradients averaged over ranks, where no framework does it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from . import agreement
from .exchange import Exchange
from .failures import in_phase, wait

BUCKET = 32 * 2**20  # bytes of gradients that are flattened into one all-reduce


class Averaging:
    """Of the gradients of `parameters`, by name, which are the same on every rank of the exchange (agreed on here,
    with `check`, which raises on every rank if it does on one)."""

    def __init__(self, parameters: dict[str, nn.Parameter], exchange: Exchange, check: Callable[[], None]) -> None:
        self.parameters, self.exchange = list(parameters.values()), exchange

        def describe(_: None) -> str:
            kinds = [(name, tuple(parameter.shape), str(parameter.dtype)) for name, parameter in parameters.items()]
            elements = sum(parameter.numel() for parameter in self.parameters)
            return f"{len(kinds)} trained parameters of {elements} elements (digest {zlib.crc32(repr(kinds).encode())})"

        agreement.agree_on_text(exchange, "agreement on parameters", check, describe)

    def run(self, second_pass: Callable[[], None]) -> None:
        """What `second_pass` accumulates, averaged over ranks; what was accumulated before is left as it is. If it
        raises on one rank, every rank raises, and nothing is averaged."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            _, digests = agreement.agree(self.exchange, "second pass", second_pass, lambda _: [self._present()[1]])
            self._average(alike=len({digest for (digest,) in digests}) == 1)
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, before, strict=True):
                    if old is not None:
                        parameter.grad = old if parameter.grad is None else old.add_(parameter.grad)

    def _present(self) -> tuple[torch.Tensor, int]:
        """Which parameters have a gradient on this rank, and a digest of it."""
        present = torch.tensor([parameter.grad is not None for parameter in self.parameters], dtype=torch.uint8)
        return present, zlib.crc32(bytes(present.tolist()))

    @torch.no_grad()
    def _average(self, alike: bool) -> None:
        """Every rank walks the same list in the same order: of parameters with a gradient on any rank. On a rank that
        has none of such a parameter it counts as zero."""
        present, _ = self._present()
        if not alike:
            present = agreement.all_gather(present, "agreement on gradients", self.exchange).amax(0)
        some = [parameter for parameter, here in zip(self.parameters, present.tolist(), strict=True) if here]
        for bucket in _buckets(some):
            gradients = []
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
            # A large gradient has a bucket of its own, and is reduced where it lies.
            flat = gradients[0].reshape(-1) if len(bucket) == 1 else torch.cat([each.reshape(-1) for each in gradients])
            flat /= dist.get_world_size(self.exchange.group)  # before the sum, which might overflow float16
            with in_phase("averaging of gradients", self.exchange):
                work = dist.all_reduce(flat, group=self.exchange.group, async_op=True)
                wait(work, self.exchange, flat.device, last=bucket[-1] is some[-1])
            for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and device, of BUCKET bytes at most unless there is only one."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        kinds = {(each.dtype, each.device) for each in (*bucket, parameter)}
        if bucket and (size + bytes_ > BUCKET or len(kinds) > 1):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket
