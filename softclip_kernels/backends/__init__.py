"""The backends behind the two block operations, and the choice between them.

A backend is one module that calls `register` with an object of the `Backend` protocol. Preference is the order of
registration: `auto` takes the first whose `why_not(problem)` is None.
"""

from __future__ import annotations

import logging
from typing import Protocol

from torch import Tensor

from ..problem import Problem, Statistics

logger = logging.getLogger("softclip_kernels")


class Backend(Protocol):
    """The two block operations.

    `forward` returns Statistics. `backward` returns the products `G @ y` (N, D) and `G.T @ x` (M, D) in the
    accumulation dtype, contiguous and newly allocated, for

        G_ij = grad_rows[0, i] * softmax_j(z)_ij + grad_columns[0, j] * softmax_i(z)_ij
               + sum_k grad_rows[1 + k, i]    * softmax_j(t_k + column_bias_k)_ij
               + sum_k grad_columns[1 + k, j] * softmax_i(t_k + row_bias_k)_ij

    with G_ij = 0 at every row's positive (the caller adds that entry in full precision) and at excluded pairs. The
    softmaxes come from `statistics`, which may stem from a larger problem than this block. `grad_rows` is (1 + K, N)
    and `grad_columns` (1 + K, M), accumulation dtype, contiguous. The scale's own factor is the caller's.
    """

    name: str

    def why_not(self, problem: Problem) -> str | None:
        """None when this backend can compute the problem, otherwise the reason in a sentence."""

    def details(self) -> dict[str, str]:
        """What `python -m softclip_kernels.info` says of it beyond its name; safe where it cannot run."""

    def forward(self, problem: Problem) -> Statistics: ...

    def backward(
        self, problem: Problem, statistics: Statistics, grad_rows: Tensor, grad_columns: Tensor
    ) -> tuple[Tensor, Tensor]: ...


_registry: dict[str, Backend] = {}
_announced: set[tuple[str, str]] = set()


def register(backend: Backend) -> None:
    _registry[backend.name] = backend


def registered() -> dict[str, Backend]:
    """Name to backend, most preferred first."""
    return dict(_registry)


def check_name(name: str) -> None:
    if name != "auto" and name not in _registry:
        raise ValueError(f"backend={name!r} is not known; allowed: 'auto', {', '.join(map(repr, _registry))}")


def select(name: str, problem: Problem) -> Backend:
    """The backend to use. A backend asked for by name that cannot run raises RuntimeError saying why; `auto` takes the
    first that can, and logs each distinct choice once with the reasons against those it passed over."""
    check_name(name)
    if name != "auto":
        reason = _registry[name].why_not(problem)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot compute this: {reason}; backend='auto' picks one that can")
        return _registry[name]
    passed_over: list[str] = []
    for backend in _registry.values():
        reason = backend.why_not(problem)
        if reason is None:
            _announce(backend.name, passed_over)
            return backend
        passed_over.append(f"{backend.name}: {reason}")
    raise RuntimeError("no backend can compute this: " + "; ".join(passed_over))


def _announce(name: str, passed_over: list[str]) -> None:
    why = "; ".join(passed_over) or "first choice"
    if (name, why) not in _announced:
        _announced.add((name, why))
        logger.info("backend %s chosen (%s)", name, why)


from . import chunked, native, reference, triton  # noqa: E402  registration, in order of preference

register(triton.TritonBackend())
register(native.NativeBackend())
register(chunked.ChunkedBackend())
register(reference.ReferenceBackend())
