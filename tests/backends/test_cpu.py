"""The CPU backend at every instruction-set level of this machine: against float64 at the level of the Backend
protocol, against the library's standard at the level of the loss, and what C++ alone can get wrong: strides and
offsets, memory beside the operands, references that move, threads. (Its choice, and the process around it:
test_cpu_process.py.)"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers.backends import needs_cpu_kernels

from softclip_kernels import Hard, Mix, SelfTeacher, positives
from softclip_kernels.backends import cpu, registered
from softclip_kernels.problem import Problem, Source, TeacherOperand
from softclip_kernels.stats import Statistics, StatisticsGradient, Wanted
from softclip_kernels.testing import (
    ALL_TARGETS,
    FIELDS,
    SQUARE_TARGETS,
    Result,
    assert_as_accurate_as_dense,
    contested_rows,
    operands,
    unit_rows,
)

pytestmark = needs_cpu_kernels

CPU, REFERENCE = (registered()[name] for name in ("cpu", "reference"))
MATRICES = Wanted(scale=False)  # what the kernels compute; the scale's is a sum of PyTorch's


def random_problem(n, m, d, dtype=torch.float32, *, scale=14.3, norm=1.0, width=24, seed=0):
    """Every optional operand at once: positives (some outside), segments, thresholds, three teachers with biases, some
    -inf. Without the transposed teacher where n != m."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(length):
        return torch.rand(length, generator=generator) * 6 - 3

    def with_holes(bias):
        return torch.where(torch.rand(len(bias), generator=generator) < 0.1, -torch.inf, bias)

    teachers = [
        TeacherOperand(
            Source.EMBEDDINGS,
            torch.tensor(9.0),
            unit_rows(n, width, seed=seed + 2, dtype=dtype),
            unit_rows(m, width, seed=seed + 3, dtype=dtype),
            with_holes(uniform(n)),
            with_holes(uniform(m)),
        ),
        TeacherOperand(Source.LOGITS, torch.tensor(0.7), row_bias=uniform(n)),
    ]
    if n == m:
        teachers.append(TeacherOperand(Source.TRANSPOSED, torch.tensor(1.5), column_bias=with_holes(uniform(m))))
        teachers.append(TeacherOperand(Source.TRANSPOSED))
    return Problem(
        (norm * unit_rows(n, d, seed=seed)).to(dtype),
        (norm * unit_rows(m, d, seed=seed + 1)).to(dtype),
        torch.tensor(scale),
        positive_column=torch.randint(-1, m + 1, (n,), generator=generator),
        row_segment=torch.randint(0, 3, (n,), generator=generator) * 10**12,
        column_segment=torch.randint(0, 3, (m,), generator=generator) * 10**12,
        teachers=tuple(teachers),
        row_threshold=uniform(n),
        column_threshold=uniform(m),
    )


def in_float64(problem):
    def double(tensor):
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    teachers = tuple(TeacherOperand(one.source, *map(double, one.tensors())) for one in problem.teachers)
    fields = {name: double(getattr(problem, name)) for name in Problem.__dataclass_fields__ if name != "teachers"}
    return Problem(teachers=teachers, **fields)


def assert_same_forward(problem, tolerance):
    got, expected = CPU.forward(problem), REFERENCE.forward(in_float64(problem))
    for one, truth in zip(got.tensors()[:3], expected.tensors()[:3], strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-6, atol=tolerance)
    # A rank may differ where a logit lies within rounding of its threshold: rare, and then by one.
    for field in ("row_ranks", "column_ranks"):
        assert (getattr(got, field) - getattr(expected, field)).abs().sum() <= 1 + problem.rows // 100
    return expected


def assert_same_backward(problem, expected, tolerance):
    n, m, k = problem.rows, problem.columns, len(problem.teachers)
    gradient = StatisticsGradient(unit_rows(1 + k, n, seed=5), unit_rows(1 + k, m, seed=6), torch.zeros(n))
    exact = REFERENCE.backward(in_float64(problem), expected, gradient, MATRICES)
    statistics = Statistics.of(*(each.float() for each in expected.tensors()[:3]))
    got = CPU.backward(problem, statistics, StatisticsGradient(*(each.float() for each in gradient)), MATRICES)
    for one, truth in zip(got[:2], exact[:2], strict=True):
        assert one.dtype == torch.float32 and one.is_contiguous()
        torch.testing.assert_close(one.double(), truth, rtol=0.0, atol=tolerance * truth.abs().max().item() + 1e-30)


