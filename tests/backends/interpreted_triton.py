"""The Triton kernels in Triton's interpreter, against float64. test_triton.py runs this file in processes of its
own, because the kernels are interpreted or compiled for the whole of a process; by hand:

    TRITON_INTERPRET=1 python -m pytest tests/backends/interpreted_triton.py

Only float32: the interpreter multiplies bfloat16 bit patterns as if they were integers, without an error, so the
backend refuses other dtypes there. In bfloat16 and float16 the same code is compiled ahead of time (test_triton_aot.py)
and run on a GPU (test_triton_gpu.py).
"""

from __future__ import annotations

import pytest
import torch
from helpers import candidates, mutants
from loss import test_loss, test_ops

from softclip_kernels import Hard, backends, positives, softclip_loss, softclip_loss_with_ranks
from softclip_kernels.backends.triton import (
    call,
    coefficients,
    edges,
    launch,
    online,
    persistent,
    products,
    shapes,
    softmax_backward,
    softmax_backward_persistent,
    softmax_forward,
    softmax_forward_persistent,
)
from softclip_kernels.backends.triton.passes import passes
from softclip_kernels.backends.triton.shapes import Shape
from softclip_kernels.problem import Problem, Source, TeacherOperand
from softclip_kernels.stats import Statistics, StatisticsGradient, Wanted
from softclip_kernels.testing import (
    ALL_TARGETS,
    FIELDS,
    RECTANGULAR_TARGETS,
    SQUARE_TARGETS,
    Result,
    assert_as_accurate_as_dense,
    matching_rows,
    operands,
    unit_rows,
)

# Tiles are 32 x 64 or 64 x 32 in the interpreter, steps along the width 32: one entry, less than a tile, a tile, many
# with ragged edges; widths below, at and between multiples of a step. The interpreter takes a second for a few tiles:
# all sizes for the plainest and the richest target, for the others the first and, in test-long, another one in turn.
SQUARE_SIZES = ((97, 40), (64, 64), (1, 3), (33, 32), (2, 1), (129, 70))
SCALES = (1.0, 100.0, 300.0)
RECTANGULAR_SIZES = ((70, 130, 33), (64, 128, 64), (1, 2, 3), (129, 63, 1), (2, 1, 70), (65, 49, 32))


def check(name, n, m, d, scale=14.3):
    target = ALL_TARGETS[name](n, m)
    x, y, scale = operands(n, m, d, scale=scale)
    result, signal = Result.of_loss(x, y, scale, target, backend="triton"), test_loss.has_signal(n, m, d)
    assert_as_accurate_as_dense(result, x, y, scale, target, signal=signal)


def in_turn(names, sizes, everywhere):
    return [
        pytest.param(name, *size, marks=[pytest.mark.long] * (name not in everywhere and size != sizes[0]))
        for index, name in enumerate(names)
        for size in (sizes if name in everywhere else (sizes[0], sizes[1 + index % (len(sizes) - 1)]))
    ]


@pytest.mark.parametrize(("name", "n", "d"), in_turn(SQUARE_TARGETS, SQUARE_SIZES, ("hard", "psd_own_scale")))
def test_square_targets_agree_with_float64(name, n, d):
    check(name, n, n, d)


@pytest.mark.parametrize(("name", "n", "m", "d"), in_turn(RECTANGULAR_TARGETS, RECTANGULAR_SIZES, ("blend_vectors",)))
def test_rectangular_targets_agree_with_float64(name, n, m, d):
    check(name, n, m, d)


# One of each kind of teacher, with every feature among them, at scales where the centered sums are used as they are
# (1), need a reference (100) and leave the range for some rows (300).
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_block", "psd_several", "paired_column"))
def test_any_scale_agrees_with_float64(name, scale):
    check(name, 70, 70, 40, scale)


# No teacher, one, several: what the forward pass hands to the backward pass has the shape that a compiler is told.
@pytest.mark.parametrize("name", ("hard", "psd", "psd_several_block"))
def test_opcheck(name):
    test_ops.check_operators(name, "triton")


