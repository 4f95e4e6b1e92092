"""What calls over small batches keep from one to the next (softmax._known_of) changes none of them."""

from __future__ import annotations

import re
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from softclip_kernels import Hard, Mix, SelfTeacher, softclip_loss
from softclip_kernels.losses import softmax
from softclip_kernels.testing import Result, operands

N, D = 12, 8


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Nothing, as in a new process."""
    monkeypatch.setattr(softmax, "_by_shapes", {})
    return softmax._by_shapes


def loss_of(target=None, n=N, **options):
    return Result.of_loss(*operands(n, n, D, dtype=torch.float32), target, **options)


def of_two_calls(first, second):
    """The second's result after the first, and in a process of its own."""
    first()
    after = second()
    softmax._by_shapes.clear()
    return after, second()


OTHERS = {
    "labels": lambda: loss_of(Hard(torch.arange(N).flip(0))),
    "psd": lambda: loss_of(Mix(Hard(), SelfTeacher(swap="paired"), 0.5)),
    "smoothing": lambda: loss_of(Hard(smoothing=0.1)),
    "sum": lambda: loss_of(reduction="sum"),
    "rows": lambda: loss_of(direction="rows"),
    "more rows": lambda: loss_of(n=N + 1),
    "float64": lambda: Result.of_loss(*operands(N, N, D, dtype=torch.float64)),
    "another backend": lambda: loss_of(backend="reference"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_is_not_taken_for_one_before(name):
    after, alone = of_two_calls(loss_of, OTHERS[name])
    assert not after.differing(alone)
    assert loss_of().differing(after)


def test_a_call_like_one_before_has_other_values(known):
    x, y, scale = operands(N, N, D, dtype=torch.float32)
    after, alone = of_two_calls(loss_of, lambda: Result.of_loss(y, x, 2 * scale, Hard()))
    assert len(known) == 1 and not after.differing(alone) and loss_of().differing(after)


def test_what_may_be_wrong_with_a_call_like_one_before_is_still_an_error(known):
    x, y, scale = operands(N, N, D, dtype=torch.float32)
    softclip_loss(x, y, scale)
    assert len(known) == 1
    with pytest.raises(ValueError, match=r"logit_scale is 0\.0; it must be positive"):
        softclip_loss(x, y, torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"logit_scale must be one floating number, .*not shape \(2,\)"):
        softclip_loss(x, y, torch.ones(2))
    with pytest.raises(TypeError, match=r"x is torch.float32 but y is torch.float64"):
        softclip_loss(x, y.double(), scale)
    with pytest.raises(ValueError, match="pairs row i with column i"):
        softclip_loss(x, y[1:], scale)
    with pytest.raises(TypeError, match=r"x has layout torch.sparse_coo"):
        softclip_loss(x.to_sparse(), y, scale)
    for _ in range(2):
        with pytest.raises(ValueError, match="a loss over 0 rows and 0 columns is undefined"):
            softclip_loss(x[:0], y[:0], scale)
    with pytest.raises(TypeError, match="target must be a target, such as Hard"):
        softclip_loss(x, y, scale, torch.arange(N))
    for name, value in (("reduction", "median"), ("direction", "up"), ("backend", "cuda"), ("reduction", ["mean"])):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not known")):
            softclip_loss(x, y, scale, **{name: value})


def test_calls_after_one_in_inference_mode_learn():
    """Its tensors cannot be saved for a backward pass."""
    with torch.inference_mode():
        softclip_loss(*operands(N, N, D, dtype=torch.float32))
    assert loss_of().dx.any()


def test_calls_after_one_with_fake_tensors_are_real(known):
    with FakeTensorMode():
        softclip_loss(torch.empty(N, D), torch.empty(N, D), 9.0)
    assert not known
    assert loss_of().loss.isfinite()


def test_only_so_much_is_kept(known, monkeypatch):
    for n in range(1, 3 * softmax.MOST_KNOWN):
        loss_of(n=n)
        assert 1 <= len(known) <= softmax.MOST_KNOWN
    known.clear()
    monkeypatch.setitem(softmax.SMALL, "cpu", N)
    loss_of(n=N + 1)
    assert not known
    loss_of(n=N)
    assert len(known) == 1


@pytest.fixture
def gpus(monkeypatch):
    """GPUs that are none: a Request for tensors on them, on the current stream, where a graph may be captured."""
    state = types.SimpleNamespace(stream=7, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(softmax.ops, "watched", lambda x: False)

    class OnGpu:
        dtype, layout, shape = torch.bfloat16, torch.strided, torch.Size([N, D])

        def __init__(self, n, device):
            self.n, self.device = n, torch.device("cuda", device)

        def __len__(self):
            return self.n

        def dim(self):
            return 2

    state.known = lambda n=N, x=0, y=0: softmax._known_of(softmax.Request(OnGpu(n, x), OnGpu(n, y), 1.0))
    return state


def test_a_gpus_streams_keep_their_own(gpus):
    """Nobody but a stream waits for what it computes."""
    first = gpus.known()
    assert gpus.known() is first and first.kept is not None
    gpus.stream = 8
    assert gpus.known() is not first
    gpus.stream = 7
    assert gpus.known() is first


def test_every_gpu_keeps_its_own(gpus):
    """And operands on two of them are not those of one, which were right."""
    assert len({id(gpus.known(x=x, y=y)) for x in (0, 1) for y in (0, 1)}) == 4


def test_nothing_is_kept_of_a_graph_or_for_it(gpus):
    """What it computes is there when it is replayed, and what it reads must stay where it was."""
    first, gpus.capturing = gpus.known(), True
    captured = gpus.known()
    assert captured is not first and captured.kept is None and captured is not gpus.known()


def test_nothing_large_is_kept(gpus):
    assert gpus.known(n=softmax.SMALL["cuda"] + 1).kept is None


def test_row_numbers_are_kept(known):
    """Whatever the target around them."""
    half = Mix(Hard(), SelfTeacher(swap="paired"), 0.5)
    loss_of(half)
    (kept,) = [each.kept["row numbers"] for each in known.values()]
    loss_of(half)
    assert next(each.kept["row numbers"] for each in known.values()) is kept and kept.tolist() == list(range(N))
