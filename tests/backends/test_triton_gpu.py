"""The Triton kernels on a GPU: every target and dtype against float64, repeats, ranks, memory. Needs torch, triton and
pytest only; `python -m bench gpu` runs this file first, over several processes. Without a GPU,
tests/benchmarks/test_gpu_suite.py walks through it on small sizes with another backend."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import torch
from helpers import candidates, mutants
from loss import test_loss

from bench import problems
from bench.gpu import graphs
from softclip_kernels import Hard, softclip_loss, softclip_loss_with_ranks, testing
from softclip_kernels.backends.cuda import kernels
from softclip_kernels.testing import (
    ALL_TARGETS,
    FIELDS,
    RECTANGULAR_TARGETS,
    SQUARE_TARGETS,
    Result,
    Standard,
    assert_as_accurate_as_dense,
    contested_rows,
    matching_rows,
    unit_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run on a machine with a GPU"),
]

DEVICE, BACKEND = "cuda", "triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A tile is up to 128 x 256, a step along the width 64: sizes below, at and beyond them, ragged and whole. 1 and
# multiples of 16 are numbers for which Triton compiles variants of their own. Not fewer than one row with four columns:
# groups and smoothing then leave a gradient of a few hundredths of its parts, which autograd adds in 16 bits.
SQUARE_SIZES = ((1, 3), (129, 40), (512, 64), (1000, 96), (2048, 768))
RECTANGULAR_SIZES = ((1, 4, 8), (127, 300, 100), (512, 256, 64), (1000, 333, 832))
SCALED = (700, 128)
MUTATED = (300, 40)
SUPER_BLOCKS = (6000, 64)  # N of several super-blocks of 4096 in the backward pass
ADVERSARIAL = (300, 64)
HOPPER_SIZES = ((1, 64), (65, 64), (129, 128), (700, 320), (1000, 512))  # the CUDA kernels': tiles of 128 x 128
CANDIDATES = ((700, 128), (1000, 512))  # ragged rows, widths of the widest tiles
REPEATED = ((5000, 96), (5000, 512))
REPEATS = 250
CAPTURED = (1000, 512)
LAID_OUT = (300, 64)
UNINITIALIZED = ((129, 40), (700, 128))
RANKED = (700, 16)
MEMORY = (16384, 512)


@pytest.fixture(autouse=True)
def _memory_goes_back():
    """To the other processes that share the GPU."""
    yield
    torch.cuda.empty_cache()


def changed(value, change):
    """A target with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(changed(one, change) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value) if field.init)
        return dataclasses.replace(value, **{name: changed(getattr(value, name), change) for name in fields})
    return value


def moved(value, device):
    return changed(value, lambda tensor: tensor.to(device))


def operands(n, m, d, dtype, scale=14.3):
    return tuple(one.to(DEVICE) for one in testing.operands(n, m, d, dtype=dtype, scale=scale))


def fused(x, y, scale, target):
    return Result.of_loss(x, y, scale, target, backend=BACKEND)


def target_of(name, n, m, d, dtype):
    """A target of the catalogue; psd_teacher is what bench/ times, with embeddings of the student's width and dtype."""
    return moved(ALL_TARGETS[name](n, m) if name in ALL_TARGETS else problems.target(name, n, d, dtype), DEVICE)


def check(name, n, m, d, dtype, scale=14.3):
    target = target_of(name, n, m, d, dtype)
    x, y, scale = operands(n, m, d, dtype, scale)
    signal = test_loss.has_signal(n, m, d)
    assert_as_accurate_as_dense(fused(x, y, scale, target), x, y, scale, target, signal=signal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SQUARE_TARGETS)
def test_square_targets(name, dtype):
    for n, d in SQUARE_SIZES:
        check(name, n, n, d, dtype)