# Two tiles by three; where a target has each kind of teacher and of positive, at each of SCALES as well. Of the other
# targets it is long: that the standard refuses them is shown with the other backends, too.
EVERY_SCALE = ("hard", "psd", "psd_external")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in EVERY_SCALE)) for name in ALL_TARGETS]
)
def test_every_mutant_is_refused(name):
    target, scales = ALL_TARGETS[name](70, 70), SCALES if name in EVERY_SCALE else (14.3,)
    found = {scale: mutants.refusals(*operands(70, 70, 40, scale=scale), target, "triton") for scale in scales}
    assert not [case for case in found.items() if mutants.MISSED in case[1].values()]


# Scratch for two or three tiles: inner, edge and corner super-blocks, on and off the diagonal.
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_block", "psd_several", "blocks"))
def test_several_super_blocks_agree_with_float64(name, monkeypatch):
    monkeypatch.setattr(launch, "SCRATCH", 40_000)
    monkeypatch.setattr(edges, "most", lambda: 40_000)
    check(name, 200, 200, 33)


@pytest.mark.parametrize("name", ("hard", "psd", "psd_external"))
def test_every_candidate_agrees_with_float64(name, monkeypatch):
    """Ragged and whole: 70 and 64 rows, widths of 40 and 64."""
    for n, d in ((70, 40), (64, 64), (129, 64)):
        for _ in candidates.every(lambda size=(n, n, d): check(name, *size), monkeypatch):
            check(name, n, n, d)


def test_second_tile_shape_agrees(monkeypatch):
    """Tile shapes change the result by rounding only: square ones here instead of the interpreter's."""
    x, y, scale = operands(130, 130, 40)
    for name in ("hard", "psd"):
        target = SQUARE_TARGETS[name](130, 130)
        usual = Result.of_loss(x, y, scale, target, backend="triton")
        with monkeypatch.context() as patch:
            patch.setattr(launch, "candidates", lambda *_: (Shape(64, 64, 16, 4, 1),))
            other = Result.of_loss(x, y, scale, target, backend="triton")
        for field in FIELDS:
            torch.testing.assert_close(getattr(usual, field), getattr(other, field), rtol=1e-5, atol=1e-6)


# A super-block within 160 rows, of two tiles by three with ragged edges; a width of 48 is one and a half steps.
STAYING = pytest.mark.parametrize("processors", (1, 2, 100))
WITHIN, TILE = (slice(96, 150), slice(20, 150)), Shape(32, 64, 32, 4, 1)


def launch_both(usual, staying, arguments, filled, processors):
    """What an ordinary kernel and one by programs that stay leave in the tensors `filled`."""
    found = []
    for kernel in (usual, staying):
        own = {name: value.clone() for name, value in filled.items()}
        if kernel is staying:
            launched = persistent.PersistentCall(kernel, arguments | own, TILE, processors)
        else:
            launched = call.Call(kernel, arguments | own, TILE.options())
        launched(6, **launch.bounds(*WITHIN))
        found.append(own)
    return found


@STAYING
def test_programs_that_stay_fill_the_same_slots(processors):
    x, y, scale = operands(160, 160, 48)
    problem = Problem(x, y, scale, torch.arange(160))
    (launch_pass,), _ = passes(problem)
    filled = {"row_sums": torch.full((3, 1, 192), 7.0), "column_sums": torch.full((2, 1, 192), 7.0)}
    filled |= {"positive_logit": torch.zeros(160)}
    arguments = launch_pass.arguments | launch.constants(launch_pass, TILE)
    arguments |= {"mirror_row_sums": filled["row_sums"], "mirror_column_sums": filled["column_sums"]}
    arguments |= {"edge": 192, "STATISTICS": 1, "TIED": False, "GROUP": shapes.GROUP}
    usual, stays = softmax_forward.softmax_forward_kernel, softmax_forward_persistent.softmax_forward_persistent_kernel
    expected, got = launch_both(usual, stays, arguments, filled, processors)
    assert (expected["positive_logit"] != 0).sum() == 54
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


