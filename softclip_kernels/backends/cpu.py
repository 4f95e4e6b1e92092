"""The CPU backend: blocked kernels in C++ (csrc/), for float32 and bfloat16.

The instruction-set level is chosen at run time, the best that the machine has; the environment variable
SOFTCLIP_CPU_ISA forces one of `levels()`. Calls work on PyTorch's own threads where these can be had;
SOFTCLIP_CPU_THREADS=own gives every call new ones.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..linear_form import Coefficient, LinearForm, LinearForms, ReducedGradient
from ..problem import Problem, Source, TeacherOperand
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
# That a further thread is worth: one of PyTorch's that is awake, and a new one, which takes up to 0.2 ms to start.
MULTIPLY_ADDS_PER_THREAD = {"shared": 2e6, "own": 8e6}


_LEVELS: list[str] = [] if _cpu is None else _cpu.levels()


def levels() -> list[str]:
    """The instruction-set levels that this machine can run, best first; empty where the extension was not built."""
    return list(_LEVELS)


def why_missing() -> str | None:
    """None where the extension is there."""
    return _MISSING


def level() -> str:
    """The level in use. Raises ValueError when the environment asks for one that this machine does not have."""
    variable, asked = ISA_VARIABLE, _cpu.environment(ISA_VARIABLE)
    if asked is None:
        variable, asked = FORMER_ISA_VARIABLE, _cpu.environment(FORMER_ISA_VARIABLE)
        if asked is None:
            return _LEVELS[0]
        message = f"{variable} is now called {ISA_VARIABLE}; the former name goes with the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
    if asked not in _LEVELS:
        raise ValueError(f"{variable}={asked!r} is not possible on this machine; allowed: {', '.join(_LEVELS)}")
    return asked


def threads_in_use() -> str:
    """One of THREADS: "shared" where PyTorch's can be had and the environment does not say otherwise. Raises ValueError
    where that says anything else."""
    asked = _cpu.environment(THREADS_VARIABLE) or THREADS[0]
    if asked not in THREADS:
        raise ValueError(f"{THREADS_VARIABLE}={asked!r} is not known; allowed: {', '.join(THREADS)}")
    _cpu.borrow_threads(asked == "shared")
    return "shared" if _cpu.can_borrow_threads() else "own"


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
        level(), threads_in_use()  # a wrong environment is an error, not a reason for another backend
        if problem.x.device.type != "cpu":
            return f"it computes on the CPU, not on {problem.x.device}"
        if problem.x.dtype not in DTYPES:
            dtype = str(problem.x.dtype).removeprefix("torch.")
            return f"it computes float32 and bfloat16, not {dtype}; cast the embeddings, for example with .float()"
        return None

    def forward(self, problem: Problem, keep: bool = False) -> Statistics:
        call = _Call(problem)
        statistics, n, m = 1 + 2 * len(problem.teachers), problem.rows, problem.columns
        ranked = problem.row_threshold is not None
        result = Statistics.of(
            torch.empty(statistics, n),
            torch.empty(statistics, m),
            torch.empty(n if problem.positive_column is not None else 0),
            torch.empty(n, dtype=torch.int64) if ranked else _NO_RANKS,
            torch.empty(m, dtype=torch.int64) if ranked else _NO_RANKS,
            _NO_SCALARS,
        )
        in_use, threads = level(), _threads(problem)
        kept = _memory_to_keep(problem, call, in_use, threads) if keep else None
        self.blocks_summed_twice = _cpu.forward(
            call.problem,
            in_use,
            threads,
            rows=result.rows.packed.data_ptr(),
            columns=result.columns.packed.data_ptr(),
            positive_logit=result.positive_logit.data_ptr(),
            row_ranks=result.row_ranks.data_ptr(),
            column_ranks=result.column_ranks.data_ptr(),
            kept=call.vector(kept),
        )
        return result._replace(kept=kept)

    def reduced(
        self, problem: Problem, statistics: Statistics, forms: LinearForms, shares: tuple[float, float]
    ) -> Tensor:
        addresses, k, total = _Addresses(), len(problem.teachers), 0.0
        positive_logit = None if problem.positive_column is None else statistics.positive_logit
        for form, share, direction, along in (
            (forms.rows, shares[0], statistics.rows.packed, None),
            (forms.columns, shares[1], statistics.columns.packed, problem.positive_column),
        ):
            if form is not None:
                total += _cpu.sum_of_losses(
                    addresses.linear_form(form, share, k, direction.shape[1]),
                    statistics=addresses.vector(direction),
                    length=direction.shape[1],
                    positive_logit=addresses.vector(positive_logit),
                    along=addresses.vector(along, torch.int64),
                    positives=problem.rows,
                )
        return torch.scalar_tensor(total, dtype=torch.float32)

    def backward(
        self,
        problem: Problem,
        statistics: Statistics,
        gradient: StatisticsGradient,
        wanted: Wanted,
    ) -> InputGradients:
        n, m, k = problem.rows, problem.columns, len(problem.teachers)
        assert gradient.rows.shape == (1 + k, n) and gradient.columns.shape == (1 + k, m)
        positive: tuple[Tensor, ...] = ()
        if problem.positive_column is not None:
            _assert_lengths(n, gradient.positive_logit)
            positive = (gradient.positive_logit.neg(),)
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
        call = _Call(problem)
        n, m, k = problem.rows, problem.columns, len(problem.teachers)
        assert statistics.rows.packed.shape == (1 + 2 * k, n) and statistics.columns.packed.shape == (1 + 2 * k, m)
        if problem.positive_column is not None:
            _assert_lengths(n, statistics.positive_logit)
        dtype = problem.x.dtype if wanted.rounded else torch.float32
        result = InputGradients(
            torch.empty(problem.x.shape, dtype=dtype) if wanted.x else None,
            torch.empty(problem.y.shape, dtype=dtype) if wanted.y else None,
            torch.empty(()) if wanted.scale else None,
        )
        dx, dy, dscale = (0 if each is None else each.data_ptr() for each in result)
        _cpu.backward(
            call.problem,
            level(),
            _threads(problem),
            rows=call.vector(statistics.rows.packed),
            columns=call.vector(statistics.columns.packed),
            positive_logit=call.vector(statistics.positive_logit),
            row_form=call.linear_form(forms.rows, shares[0], k, n),
            column_form=call.linear_form(forms.columns, shares[1], k, m),
            dx=dx,
            dy=dy,
            dscale=dscale,
            rounded=wanted.rounded,
            kept=call.vector(statistics.kept),
        )
        return result


def kept_mib() -> int:
    """Up to how many MiB a forward pass keeps of logits that the backward pass then need not compute again: KEPT_MIB,
    or what the environment says. Raises ValueError where that is no such number."""
    asked = _cpu.environment(KEPT_VARIABLE)
    if asked is None:
        return KEPT_MIB
    if not asked.isdecimal():
        raise ValueError(f"{KEPT_VARIABLE}={asked!r} must be a whole number of MiB; 0 keeps nothing")
    return int(asked)


def _memory_to_keep(problem: Problem, call: _Call, in_use: str, threads: int) -> Tensor | None:
    floats = kept_mib() * 2**18
    if problem.rows * problem.columns > floats:
        return None
    needed = _cpu.kept_floats(call.problem, in_use, threads)
    return torch.empty(needed) if needed <= floats else None


def _threads(problem: Problem) -> int:
    """As many as PyTorch uses, but no more than the work is worth."""
    widths = [problem.x.shape[1]] + [teacher.x.shape[1] for teacher in problem.teachers if teacher.x is not None]
    work = problem.rows * problem.columns * (sum(widths) + 16)
    return max(1, min(torch.get_num_threads(), int(work / MULTIPLY_ADDS_PER_THREAD[threads_in_use()])))


_ZERO = 0, 0, 0.0  # a coefficient


class _Addresses:
    """Addresses of tensors, and what must stay alive while they are used."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def vector(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """The address of a contiguous copy, or of the tensor itself where it is that already; 0 for None."""
        if tensor is None:
            return 0
        if tensor.dtype is not dtype or tensor.is_neg() or not tensor.is_contiguous():
            tensor = tensor.detach().to(dtype).resolve_neg().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def linear_form(self, form: LinearForm | None, share: float, teachers: int, length: int) -> Any:
        """Its losses, of so many rows or columns, times `share`; None: 0."""
        if form is None:
            form, share = LinearForm(0.0, (), (0.0,) * teachers), 0.0
        assert len(form.means) == teachers and len(form.dots) <= 1
        dot = self._coefficient(form.dots[0], length) if form.dots else _ZERO
        means = [self._coefficient(each, length) for each in form.means]
        weight = self._coefficient(form.weight, length, share)
        return _cpu.LinearForm(self._coefficient(form.mass, length), dot, weight, means, form.seen is not None)

    def _coefficient(self, value: Coefficient, length: int, factor: float = 1.0) -> tuple[int, int, float]:
        """(address or 0, step, number) of the value times the factor."""
        if not isinstance(value, Tensor):
            return 0, 0, value * factor
        assert value.dim() == 0 or value.shape[0] == length, f"{tuple(value.shape)}, not {length}"
        if value.dtype != torch.float32 or value.is_neg():
            value = value.detach().float().resolve_neg()
        self._kept.append(value)
        return value.data_ptr(), value.stride(0) if value.dim() else 0, factor


class _Call(_Addresses):
    """A Problem as addresses."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        n, m = problem.rows, problem.columns
        assert problem.x.shape[1] == problem.y.shape[1]
        _assert_lengths(n, problem.positive_column, problem.row_segment, problem.row_threshold)
        _assert_lengths(m, problem.column_segment, problem.column_threshold)
        for teacher in problem.teachers:
            assert teacher.source != Source.TRANSPOSED or n == m, f"a transposed teacher in {n} rows, {m} columns"
            _assert_lengths(n, teacher.x, teacher.row_bias)
            _assert_lengths(m, teacher.y, teacher.column_bias)
        row_segment, column_segment = _compact_segments(problem)
        self.problem = _cpu.Problem(
            self._matrix(problem.x),
            self._matrix(problem.y),
            self.vector(problem.scale),
            [self._teacher(teacher) for teacher in problem.teachers],
            positive_column=self.vector(problem.positive_column, torch.int64),
            row_segment=self.vector(row_segment, torch.int32),
            column_segment=self.vector(column_segment, torch.int32),
            row_threshold=self.vector(problem.row_threshold),
            column_threshold=self.vector(problem.column_threshold),
        )

    def _matrix(self, tensor: Tensor) -> Any:
        if tensor.is_neg():  # in its memory are the signs of another tensor
            tensor = tensor.detach().resolve_neg()
        if tensor.dtype not in DTYPES:  # a teacher in float16 or float64 multiplies in float32, as in every backend
            tensor = tensor.detach().float()
        self._kept.append(tensor)
        return _cpu.Matrix(tensor.data_ptr(), *tensor.shape, *tensor.stride(), tensor.dtype is torch.bfloat16)

    def _teacher(self, teacher: TeacherOperand) -> Any:
        own = teacher.source == Source.EMBEDDINGS
        assert own == (teacher.x is not None) == (teacher.y is not None)
        return _cpu.Teacher(
            source=int(teacher.source),
            scale=self.vector(teacher.scale),
            x=self._matrix(teacher.x) if teacher.x is not None else None,
            y=self._matrix(teacher.y) if teacher.y is not None else None,
            row_bias=self.vector(teacher.row_bias),
            column_bias=self.vector(teacher.column_bias),
        )


def _assert_lengths(length: int, *tensors: Tensor | None) -> None:
    """C++ code reads as many elements as it is told, whatever lies there."""
    for tensor in tensors:
        assert tensor is None or tensor.shape[0] == length, f"{tuple(tensor.shape)}, not {length}"


def _compact_segments(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Equal segments as equal numbers that fit 32 bits, whatever their values."""
    if problem.row_segment is None or problem.column_segment is None:
        return None, None
    _, numbers = torch.unique(torch.cat([problem.row_segment, problem.column_segment]), return_inverse=True)
    return numbers[: problem.rows], numbers[problem.rows :]