@contextlib.contextmanager
def by_the_cuda_kernels(monkeypatch, surely=True):
    """Within, whatever the CUDA kernels take is theirs; and `surely`: something is."""
    why_not = kernels.why_not(torch.device(DEVICE))
    if why_not is not None:
        pytest.skip(f"the CUDA kernels were not run: {why_not}")
    from softclip_kernels.backends.triton import cuda_call

    made, launched = [], cuda_call.launched
    monkeypatch.setenv("SOFTCLIP_CUDA", "1")
    monkeypatch.setenv("SOFTCLIP_REPLAY", "0")  # where launches go another way
    monkeypatch.setattr(cuda_call, "launched", lambda *given: (made.append(1), launched(*given)))
    yield
    assert made or not surely
    monkeypatch.delenv("SOFTCLIP_CUDA")


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", (*SQUARE_TARGETS, "psd_teacher"))
def test_square_targets_by_the_cuda_kernels(name, dtype, monkeypatch):
    """Ragged sizes; a target or a pass that they do not take falls back to Triton."""
    with by_the_cuda_kernels(monkeypatch, surely=False):
        for n, d in HOPPER_SIZES:
            check(name, n, n, d, dtype)
            with candidates.small_super_blocks():
                check(name, n, n, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("scale", (1.0, 100.0, 300.0))
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_teacher"))
def test_scales_by_the_cuda_kernels(name, scale, dtype, monkeypatch):
    n, d = SCALED
    with by_the_cuda_kernels(monkeypatch):
        check(name, n, n, d, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECTANGULAR_TARGETS)
def test_rectangular_targets(name, dtype):
    for n, m, d in RECTANGULAR_SIZES:
        check(name, n, m, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (1.0, 100.0, 300.0))
@pytest.mark.parametrize("name", ("hard", "psd", "psd_own_scale", "psd_external", "psd_several", "psd_block"))
def test_scales(name, scale, dtype):
    n, d = SCALED
    check(name, n, n, d, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_TARGETS)
def test_every_mutant_is_refused(name, dtype):
    """What a broken kernel would return, at every scale (mutants.py)."""
    n, d = MUTATED
    target = moved(ALL_TARGETS[name](n, n), DEVICE)
    for scale in mutants.SCALES:
        found = mutants.refusals(*operands(n, n, d, dtype, scale), target, BACKEND)
        assert mutants.MISSED not in found.values(), (scale, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("hard", "psd"))
def test_super_blocks(name, dtype):
    n, d = SUPER_BLOCKS
    check(name, n, n, d, dtype, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ("huge", "identical", "opposite", "zero row"))
def test_adversarial_values(case, dtype):
    n, d = ADVERSARIAL
    base = unit_rows(n, d, dtype=torch.float32)
    zero_row = base.clone()
    zero_row[3] = 0
    x, y, scale = {
        "huge": (base * 1e2, base * -1e2, 1.0),
        "identical": (base[:1].expand(n, d), base[:1].expand(n, d), 100.0),
        "opposite": (base, -base, 100.0),
        # With rows that match, one row of 300 is all of dscale's signal: less than a logit's rounding may hide.
        "zero row": (zero_row, contested_rows(base, 100.0), 100.0),
    }[case]
    x, y, scale = x.to(DEVICE, dtype), y.to(DEVICE, dtype), torch.tensor(scale, device=DEVICE)
    for name in ("hard", "psd"):
        target = moved(SQUARE_TARGETS[name](n, n), DEVICE)
        result = fused(x, y, scale, target)
        assert all(getattr(result, field).isfinite().all() for field in FIELDS)
        # Identical rows have no gradient but rounding.
        assert_as_accurate_as_dense(result, x, y, scale, target, signal=case != "identical")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", range(len(CANDIDATES)))
@pytest.mark.parametrize("name", ("hard", "psd", "psd_teacher"))
def test_every_candidate_tile(name, size, dtype, monkeypatch):
    """In one super-block and in many: on the diagonal and beside it, at the ends and within."""
    n, d = CANDIDATES[size]
    for _ in candidates.every(lambda: check(name, n, n, d, dtype), monkeypatch):
        check(name, n, n, d, dtype)
        with candidates.small_super_blocks():
            check(name, n, n, d, dtype)


# The kernels with every tile, and what torch adds up around them: rows that share a column (labels) or a group.
@pytest.mark.parametrize("name", ("hard", "psd", "psd_teacher", "psd_several", "labels", "groups"))
def test_repeats_are_bitwise_equal(name, monkeypatch):
    for n, d in REPEATED:
        target = target_of(name, n, n, d, torch.bfloat16)
        given = (*operands(n, n, d, torch.bfloat16), target)
        for _ in candidates.every(functools.partial(fused, *given), monkeypatch):
            first = fused(*given)
            for _ in range(REPEATS):
                assert not first.differing(fused(*given))


@pytest.mark.parametrize("forced", ("", "1"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("hard", "psd", "psd_external", "psd_teacher", "groups"))
def test_a_cuda_graph_replays_the_loss(name, dtype, forced, monkeypatch):
    """Bit for bit what is computed without one, with other data than it was captured with."""
    n, d = CAPTURED
    if forced and kernels.why_not(torch.device(DEVICE)) is not None:
        pytest.skip(f"the CUDA kernels were not run: {kernels.why_not(torch.device(DEVICE))}")
    monkeypatch.setenv("SOFTCLIP_CUDA", forced)
    target = target_of(name, n, n, d, dtype)
    x, y, scale = operands(n, n, d, dtype)
    _, replay = graphs.captured(lambda: fused(x, y, scale, target), DEVICE)
    for other_scale in (30.0, 5.0):
        for operand, other in zip((x, y, scale), operands(n, n, d, dtype, other_scale), strict=True):
            operand.copy_(other.roll(1, 0) if other.dim() else other)
        assert not fused(x, y, scale, target).differing(replay())


@pytest.mark.parametrize("name", ("hard", "psd", "psd_external"))
def test_a_loss_stays_on_its_stream(name):
    """Its operands are there late, and only for those who wait on the stream."""
    n, d = SCALED
    target = moved(ALL_TARGETS[name](n, n), DEVICE)
    x, y, scale = operands(n, n, d, torch.bfloat16)
    expected, late, beside = fused(x, y, scale, target), torch.full_like(x, torch.nan), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(beside):
        torch.cuda._sleep(100_000_000)  # cycles: 50 ms
        late.copy_(x)
        result = fused(late, y, scale, target)
    torch.cuda.synchronize()
    assert not expected.differing(result)


def _shifted(matrix):
    """Contiguous, from the second entry of its memory on."""
    memory = matrix.new_zeros(matrix.numel() + 1)
    return memory[1:].view_as(matrix).copy_(matrix)


LAYOUTS = {
    "shifted": _shifted,
    "columns of a wider one": lambda matrix: torch.cat([matrix[:, :1], matrix], 1)[:, 1:],
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "every other": lambda matrix: matrix.repeat_interleave(2, 1)[:, ::2],
    "one row": lambda matrix: matrix[:1].expand_as(matrix),
}


# Each is a kernel of its own to compile, so the teachers' are tried in one dtype.
@pytest.mark.parametrize(
    ("name", "dtype"),
    (*(("hard", dtype) for dtype in DTYPES), ("psd", torch.bfloat16), ("psd_external", torch.bfloat16)),
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("forced", ("", "1"))  # of the CUDA kernels, which leave to Triton what does not stream
def test_layouts_of_operands(layout, name, dtype, forced, monkeypatch):
    """Of both embeddings and the teacher's; where all rows are one, of x alone: identical pairs have no gradient."""
    if forced and kernels.why_not(torch.device(DEVICE)) is not None:
        pytest.skip(f"the CUDA kernels were not run: {kernels.why_not(torch.device(DEVICE))}")
    monkeypatch.setenv("SOFTCLIP_CUDA", forced)
    (n, d), change = LAID_OUT, LAYOUTS[layout]
    target = moved(ALL_TARGETS[name](n, n), DEVICE)
    target = changed(target, lambda tensor: change(tensor) if tensor.dim() == 2 else tensor)
    x, y, scale = operands(n, n, d, dtype)
    x, y = change(x), y if layout == "one row" else change(y)
    assert_as_accurate_as_dense(fused(x, y, scale, target), x, y, scale, target)


@pytest.mark.filterwarnings("ignore:.*deterministic")  # of cuBLAS: its results are compared with a tolerance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("hard", "psd", "psd_several", "psd_block", "teacher_potentials", "groups"))
def test_fresh_memory_is_never_read(name, dtype):
    """Under deterministic algorithms torch fills uninitialized tensors with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3, device=DEVICE).isnan().all()
        for n, d in UNINITIALIZED:
            check(name, n, n, d, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=("highest", "high"))
def precision(request):
    """torch's setting for products of float32 matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(dtype):
    """A logit counts from a dot product's rounding above the positive's on, and has that rounding itself: in float64 it
    lies above the positive's, and above it by twice that much it must count."""
    n, d = RANKED
    x = unit_rows(n, d, dtype=torch.float32)
    x, y = (one.to(DEVICE, dtype) for one in (x, matching_rows(x, noise=1.5)))
    scale = torch.tensor(20.0, device=DEVICE)
    _, ranks = softclip_loss_with_ranks(x, y, scale, backend=BACKEND)
    z = x.double() @ y.double().T
    # Norms are at most 1 and a rounding to 16 bits.
    above = z.diagonal() + 2 * (4 + d**0.5) * torch.finfo(torch.float32).eps * 1.02
    for got, dim, positive, surely in (
        (ranks.rows, 1, z.diagonal()[:, None], above[:, None]),
        (ranks.columns, 0, z.diagonal()[None, :], above[None, :]),
    ):
        least, most = (z > surely).sum(dim), (z > positive).sum(dim)
        assert (least <= got).all() and (got <= most).all()
        assert (most > 0).any() and (most == 0).any() and (least == most).double().mean() > 0.9


@pytest.mark.parametrize("mib", (64, 384))
@pytest.mark.parametrize("name", ("hard", "psd"))
def test_memory_beyond_inputs_and_gradients(monkeypatch, name, mib):
    """The limit and 64 bytes a row beyond the gradients: what test_triton_operators.py counts where nothing runs."""
    monkeypatch.setenv("SOFTCLIP_GPU_MIB", str(mib))
    n, d = MEMORY
    x, y, scale = operands(n, n, d, torch.bfloat16)
    target = moved(SQUARE_TARGETS[name](n, n), DEVICE)
    fused(x, y, scale, target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(x, y, scale, target)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 2 * n * d * 2 + mib * 2**20 + 64 * n


def test_sampled_rows_beyond_two_to_the_31_elements():
    """N * D > 2^31: the last rows' losses and what they bring to every gradient are those of these rows alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    d = 2048
    check_last_rows(2**31 // d + 1000, d)


def check_last_rows(n, d, last=8):
    x = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16) / d**0.5
    y = unit_rows(64, d, dtype=torch.bfloat16).to(DEVICE)
    labels, scale = torch.arange(n, device=DEVICE) % 64, torch.tensor(10.0, device=DEVICE)
    leaves = [operand.requires_grad_() for operand in (x, y, scale)]
    losses = softclip_loss(*leaves, Hard(labels), reduction="none", backend=BACKEND).rows
    loss = losses[-last:].mean()
    dx, dy, dscale = torch.autograd.grad(loss, leaves)
    assert not dx[:-last].any()
    rows, y, scale = x[-last:].detach(), y.detach(), scale.detach()
    standard = Standard.of(rows, y, scale, Hard(labels[-last:]), direction="rows")
    standard.check(Result(loss.detach(), dx[-last:], dy, dscale))
    logits = scale.double() * rows.double() @ y.double().T
    expected = torch.nn.functional.cross_entropy(logits, labels[-last:], reduction="none")
    torch.testing.assert_close(losses[-last:].double(), expected, rtol=0.0, atol=standard.allowed["loss"])