@STAYING
@pytest.mark.parametrize(("scale", "beyond"), ((14.3, ""), (300.0, "row"), (300.0, "column")))
def test_programs_that_stay_fill_the_same_block_of_g(scale, beyond, processors):
    """In range, and where some rows' or some columns' flags alone say otherwise; beyond its tiles the scratch is left
    alone."""
    x, y, scale = operands(160, 160, 48, scale=scale)
    problem = Problem(x, y, scale, torch.arange(160))
    statistics = backends.registered()["triton"].forward(problem)
    rows, columns = torch.rand(2, 1, 160, generator=torch.Generator().manual_seed(0))
    (launch_pass,), _ = passes(problem)
    gradient = StatisticsGradient(rows, columns, torch.zeros(160))
    (vectors,), _ = coefficients.prepare([launch_pass], statistics, gradient, None)
    for direction in ("row", "column"):
        flags = vectors[f"{direction}_in_range"]
        assert bool(flags.all()) == (beyond == "")
        if direction != beyond:
            flags.fill_(1)
    filled = {"g": torch.full((256, 256), 7.0)}
    arguments = launch_pass.arguments | launch.constants(launch_pass, TILE) | vectors
    arguments |= {"previous": None, "mirror_g": filled["g"], "edge": 256, "TIED": False, "GROUP": shapes.GROUP}
    usual = softmax_backward.softmax_backward_kernel
    stays = softmax_backward_persistent.softmax_backward_persistent_kernel
    expected, got = (own["g"] for own in launch_both(usual, stays, arguments, filled, processors))
    block = expected[:54, :130]
    assert block.diagonal(76).eq(0).all() and block.ne(0).sum() > 3000
    torch.testing.assert_close(got[:54, :130], block, rtol=1e-6, atol=0)
    assert got[64:].eq(7).all() and got[:, 192:].eq(7).all()


@pytest.mark.parametrize(
    "test",
    (
        test_loss.test_adversarial_values_stay_finite,
        test_loss.test_nan_in_nan_out,
        test_loss.test_retrieval_ranks,
        test_loss.test_ranks_with_labels_and_ties,
        test_loss.test_strides,
    ),
    ids=lambda test: test.__name__,
)
def test_the_suite_of_every_backend(test):
    test("triton")


def test_ranks_over_super_blocks_and_segments(monkeypatch):
    monkeypatch.setattr(launch, "SCRATCH", 40_000)
    monkeypatch.setattr(edges, "most", lambda: 40_000)
    n = 150
    x, scale = unit_rows(n, 16, dtype=torch.float32), torch.tensor(20.0)
    y = matching_rows(x, noise=1.5)
    _, ranks = softclip_loss_with_ranks(x, y, scale, SQUARE_TARGETS["psd_block"](n, n), backend="triton")
    _, expected = softclip_loss_with_ranks(x, y, scale, SQUARE_TARGETS["psd_block"](n, n), backend="reference")
    assert expected.rows.max() > 0
    assert torch.equal(ranks.rows, expected.rows) and torch.equal(ranks.columns, expected.columns)


def test_a_mirror_has_segments_of_its_own():
    """Pairs that do not count are other ones in the mirror where rows and columns have different segments; with a tied
    teacher, whose exponentials are the student's but for that."""
    generator = torch.Generator().manual_seed(0)
    x, y, scale = operands(97, 97, 16)
    segments = [torch.randint(0, 2, (97,), generator=generator) for _ in range(2)]
    problem = Problem(x, y, scale, torch.arange(97), *segments, (TeacherOperand(Source.TRANSPOSED),))
    found, expected = (backends.registered()[name].forward(problem) for name in ("triton", "reference"))
    torch.testing.assert_close(found.rows.packed, expected.rows.packed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.columns.packed, expected.columns.packed, rtol=1e-4, atol=1e-4)


class _Never:
    """Stands for a kernel that returns at once."""

    arg_names = ("x", "y")

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


