"""The custom operators in PyTorch's own ecosystem: opcheck, gradcheck, torch.compile, autocast, no_grad, memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.backends import BACKENDS
from helpers.products import Shapes

from softclip_kernels import Hard, SoftClipLoss, ops, softclip_loss, softclip_loss_with_ranks
from softclip_kernels.backends import chunked
from softclip_kernels.distributed.agreement import make_layout
from softclip_kernels.problem import Problem
from softclip_kernels.stats import StatisticsGradient
from softclip_kernels.targets import Context
from softclip_kernels.testing import ALL_TARGETS, Result, matching_rows, unit_rows


def lowered_problem(name: str, backend: str, n: int = 20, d: int = 6) -> Problem:
    dtype = torch.float64 if backend in ("reference", "chunked") else torch.float32
    x, y = (unit_rows(n, d, seed=seed, dtype=dtype) for seed in (0, 1))
    scale = torch.tensor(10.0, dtype=dtype)
    context = Context((x, y, scale), make_layout(x, y, None), backend)
    return ALL_TARGETS[name](n, n).lower(context).complete(context).lowered.problem(x, y, scale)


# Between them: no teacher, each teacher source, biases, several teachers, segments, no positive.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("hard", "psd", "psd_no_swap", "psd_several_block", "teacher_sinkhorn"))
def test_opcheck(name, backend):
    check_operators(name, backend)


def check_operators(name, backend):
    problem = lowered_problem(name, backend)
    arguments = [*ops.pack(problem.tensors(), problem.sources()), backend]
    torch.library.opcheck(ops.forward, arguments)
    *statistics, _, _, scalars = ops.forward(*arguments)
    gradient = StatisticsGradient.of(*statistics[:2], torch.ones_like(statistics[2]))
    for needed in ([True, True, True], [False, True, True], [True, False, False], [False, False, True]):
        torch.library.opcheck(ops.backward, (*arguments, *statistics, scalars, *gradient, [*needed, True]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_with_ranks(backend):
    problem = lowered_problem("hard", backend)
    threshold = torch.zeros(20, dtype=problem.x.dtype)
    ranked = replace(problem, row_threshold=threshold, column_threshold=threshold)
    torch.library.opcheck(ops.forward, (*ops.pack(ranked.tensors(), ranked.sources()), backend))


# A self teacher is a constant to the loss but not to a finite difference, so these have none; the comparison with the
# dense loss in float64 covers the others.
FIXED_TARGETS = ("hard", "smoothing", "psd_external", "psd_several_block", "labels_smoothing", "groups_smoothing")
FIXED_TARGETS += (
    "dense_both",
    "teacher_column",
    "teacher_sinkhorn",
    "teacher_potentials",
    "blend_vectors",
    "two_indices",
)


@pytest.mark.parametrize("backend", ("reference", "chunked"))
@pytest.mark.parametrize("name", FIXED_TARGETS)
def test_gradcheck(name, backend):
    n = 5
    target = ALL_TARGETS[name](n, n)
    x, y = unit_rows(n, 3).requires_grad_(), unit_rows(n, 3, seed=1).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: softclip_loss(*leaves, target, backend=backend), (x, y, scale))


# Between them: indices, groups, both kinds of self teacher, potentials computed by the operator itself, segments.
@pytest.mark.parametrize("name", ("hard", "smoothing", "psd", "psd_block", "self_sinkhorn"))
def test_compiles_to_one_graph(name):
    """torch.compile(fullgraph=True) gives the eager loss and gradients, through the towers' last layer as well."""
    n = 33
    target = ALL_TARGETS[name](n, n)
    weight = unit_rows(6, 6, dtype=torch.float32).requires_grad_()
    images, texts = unit_rows(n, 6, dtype=torch.float32), unit_rows(n, 6, seed=1, dtype=torch.float32)
    scale = torch.tensor(10.0, requires_grad=True)

    def loss(weight, scale):
        return softclip_loss(torch.nn.functional.normalize(images @ weight, dim=1), texts, scale, target)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(weight, scale), (weight, scale))
    for gradient, other in zip(torch.autograd.grad(compiled(weight, scale), (weight, scale)), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_ranks_compile_to_one_graph():
    x, y = unit_rows(33, 6, dtype=torch.float32), unit_rows(33, 6, seed=1, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(softclip_loss_with_ranks, fullgraph=True, backend="aot_eager")
    (loss, ranks), (expected, same) = (f(x, y, torch.tensor(10.0)) for f in (compiled, softclip_loss_with_ranks))
    torch.testing.assert_close(loss, expected)
    assert torch.equal(ranks.rows, same.rows) and torch.equal(ranks.columns, same.columns)


@pytest.mark.parametrize("name", ("labels", "groups", "dense"))
def test_a_target_of_given_size_in_a_graph_of_any_batch_size(name):
    """Once a second size was seen, sizes are symbols, and the target's own are numbers."""
    torch.compiler.reset()
    scale = torch.tensor(10.0)
    for n in (5, 7):
        torch.compile(SoftClipLoss(), backend="eager", fullgraph=True)(unit_rows(n, 4), unit_rows(n, 4, seed=1), scale)
    x, y, target = unit_rows(6, 4), unit_rows(6, 4, seed=1), ALL_TARGETS[name](6, 6)
    compiled = torch.compile(SoftClipLoss(target), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y, scale), softclip_loss(x, y, scale, target))


# Kernels, and the terms outside them that multiply matrices: a dense target, tables of groups.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ("psd_external", "teacher_sinkhorn", "dense", "groups"))
def test_autocast_leaves_the_loss_in_full_precision(name, backend):
    x, y = unit_rows(65, 16, dtype=torch.float32), unit_rows(65, 16, seed=1, dtype=torch.float32)
    target = ALL_TARGETS[name](65, 65)

    def loss(*leaves):
        return softclip_loss(*leaves, target, backend=backend)

    def inside(*leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*leaves)

    outer, inner = (Result.of(function, x, y, torch.tensor(50.0)) for function in (loss, inside))
    assert not inner.differing(outer)


@pytest.mark.parametrize("wide", ("x", "y"))
def test_two_dtypes_under_autocast_become_its_own(wide):
    """A tower that ends with a linear layer and one that ends with a normalization: bfloat16 and float32."""
    x, y, scale = (unit_rows(9, 4, dtype=torch.float32), unit_rows(9, 4, seed=1, dtype=torch.float32), 50.0)
    expected = softclip_loss(x.bfloat16(), y.bfloat16(), scale)
    x, y = (x, y.bfloat16()) if wide == "x" else (x.bfloat16(), y)
    x.requires_grad_(), y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = softclip_loss(x, y, scale)
    loss.backward()
    assert torch.equal(loss, expected) and (x.grad.dtype, y.grad.dtype) == (x.dtype, y.dtype)
    with pytest.raises(TypeError, match=r"y.to\(x.dtype\)"):
        softclip_loss(x, y, scale)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        softclip_loss(x, y.double(), scale)


def test_no_grad_and_inference():
    x, y, scale = unit_rows(9, 4), unit_rows(9, 4, seed=1), torch.tensor(5.0, dtype=torch.float64)
    expected = softclip_loss(x.requires_grad_(), y, scale)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss = SoftClipLoss()(x, y, scale)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_only_where_asked(wanted):
    """With one of the three operands requiring a gradient, that gradient is the one of all three together."""
    operands = (unit_rows(9, 4), unit_rows(9, 4, seed=1), torch.tensor(5.0, dtype=torch.float64))
    leaves = [operand.clone().requires_grad_() for operand in operands]
    expected = torch.autograd.grad(softclip_loss(*leaves), leaves)[wanted]
    only = [operand.clone().requires_grad_(index == wanted) for index, operand in enumerate(operands)]
    torch.testing.assert_close(torch.autograd.grad(softclip_loss(*only), only[wanted])[0], expected)


def test_a_second_derivative_is_refused():
    x = unit_rows(9, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(softclip_loss(x, x.detach(), torch.ones(())), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.fixture
def transparent_ops(monkeypatch):
    """The operators as plain functions, so that a dispatch mode sees what happens inside."""
    monkeypatch.setattr(ops, "forward", ops.run_forward)
    monkeypatch.setattr(ops, "backward", ops.run_backward)


# Dense targets are (N, M) tensors that the user brings.
@pytest.mark.parametrize("name", [name for name in ALL_TARGETS if not name.startswith("dense")])
def test_no_matrix_of_all_pairs(name, transparent_ops):
    """Of PyTorch's operators, in the chunked backend and around every kernel: neither pass holds anything larger than a
    block or a handful of embeddings; the reference, for contrast, does."""
    n, d = 300, 8
    target = ALL_TARGETS[name](n, n)

    def largest(backend):
        x, y = unit_rows(n, d).requires_grad_(), unit_rows(n, d, seed=1).requires_grad_()
        with Shapes() as mode:
            softclip_loss(x, y, torch.tensor(10.0, dtype=torch.float64), target, backend=backend).backward()
        return max(map(math.prod, mode.seen))

    embeddings, teacher = n * d, n * 24
    assert largest("chunked") <= max(chunked.BLOCK["cpu"] ** 2, 4 * embeddings, 2 * teacher) < n * n / 4
    if name in ("hard", "psd"):
        assert largest("reference") >= n * n


def test_ranks_come_from_the_same_pass(monkeypatch):
    """One forward call serves the loss and the ranks."""
    calls = []
    forward = chunked.ChunkedBackend.forward
    monkeypatch.setattr(chunked.ChunkedBackend, "forward", lambda *a: calls.append(1) or forward(*a))
    x = unit_rows(30, 4)
    softclip_loss_with_ranks(x, matching_rows(x), torch.tensor(3.0), backend="chunked")
    assert len(calls) == 1


def test_initial_loss_is_log_n():
    """With a scale near 0 every row sees N equal columns."""
    x, y = unit_rows(64, 8), unit_rows(64, 8, seed=1)
    assert softclip_loss(x, y, torch.tensor(1e-9), Hard()).item() == pytest.approx(math.log(64), rel=1e-6)
