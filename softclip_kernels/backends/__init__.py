"""The backends behind the two block operations, and the choice between them.

A backend is one module that calls `register` with an object of the `Backend` protocol. Preference is the order of
registration: `auto` takes the first whose `why_not(problem)` is None.
"""

from __future__ import annotations

import logging
import warnings
from typing import Protocol

from ..problem import Problem
from ..stats import InputGradients, Statistics, StatisticsGradient, Wanted

logger = logging.getLogger("softclip_kernels")


class SlowerBackendWarning(RuntimeWarning):
    """`auto` computes with a slower backend than this kind of device has kernels for. Shown once a process for each
    reason; naming the backend, or a filter of the `warnings` module for this class, says that it is meant."""


class Backend(Protocol):
    """The two block operations.

    `forward` returns Statistics; with `keep` a backward pass of the same problem follows, and what saves it work may be
    in Statistics.kept. `backward` returns the gradients that are wanted, contiguous and newly allocated,

        dx = scale * G @ y,   dy = scale * G.T @ x,   dscale = (x * (G @ y)).sum()

    for

        G_ij = gradient.rows[0, i] * softmax_j(z)_ij + gradient.columns[0, j] * softmax_i(z)_ij
               + sum_k gradient.rows[1 + k, i]    * softmax_j(t_k + column_bias_k)_ij
               + sum_k gradient.columns[1 + k, j] * softmax_i(t_k + row_bias_k)_ij

    plus gradient.positive_logit at every row's positive. G is 0 at excluded pairs. The softmaxes come from
    `statistics`, which may stem from a larger problem than this block. A product that no wanted gradient takes is not
    made. Kernels of low precision leave the positives' entries of G out, and finish.py adds them in full precision.

    A backend whose kernels take linear forms (linear_form.py) has operations more, which are then called in the place
    of a dozen operators of PyTorch:

        reduced(problem, statistics, forms, shares)                    the sum of the losses times their shares, 0-d, or
                                                                       None where it leaves that to PyTorch
        forward_and_loss(problem, forms, shares)                       forward and reduced at once, or None; it may have
                                                                       none
        backward_of_reduced(problem, statistics, gradient, wanted)     backward, of a ReducedGradient
    """

    name: str
    device: str | None  # the type of device that its kernels are for; None: any, in plain PyTorch

    def why_not(self, problem: Problem) -> str | None:
        """None when this backend can compute the problem, otherwise the reason in a sentence."""

    def details(self) -> dict[str, str]:
        """What `python -m softclip_kernels.info` says of it beyond its name; safe where it cannot run."""

    def forward(self, problem: Problem, keep: bool = False) -> Statistics: ...

    def backward(
        self,
        problem: Problem,
        statistics: Statistics,
        gradient: StatisticsGradient,
        wanted: Wanted,
    ) -> InputGradients: ...


RENAMED = {"native": "cpu"}  # former names that still work

_registry: dict[str, Backend] = {}
_announced: set[tuple[str, str]] = set()
_warned: set[str] = set()


def register(backend: Backend) -> None:
    _registry[backend.name] = backend


def registered() -> dict[str, Backend]:
    """Name to backend, most preferred first."""
    return dict(_registry)


def current_name(name: str) -> str:
    """The name itself; of a former name, the one that took its place, with a DeprecationWarning for whoever called the
    public function that asks."""
    if name not in RENAMED:
        return name
    current = RENAMED[name]
    message = f"backend={name!r} is now called {current!r}; the former name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return current


def check_name(name: str) -> None:
    if name != "auto" and name not in _registry:
        raise ValueError(f"backend={name!r} is not known; allowed: 'auto', {', '.join(map(repr, _registry))}")


def select(name: str, problem: Problem) -> Backend:
    """The backend to use. A backend asked for by name that cannot run raises RuntimeError saying why. `auto` takes the
    first that can, logs each distinct choice once with the reasons against those it passed over, and warns
    (SlowerBackendWarning) where one of these has kernels for this kind of device."""
    check_name(name)
    if name != "auto":
        reason = _registry[name].why_not(problem)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot compute this: {reason}; backend='auto' picks one that can")
        return _registry[name]
    backend, passed_over = choose(problem)
    _announce(backend.name, passed_over)
    for other, reason in passed_over.items():
        if _registry[other].device == problem.x.device.type:
            _warn(backend.name, other, reason)
    return backend


def choose(problem: Problem) -> tuple[Backend, dict[str, str]]:
    """What `auto` takes, and the backends it passes over with the reasons. Says nothing: for callers that do."""
    passed_over: dict[str, str] = {}
    for backend in _registry.values():
        reason = backend.why_not(problem)
        if reason is None:
            return backend, passed_over
        passed_over[backend.name] = reason
    raise RuntimeError("no backend can compute this: " + in_words(passed_over))


def in_words(passed_over: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())


def _announce(name: str, passed_over: dict[str, str]) -> None:
    why = in_words(passed_over) or "first choice"
    if (name, why) not in _announced:
        _announced.add((name, why))
        logger.info("backend %s chosen (%s)", name, why)


def _warn(name: str, other: str, reason: str) -> None:
    message = (
        f"the loss is computed by the backend {name!r}, slower than {other!r}, which cannot: {reason}. "
        f"`python -m softclip_kernels.info` lists what can run here; backend={name!r} says that it is meant"
    )
    if message not in _warned:
        warnings.warn(message, SlowerBackendWarning, stacklevel=2)
        _warned.add(message)  # not before: where a filter makes it an error, it is one at every call


from . import chunked, cpu, reference, triton  # noqa: E402  each needs the protocol above

# In the order of preference.
register(triton.TritonBackend())
register(cpu.CpuBackend())
register(chunked.ChunkedBackend())
register(reference.ReferenceBackend())