# A block is 224 or 240 rows and columns, a register tile 14 x 32, 6 x 16 or 4 x 8, a vector 16, 8 or 4 columns: 1 and 2
# are degenerate, 15 to 33 straddle tiles, 223 to 241 a block, 460 has three blocks of rows and of columns.
SIZES = ((1, 1, 1), (2, 1, 3), (15, 33, 5), (33, 33, 40), (223, 241, 7), (241, 241, 33), (460, 460, 16), (460, 225, 65))


@pytest.mark.parametrize("size", SIZES)
def test_float32_against_float64(level, size, threads):
    problem = random_problem(*size)
    assert_same_backward(problem, assert_same_forward(problem, 2e-5), 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_against_float64(level, size, threads):
    """Statistics as exact as in float32; gradients to bf16's rounding of G, and exact where the level widens it."""
    problem = random_problem(*size, dtype=torch.bfloat16)
    expected = assert_same_forward(problem, 2e-5)
    assert_same_backward(problem, expected, 1e-2 if level == "avx512bf16" else 1e-5)


@pytest.mark.parametrize("norm", (1e-3, 1.0, 30.0))
def test_logits_of_any_size_are_exact(level, norm):
    """Logits up to 9e4 and down to 1e-5: references move with every row and column, so nothing leaves the range."""
    problem = random_problem(130, 130, 12, scale=100.0, norm=norm)
    largest = 100 * norm**2 * 1.5
    assert_same_backward(problem, assert_same_forward(problem, 1e-6 * largest + 1e-5), 1e-6 * largest + 1e-5)


def test_rows_far_apart_in_one_block_are_exact(level):
    """Neighbouring rows whose logits differ by thousands, and columns with one entry 1e4 above all others: the largest
    terms come in the last block, so every running sum is rescaled, by more than fp32 can hold."""
    n = 500
    x, y = unit_rows(n, 8), unit_rows(n, 8, seed=1)
    x *= torch.logspace(-2, 2, n, dtype=torch.float64)[:, None]
    y[-1] *= 100
    teachers = (TeacherOperand(Source.LOGITS),)
    problem = Problem(x.float(), y.float(), torch.tensor(50.0), torch.arange(n), teachers=teachers)
    expected = assert_same_forward(problem, 0.05)  # |z| reaches 5e5, where fp32's spacing is 0.03
    assert expected.rows.packed.abs().max() > 1e5
    # Where the logits are moderate nothing is lost next to the extreme rows.
    got = CPU.forward(problem)
    calm = expected.rows.lse.abs() < 30
    assert calm.any()
    torch.testing.assert_close(got.rows.lse[calm].double(), expected.rows.lse[calm], rtol=1e-6, atol=1e-4)


def test_references_that_are_outgrown_are_raised(level):
    """A block is summed with the references in force and again with higher ones where a term outgrows them, which the
    counter shows; in blocks of like rows that never happens."""
    n = 3 * 240
    x, y = unit_rows(n, 16, dtype=torch.float32), unit_rows(n, 16, seed=1, dtype=torch.float32)
    teachers = (TeacherOperand(Source.TRANSPOSED), TeacherOperand(Source.LOGITS, torch.tensor(0.7)))
    CPU.forward(Problem(x, y, torch.tensor(14.3), teachers=teachers))
    assert CPU.blocks_summed_twice == 0
    y[-1] *= 40  # the last column: a term of 2^500 and more where all so far were below 2^20
    for problem in (Problem(x, y, torch.tensor(14.3)), Problem(x, y, torch.tensor(14.3), teachers=teachers)):
        CPU.forward(problem)
        assert CPU.blocks_summed_twice > 0
        assert_same_backward(problem, assert_same_forward(problem, 1e-3), 1e-3)


def test_logits_beyond_all_precision_stay_finite(level):
    """Where a logit's spacing is thousands nothing is resolved, but what comes back is finite and of its size. (Below
    -6e28 a pair counts as excluded.)"""
    for size in (1e10, 1e15, 1e20, 1e28):
        x = torch.tensor([[size], [-size], [size / 3]])
        rows = CPU.forward(Problem(x, torch.ones(3, 1), torch.tensor(1.0))).rows.lse
        torch.testing.assert_close(rows, x[:, 0], rtol=1e-5, atol=0.0)


def fused(x, y, scale, target):
    return Result.of_loss(x, y, scale, target, backend="cpu")


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_every_target_is_as_accurate_as_dense(level, name, threads):
    """The library's standard of accuracy, on one size below a block, one above, and (rectangular) both."""
    sizes = ((65, 65, 96), (257, 257, 64)) if name in SQUARE_TARGETS else ((63, 250, 70), (257, 64, 33))
    for n, m, d in sizes:
        target = ALL_TARGETS[name](n, m)
        for dtype in cpu.DTYPES:
            x, y, scale = operands(n, m, d, dtype=dtype)
            assert_as_accurate_as_dense(fused(x, y, scale, target), x, y, scale, target)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("scale", (1.0, 14.3, 100.0, 300.0))
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_external", "labels_smoothing"))
def test_every_dtype_and_scale_is_as_accurate_as_dense(level, name, scale, dtype):
    n = 129
    target = ALL_TARGETS[name](n, n)
    x = unit_rows(n, 64, dtype=dtype)
    y, scale = contested_rows(x, scale), torch.tensor(scale)
    assert_as_accurate_as_dense(fused(x, y, scale, target), x, y, scale, target)


def test_adversarial_rows_are_as_accurate_as_dense(level):
    """Logits of ±1e4, identical rows, opposite rows, zero rows, converged pairs."""
    base = unit_rows(65, 32, dtype=torch.float32)
    zero_row = base.clone()
    zero_row[3] = 0
    cases = (
        (base * 1e2, base * -1e2, 1.0, True),
        (base[:1].expand(65, 32), base[:1].expand(65, 32), 100.0, False),
        (base, -base, 100.0, True),
        (zero_row, base, 100.0, True),
        (base, base, 100.0, False),
    )
    for target in (Hard(), Mix(Hard(), SelfTeacher(swap="paired"), 0.5)):
        for x, y, scale, signal in cases:
            scale = torch.tensor(scale)
            assert_as_accurate_as_dense(fused(x, y, scale, target), x, y, scale, target, signal=signal)


def with_own_teacher(x, y):
    teacher = TeacherOperand(Source.EMBEDDINGS, torch.tensor(3.0), x, y)
    return Problem(x, y, torch.tensor(14.3), torch.arange(len(x)) % len(y), teachers=(teacher,))


def ones_for(problem):
    """A gradient of the statistics."""
    k = 1 + len(problem.teachers)
    positives = 0 if problem.positive_column is None else problem.rows
    return StatisticsGradient(torch.ones(k, problem.rows), torch.ones(k, problem.columns), torch.zeros(positives))


def assert_same_bits(problem, other):
    """Forward and backward of the two, bit for bit, without what PyTorch sums, in an order that strides decide."""
    results = []
    for one in (problem, other):
        statistics = CPU.forward(one)
        with mock.patch.object(positives, "add_gradient"):
            gradients = CPU.backward(one, statistics, ones_for(one), MATRICES)
        results.append((*statistics.tensors(), *gradients[:2]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_strides_change_no_bit(level):
    """Transposed, sliced, expanded, reversed operands and a teacher's: bit for bit as contiguous ones."""
    wide = unit_rows(100, 64, dtype=torch.float32)
    views = (
        (wide[::2, ::2], wide[1::2, 1::2]),
        (wide.T.contiguous().T[:50], wide[50:]),
        (wide[:1].expand(50, 64), wide[50:]),
        (wide[:50, 3:40], wide.flip(0)[:50, 3:40]),
    )
    for dtype in (torch.float32, torch.bfloat16):
        for pair in views:
            x, y = (view if dtype == view.dtype else view.to(dtype).T.contiguous().T for view in pair)
            assert_same_bits(with_own_teacher(x, y), with_own_teacher(x.contiguous(), y.contiguous()))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_offsets_beyond_31_bits_are_followed(level, dtype, tmp_path):
    """Rows, then columns, 2^30 + 5 elements apart, in a file of which a few pages exist."""
    step, count, width = 2**30 + 5, 3, 40
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate((count * step + width) * dtype.itemsize)
    if path.stat().st_blocks > 0:
        pytest.skip("the file system stores holes")
    far = torch.from_file(str(path), shared=True, size=(count - 1) * step + width, dtype=dtype)
    x, y = unit_rows(count, width).to(dtype), unit_rows(4, width, seed=1).to(dtype)
    rows, columns = far.as_strided((count, width), (step, 1)), far.as_strided((width, count), (1, step))
    rows.copy_(x)
    assert_same_bits(with_own_teacher(rows, y), with_own_teacher(x, y))
    assert_same_bits(with_own_teacher(columns, y[:, :count]), with_own_teacher(x.T.contiguous(), y[:, :count]))


def test_negated_views_keep_their_sign(level):
    """A view that is negative lazily has the other sign in memory."""
    x, y = torch.randn(5, 6, dtype=torch.complex64).conj().imag, unit_rows(5, 6, dtype=torch.float32)
    assert x.is_neg()
    assert_same_bits(Problem(x, y, torch.tensor(2.0)), Problem(x.resolve_neg().clone(), y, torch.tensor(2.0)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_memory_beside_the_operands_is_left_alone(level, dtype, threads, monkeypatch):
    """What lies around inputs is not read into a result (NaN and wild indices there), around results not written."""

    def surrounded(tensor):
        if tensor is None or tensor.dim() == 0:
            return tensor
        wild = torch.nan if tensor.is_floating_point() else 10**15
        inner = tuple(slice(64, 64 + size) for size in tensor.shape)
        outer = torch.full([size + 128 for size in tensor.shape], wild, dtype=tensor.dtype)
        outer[inner] = tensor
        return outer[inner]

    fences = []

    def fenced(value):
        def allocate(*shape, dtype=torch.float32):
            shape = torch.Size(shape[0] if not isinstance(shape[0], int) else shape)
            outer = torch.full((shape.numel() + 128,), 77, dtype=dtype)
            outer[64 : 64 + shape.numel()] = value
            fences.append((outer, shape.numel()))
            return outer[64 : 64 + shape.numel()].view(shape)

        return allocate

    for size in ((33, 47, 5), (241, 230, 33), (225, 225, 65)):
        problem = random_problem(*size, dtype=dtype)
        names = Problem.__dataclass_fields__.keys() - {"teachers"}
        fields = {name: surrounded(getattr(problem, name)) for name in names}
        teachers = tuple(TeacherOperand(one.source, *map(surrounded, one.tensors())) for one in problem.teachers)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", fenced(0))
            patch.setattr(torch, "empty", fenced(3))
            assert_same_bits(problem, Problem(teachers=teachers, **fields))
    assert len(fences) > 30
    for outer, count in fences:
        assert (outer[:64] == 77).all() and (outer[64 + count :] == 77).all()


def test_shapes_are_checked_once_more(level):
    """A short vector or a swapped pair that is not square would be read past its end."""
    x, y, one = torch.eye(5), torch.eye(5)[:3], torch.ones(())
    for problem in (
        Problem(x, y, one, teachers=(TeacherOperand(Source.TRANSPOSED),)),
        Problem(x, y, one, positive_column=torch.arange(3)),
        Problem(x, y, one, teachers=(TeacherOperand(Source.LOGITS, column_bias=torch.zeros(5)),)),
        Problem(x, y[:, :4], one),
    ):
        with pytest.raises(AssertionError):
            CPU.forward(problem)


def test_empty_operands_give_empty_results(level):
    for n, m in ((0, 3), (3, 0), (0, 0)):
        problem = Problem(torch.zeros(n, 4), torch.zeros(m, 4), torch.ones(()))
        statistics = CPU.forward(problem)
        assert (statistics.rows.packed == -torch.inf).all() and statistics.columns.packed.shape == (1, m)
        gradients = CPU.backward(problem, statistics, ones_for(problem), Wanted())
        assert [tuple(one.shape) for one in gradients] == [(n, 4), (m, 4), ()]
        assert not any(one.any() for one in gradients)


@pytest.mark.parametrize("teachers", ((), (TeacherOperand(Source.TRANSPOSED),)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_gradient_alone_has_the_same_bits(level, dtype, teachers, threads):
    """Without the other it has the same bits."""
    x, y = (unit_rows(460, 40, seed=seed).to(dtype) for seed in (0, 1))
    problem = Problem(x, y, torch.tensor(9.0), torch.arange(460), teachers=teachers)
    statistics, ones = CPU.forward(problem), ones_for(problem)
    both = CPU.backward(problem, statistics, ones, Wanted())
    for wanted in (Wanted(y=False), Wanted(x=False, scale=False), Wanted(x=False, y=False, scale=False)):
        alone = CPU.backward(problem, statistics, ones, wanted)
        for name, one, of_both in zip(("x", "y", "scale"), alone, both, strict=True):
            assert torch.equal(one, of_both) if getattr(wanted, name) else one is None


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nan_and_infinity_come_back(level, dtype):
    for value in (torch.nan, torch.inf):
        x = unit_rows(250, 8, dtype=dtype)
        x[5, 2] = value
        statistics = CPU.forward(Problem(x, unit_rows(250, 8, seed=1, dtype=dtype), torch.tensor(5.0)))
        assert not statistics.rows.lse[5].isfinite()
        # A logit of -inf is a zero share, so of the infinite row's columns only those with +inf must show it.
        columns = statistics.columns.packed
        assert not (columns if value != value else columns[:, :0]).isfinite().any()
        assert statistics.rows.lse[6:].isfinite().all()


@pytest.mark.parametrize("n", (9, 233, 250))
def test_a_batch_of_nan_leaves_nothing_to_the_next(level, n):
    """Memory is kept between calls, and vectors are read past a ragged block's end."""
    x = unit_rows(n, 8, dtype=torch.float32)
    teachers = (TeacherOperand(Source.TRANSPOSED), TeacherOperand(Source.TRANSPOSED, torch.tensor(0.7)))
    problem = Problem(x, x.flip(0), torch.tensor(9.0), torch.arange(n), teachers=teachers)
    full = torch.full((240, 8), torch.nan)

    def results():
        statistics = CPU.forward(problem)
        return *statistics.tensors(), *CPU.backward(problem, statistics, ones_for(problem), Wanted())

    before = results()
    wrong = Problem(full, full, torch.tensor(9.0), teachers=teachers)
    CPU.backward(wrong, CPU.forward(wrong), ones_for(wrong), MATRICES)
    assert all(torch.equal(*pair) for pair in zip(results(), before, strict=True))


def test_a_row_that_sees_nothing_contributes_nothing(level):
    """A row that sees no column: log-sum-exp -inf, mean 0, no gradient."""
    n = 40
    segment = torch.zeros(n, dtype=torch.int64)
    alone = segment.clone()
    alone[7] = 1
    x = unit_rows(n, 8, dtype=torch.float32)
    problem = Problem(x, x, torch.tensor(9.0), None, alone, segment, (TeacherOperand(Source.LOGITS),))
    statistics = CPU.forward(problem)
    assert statistics.rows.packed[:, 7].tolist() == [-torch.inf, -torch.inf, 0.0]
    assert statistics.columns.packed.isfinite().all()
    dx, *_ = CPU.backward(problem, statistics, ones_for(problem), Wanted())
    assert not dx[7].any() and dx[8].any()


@pytest.mark.parametrize("name", ("psd", "teacher"))
def test_threads_change_rounding_only(level, name, threads):
    """The same bits on every run of a thread count, other counts within rounding; 3 and 5 divide nothing evenly."""
    n, scale = 700, torch.tensor(20.0)
    target = ALL_TARGETS[name](n, n)
    x, y = (unit_rows(n, 48, seed=seed, dtype=torch.float32) for seed in (0, 1))
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(fused(x, y, scale, target))
        again = fused(x, y, scale, target)
        assert not results[-1].differing(again)
    for result in results[1:]:
        for field in FIELDS:
            torch.testing.assert_close(getattr(result, field), getattr(results[0], field), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", ((1, 1), (1, 9), (5, 2), (7, 7)))
def test_more_threads_than_rows_are_allowed(level, threads, shape):
    threads(16)
    problem = random_problem(*shape, 5)
    assert_same_backward(problem, assert_same_forward(problem, 2e-5), 1e-5)