def test_the_online_kernel_is_what_saves_extreme_rows(monkeypatch):
    """One long row puts the bound 800 nats above all others, whose centered sums vanish."""
    x = unit_rows(40, 16, dtype=torch.float32)
    y, scale = -x, torch.tensor(400.0)
    x[0] *= 3
    expected = softclip_loss(x, y, scale, backend="reference")
    torch.testing.assert_close(softclip_loss(x, y, scale, backend="triton"), expected)
    monkeypatch.setattr(online, "online_kernel", _Never())
    assert (softclip_loss(x, y, scale, backend="triton") - expected).abs() > 10


def test_the_branch_out_of_range_is_what_saves_extreme_gradients(monkeypatch):
    """The same for the backward kernel, whose tiles are told that everything is in range."""
    x = unit_rows(40, 16, dtype=torch.float32)
    y, scale = -x, torch.tensor(400.0)
    x[0] *= 3
    expected = Result.of_loss(x, y, scale, None, backend="reference")
    torch.testing.assert_close(
        Result.of_loss(x, y, scale, None, backend="triton").dx, expected.dx, rtol=1e-3, atol=1e-3
    )
    prepare = coefficients.prepare

    def all_in_range(*arguments):
        vectors, positive = prepare(*arguments)
        for direction in ("row", "column"):
            vectors[0][f"{direction}_in_range"].fill_(1)
        return vectors, positive

    monkeypatch.setattr(coefficients, "prepare", all_in_range)
    assert not torch.allclose(Result.of_loss(x, y, scale, None, backend="triton").dx, expected.dx, rtol=0.1, atol=0.1)


