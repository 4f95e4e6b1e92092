"""The CPU backend: blocked kernels in C++ (csrc/), for float32 and bfloat16.

The instruction-set level is chosen at run time, the best that the machine has; the environment variable
SOFTCLIP_CPU_ISA forces one of `levels()`. Calls work on PyTorch's own threads where these can be had;
SOFTCLIP_CPU_THREADS=own gives every call new ones.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear_form import LinearForm, LinearForms, ReducedGradient
from ..problem import Problem
from ..stats import SCALARS, InputGradients, Statistics, StatisticsGradient, Wanted

_cpu: Any = None
_MISSING: str | None = None
try:
    _cpu = importlib.import_module("softclip_kernels._cpu")
except ImportError as error:  # not built, or built for another Python
    _MISSING = f"its extension is not there ({error}); install the package where a C++ compiler is"

ISA_VARIABLE = "SOFTCLIP_CPU_ISA"
FORMER_ISA_VARIABLE = "SOFTCLIP_NATIVE_ISA"  # still read, with a DeprecationWarning, where the other is not set
DTYPES = (torch.float32, torch.bfloat16)
KEPT_VARIABLE = "SOFTCLIP_CPU_KEPT_MIB"
KEPT_MIB = 20  # five eighths of the memory that the library promises to stay within
THREADS_VARIABLE = "SOFTCLIP_CPU_THREADS"
THREADS = ("shared", "own")  # PyTorch's; new ones for each call
# That a further thread is worth: one of PyTorch's that is awake, and a new one, which takes up to 0.2 ms to start and
# is for the most part asked for where other processes want the cores as well.
MULTIPLY_ADDS_PER_THREAD = {"shared": 2e6, "own": 20e6}


_LEVELS: list[str] = [] if _cpu is None else _cpu.levels()


def levels() -> list[str]:
    """The instruction-set levels that this machine can run, best first; empty where the extension was not built."""
    return list(_LEVELS)


def why_missing() -> str | None:
    """None where the extension is there."""
    return _MISSING


class _Settings(NamedTuple):
    """What the environment says.

    level     the instruction-set level
    shared    whether calls work on PyTorch's own threads where these can be had
    kept_mib  up to how many MiB a forward pass keeps of logits, which the backward pass then need not compute again
    """

    level: str
    shared: bool
    kept_mib: int


def _settings() -> _Settings:
    """Raises ValueError where a variable says what is not possible or not known."""
    isa, former, threads, kept = _cpu.environment(ISA_VARIABLE, FORMER_ISA_VARIABLE, THREADS_VARIABLE, KEPT_VARIABLE)
    variable = ISA_VARIABLE
    if isa is None and former is not None:
        variable, isa = FORMER_ISA_VARIABLE, former
        message = f"{variable} is now called {ISA_VARIABLE}; the former name goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    if isa is not None and isa not in _LEVELS:
        raise ValueError(f"{variable}={isa!r} is not possible on this machine; allowed: {', '.join(_LEVELS)}")
    if threads and threads not in THREADS:
        raise ValueError(f"{THREADS_VARIABLE}={threads!r} is not known; allowed: {', '.join(THREADS)}")
    if kept is not None and not kept.isdecimal():
        raise ValueError(f"{KEPT_VARIABLE}={kept!r} must be a whole number of MiB; 0 keeps nothing")
    return _Settings(isa or _LEVELS[0], threads != "own", KEPT_MIB if kept is None else int(kept))


def level() -> str:
    """The level in use. Raises ValueError when the environment asks for one that this machine does not have."""
    return _settings().level


def threads_in_use() -> str:
    """One of THREADS: "shared" where PyTorch's can be had and the environment does not say otherwise. Raises ValueError
    where that says anything else."""
    return "shared" if _cpu.borrow_threads(_settings().shared) else "own"


def peak(name: str, threads: int, bfloat16: bool) -> float:
    """Floating-point operations a second of multiply-adds on registers alone, at this level: what a matrix product
    cannot exceed. Takes some tenths of a second. For benchmarks."""
    return _cpu.peak(name, threads, bfloat16, 10_000_000)


PARTS = ("packing", "products", "softmax", "waiting", "passes")  # of csrc/cpu/stopwatch.h


def parts(run: Callable[[], object]) -> tuple[dict[str, float], int]:
    """Seconds that the threads of all native calls of `run` spent in each of PARTS, and how many threads these calls
    had, added up. For benchmarks."""
    _cpu.stopwatch(True)
    try:
        run()
    finally:
        seconds, threads = _cpu.stopwatch(False)
    return dict(zip(PARTS, seconds, strict=True)), threads


_NO_RANKS, _NO_SCALARS = torch.empty(0, dtype=torch.int64), torch.empty(0, SCALARS)


class CpuBackend:
    name = "cpu"
    device: str | None = "cpu"
    blocks_summed_twice = 0  # by the last forward, because a term had outgrown the references in force; for tests

    def details(self) -> dict[str, str]:
        """The instruction-set level in use, those that could be, and whose threads calls work on; empty where the
        extension was not built."""
        return {"level": level(), "levels": " ".join(levels()), "threads": threads_in_use()} if levels() else {}

    def why_not(self, problem: Problem) -> str | None:
        if _cpu is None:
            return _MISSING
        _settings()  # a wrong environment is an error, not a reason for another backend
        if problem.x.device.type != "cpu":
            return f"it computes on the CPU, not on {problem.x.device}"
        if problem.x.dtype not in DTYPES:
            dtype = str(problem.x.dtype).removeprefix("torch.")
            return f"it computes float32 and bfloat16, not {dtype}; cast the embeddings, for example with .float()"
        return None

    def forward(self, problem: Problem, keep: bool = False) -> Statistics:
        settings, bound, threads = _settings(), _bound(problem), _threads(problem)
        _cpu.borrow_threads(settings.shared)
        statistics, n, m = 1 + 2 * len(problem.teachers), problem.rows, problem.columns
        ranked = problem.row_threshold is not None
        result = Statistics.of(
            torch.empty(statistics, n),
            torch.empty(statistics, m),
            torch.empty(n if problem.positive_column is not None else 0),
            torch.empty(n, dtype=torch.int64) if ranked else _NO_RANKS,
            torch.empty(m, dtype=torch.int64) if ranked else _NO_RANKS,
            _NO_SCALARS,
            kept=_memory_to_keep(problem, bound, settings, threads) if keep else None,
        )
        self.blocks_summed_twice = _cpu.forward(
            bound,
            settings.level,
            threads,
            rows=result.rows.packed,
            columns=result.columns.packed,
            positive_logit=result.positive_logit,
            row_ranks=result.row_ranks,
            column_ranks=result.column_ranks,
            kept=result.kept,
        )
        return result

    def reduced(
        self, problem: Problem, statistics: Statistics, forms: LinearForms, shares: tuple[float, float]
    ) -> Tensor:
        total = _cpu.reduced(
            rows=statistics.rows.packed,
            columns=statistics.columns.packed,
            positive_logit=statistics.positive_logit,
            positive_column=problem.positive_column,
            row_form=forms.rows,
            column_form=forms.columns,
            shares=shares,
        )
        return torch.scalar_tensor(total, dtype=torch.float32)

    def backward(
        self,
        problem: Problem,
        statistics: Statistics,
        gradient: StatisticsGradient,
        wanted: Wanted,
    ) -> InputGradients:
        positive = () if problem.positive_column is None else (gradient.positive_logit.neg(),)
        # The linear forms whose gradient it is.
        forms = LinearForms(
            LinearForm(gradient.rows[0], positive, tuple(gradient.rows[1:].neg())),
            LinearForm(gradient.columns[0], (), tuple(gradient.columns[1:].neg())),
        )
        return self._backward(problem, statistics, forms, (1.0, 1.0), wanted)

    def backward_of_reduced(
        self, problem: Problem, statistics: Statistics, gradient: ReducedGradient, wanted: Wanted
    ) -> InputGradients:
        of_loss = gradient.of_loss.item()
        rows, columns = gradient.shares
        return self._backward(problem, statistics, gradient.forms, (of_loss * rows, of_loss * columns), wanted)

    def _backward(
        self,
        problem: Problem,
        statistics: Statistics,
        forms: LinearForms,
        shares: tuple[float, float],
        wanted: Wanted,
    ) -> InputGradients:
        """Of the sum of the forms' losses times their shares."""
        settings = _settings()
        _cpu.borrow_threads(settings.shared)
        dtype = problem.x.dtype if wanted.rounded else torch.float32
        result = InputGradients(
            torch.empty(problem.x.shape, dtype=dtype) if wanted.x else None,
            torch.empty(problem.y.shape, dtype=dtype) if wanted.y else None,
            torch.empty(()) if wanted.scale else None,
        )
        _cpu.backward(
            _bound(problem),
            settings.level,
            _threads(problem),
            rows=statistics.rows.packed,
            columns=statistics.columns.packed,
            positive_logit=statistics.positive_logit,
            row_form=forms.rows,
            column_form=forms.columns,
            shares=shares,
            dx=result.x,
            dy=result.y,
            dscale=result.scale,
            rounded=wanted.rounded,
            kept=statistics.kept,
        )
        return result