def test_fresh_memory_is_never_read():
    """Uninitialized tensors come filled with NaN under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for name in ("hard", "psd", "psd_several", "teacher_potentials"):
            check(name, 97, 97, 40)
    finally:
        torch.use_deterministic_algorithms(False)


def test_repeats_are_bitwise_equal():
    """Ten here, where programs run one after the other; 250 on a GPU."""
    x, y, scale = operands(97, 97, 40)
    target = SQUARE_TARGETS["psd"](97, 97)
    first = Result.of_loss(x, y, scale, target, backend="triton")
    for _ in range(10):
        again = Result.of_loss(x, y, scale, target, backend="triton")
        assert not first.differing(again)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_other_dtypes_are_refused(dtype):
    x = unit_rows(4, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match=str(dtype)):
        softclip_loss(x, x, torch.tensor(1.0), backend="triton")


def test_auto_takes_triton_first():
    x = unit_rows(4, 8, dtype=torch.float32)
    assert backends.select("auto", Problem(x, x, torch.tensor(1.0))).name == "triton"


def test_float16_gradients_are_taken_in_a_unit_that_holds_them():
    """The largest becomes 2^12; without a gradient, or with an infinite one, nothing is rescaled."""
    rows = torch.tensor([[1e-7, -3e-6]])
    unit = launch.unit(torch.float16, rows, torch.zeros(1, 3))
    assert unit is not None
    assert (rows / unit).abs().max() == pytest.approx(2**12)
    assert launch.unit(torch.float16, torch.zeros(1, 2), torch.zeros(1, 3)) == 1
    assert launch.unit(torch.float16, torch.tensor([[torch.inf]]), torch.zeros(1, 3)) == 1
    assert launch.unit(torch.bfloat16, rows, rows) is None


def test_launch_results_have_the_backend_protocol_types():
    x, y, scale = operands(40, 40, 16)
    loss = Result.of(lambda *leaves: softclip_loss(*leaves, Hard(), backend="triton"), x, y, scale)
    assert [getattr(loss, field).dtype for field in FIELDS] == [torch.float32] * 4


def _doubled(tensors):
    return [each.double() if each is not None and each.is_floating_point() else each for each in tensors]


# At scale 60 the positives' probabilities reach 1.
@pytest.mark.parametrize("scale", (1.0, 60.0))
@pytest.mark.parametrize("sources", ((), *((source,) for source in Source), tuple(Source)), ids=str)
def test_the_positives_gradients_are_those_of_pytorch(sources, scale):
    """Of the kernel, about as accurate as PyTorch's in fp32, from the same statistics: positives on the diagonal, and
    any others, some in another block; biases, excluded pairs, several teachers."""
    n, d = 150, 70
    generator = torch.Generator().manual_seed(0)
    x = unit_rows(n, d, dtype=torch.float32)
    y = matching_rows(x, noise=0.3)
    row_bias, column_bias = (torch.randn(n, generator=generator) for _ in range(2))
    column_bias[5] = -torch.inf
    teachers = tuple(
        TeacherOperand(source, torch.tensor(0.7), *embeddings, row_bias, column_bias)
        for source in sources
        for embeddings in [(x[:, :40], y[:, :40]) if source == Source.EMBEDDINGS else (None, None)]
    )
    segments = [torch.randint(0, 2, (n,), generator=generator) for _ in range(2)]
    for positive_column in (torch.arange(n), torch.randint(-1, n + 1, (n,), generator=generator)):
        problem = Problem(x, y, torch.tensor(scale), positive_column, *segments, teachers)
        statistics = backends.registered()["triton"].forward(problem)
        rows, columns = (torch.randn(1 + len(teachers), n, generator=generator) for _ in range(2))
        gradient = StatisticsGradient(rows, columns, torch.randn(n, generator=generator))
        _, got = coefficients.prepare(passes(problem)[0], statistics, gradient, None)
        expected = positives.gradient(problem, statistics, gradient)
        exact = positives.gradient(
            Problem.of(_doubled(problem.tensors()), problem.sources()),
            Statistics.of(*_doubled(statistics.tensors())),
            StatisticsGradient(*_doubled(gradient)),
        )
        assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6


def _teachers(kind, n):
    own = TeacherOperand(Source.EMBEDDINGS, torch.tensor(9.0), *(unit_rows(n, 5, seed=seed).float() for seed in (3, 4)))
    return {"hard": (), "mirrored": (TeacherOperand(Source.TRANSPOSED),), "own teacher": (own,)}[kind]


# Super-blocks of 64: 3 x 3, or 3 on the diagonal and 3 beside it, each of which fills its mirror too.
@pytest.mark.parametrize("kind", ("hard", "mirrored", "own teacher"))
def test_an_operand_without_a_gradient_costs_no_product(kind, monkeypatch):
    """Of the products G @ y and G.T @ x only those are made whose result is asked for, bit for bit as in both; with
    neither nothing runs."""
    n, d = 150, 12
    x, y = (unit_rows(n, d, seed=seed, dtype=torch.float32) for seed in (1, 2))
    problem = Problem(x, y, torch.tensor(10.0), torch.arange(n), teachers=_teachers(kind, n))
    triton = backends.registered()["triton"]
    statistics = triton.forward(problem)
    rows, columns = (torch.rand(1 + len(problem.teachers), n) for _ in range(2))
    gradient = StatisticsGradient(rows, columns, torch.zeros(n))
    monkeypatch.setattr(softmax_backward, "_edge", lambda *_: 64)
    launched, ordinary = [], call.Call.__call__

    def counted_call(self, programs, **changing):
        launched.append(self)
        ordinary(self, programs, **changing)

    def counts():
        of_products = [each.fixed for each in launched if each.kernel is products.products_kernel]
        counted = [sum(fixed[total] is not None for fixed in of_products) for total in ("gx", "gy")]
        for kernel in (softmax_backward.softmax_backward_kernel, coefficients.coefficients_kernel):
            counted.append(sum(each.kernel is kernel for each in launched))
        launched.clear()
        return counted

    monkeypatch.setattr(call.Call, "__call__", counted_call)
    dx, dy, _ = triton.backward(problem, statistics, gradient, Wanted(scale=False))
    blocks = 6 if kind == "mirrored" else 9
    assert counts() == [blocks, blocks, blocks, 1]
    for needed in ((True, False), (False, True), (False, False)):
        *alone, _ = triton.backward(problem, statistics, gradient, Wanted(*needed, scale=False))
        for result, both, wanted in zip(alone, (dx, dy), needed, strict=True):
            assert torch.equal(result, both) if wanted else result is None
        assert counts() == [blocks * needed[0], blocks * needed[1], *((blocks, 1) if any(needed) else (0, 0))]