def _memory_to_keep(problem: Problem, bound: Any, settings: _Settings, threads: tuple[int, int]) -> Tensor | None:
    floats = settings.kept_mib * 2**18
    if problem.rows * problem.columns > floats:
        return None
    needed = _cpu.kept_floats(bound, settings.level, threads)
    return torch.empty(needed) if needed <= floats else None


def _threads(problem: Problem) -> tuple[int, int]:
    """Into how many threads' shares the work is divided: as many as PyTorch has, but no more than it is worth; whatever
    their threads turn out to be, so that the order of sums depends on no other process. And how many new threads these
    are worth, where they cannot be PyTorch's."""
    widths = problem.x.shape[1] + 16
    for teacher in problem.teachers:
        widths += 0 if teacher.x is None else teacher.x.shape[1]
    work, most, worth = problem.rows * problem.columns * widths, torch.get_num_threads(), MULTIPLY_ADDS_PER_THREAD
    return max(1, min(most, int(work / worth["shared"]))), max(1, min(most, int(work / worth["own"])))


def _bound(problem: Problem) -> Any:
    """As C++ takes it."""
    if problem.row_segment is not None:
        row_segment, column_segment = _compact_segments(problem)
        problem = replace(problem, row_segment=row_segment, column_segment=column_segment)
    return _cpu.Problem(problem)


def _compact_segments(problem: Problem) -> tuple[Tensor, Tensor]:
    """Equal segments as equal numbers that fit 32 bits, whatever their values."""
    assert problem.row_segment is not None and problem.column_segment is not None
    _, numbers = torch.unique(torch.cat([problem.row_segment, problem.column_segment]), return_inverse=True)
    return numbers[: problem.rows], numbers[problem.rows :]
