"""Passes that are replayed (replay.py): the same launches as before, of passes of the same kind alone."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from pathlib import Path

import pytest
import torch
from helpers import interpreter
from helpers.backends import needs_triton

from softclip_kernels import backends
from softclip_kernels.problem import Problem, Source, TeacherOperand
from softclip_kernels.stats import Wanted

pytestmark = needs_triton

N, D = 600, 128
ALL = Wanted(rounded=True)


def test_replayed_passes_are_right_interpreted():
    """The tests are in interpreted_triton_replay.py."""
    file = Path(__file__).parent / "interpreted_triton_replay.py"
    interpreter.assert_kernels_pass(file, 10, "-m", "not long")


class Notes(list):
    off = False  # arguments hold memory

    def append(self, launch):
        if not self.off:
            super().append(launch)


@pytest.fixture
def noted(monkeypatch):
    """A GPU that is none; the launches on it, of kernels that are numbered as they are compiled."""
    from bench import stubbed

    launches, variants, kernel = Notes(), itertools.count(), stubbed.Kernel
    monkeypatch.setattr(stubbed, "Kernel", lambda name, note: kernel(f"{name} {next(variants)}", note))
    monkeypatch.setenv("SOFTCLIP_REPLAY", "1")
    with stubbed.gpu(launches.append):
        yield launches


def problem(n=N, d=D, dtype=torch.bfloat16, teachers=(), **others):
    x, y = (torch.zeros(n, d, dtype=dtype) for _ in range(2))
    return Problem(x, y, torch.tensor(10.0), torch.arange(n), teachers=teachers, positive_row=torch.arange(n), **others)


def external(of, dtype=torch.bfloat16):
    x, y = torch.zeros(2, N, 64, dtype=dtype)
    return dataclasses.replace(of, teachers=(TeacherOperand(Source.EMBEDDINGS, torch.tensor(5.0), x, y),))


def taught(of, source=Source.LOGITS, **options):
    return dataclasses.replace(of, teachers=(TeacherOperand(source, **options),))


def untaught(of):
    return of


def swapped(of):
    return taught(of, Source.TRANSPOSED)


def launches(noted, of, wanted=ALL):
    """Of both passes, and the gradients' dtypes; pointers to operands by their places, all others alike."""
    from softclip_kernels.stats import StatisticsGradient

    noted.clear()
    triton = backends.registered()["triton"]
    statistics = triton.forward(of)
    k = len(of.teachers)
    ones = [torch.ones(1 + k, length) for length in (of.rows, of.columns)]
    gradients = triton.backward(of, statistics, StatisticsGradient(*ones, torch.zeros(of.rows)), wanted)
    names = {each.data_ptr(): place for place, each in enumerate(of.tensors()) if each is not None}

    def plain(value):
        if hasattr(value, "block_shape"):
            return names.get(value.base.data_ptr(), "memory"), *value.shape, *value.strides, *value.block_shape
        pointer = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if type(pointer) is int and pointer > 2**32:
            return f"operand {names[pointer]}" if pointer in names else "memory"
        return value

    results = [None if each is None else each.dtype for each in gradients]
    return [*((name, grid, tuple(map(plain, arguments))) for name, grid, arguments in noted), results]


def computed(monkeypatch, noted, of, wanted=ALL):
    """The launches of passes that are not replayed."""
    with monkeypatch.context() as patch:
        patch.setenv("SOFTCLIP_REPLAY", "0")
        launches(noted, of, wanted)  # compiles
        return launches(noted, of, wanted)


@pytest.mark.parametrize("n", (N, 2600))
@pytest.mark.parametrize("candidate", ("", "128x256x64w8s3-tma"))
@pytest.mark.parametrize("teach", (untaught, swapped, external))
def test_the_launches_are_the_same(monkeypatch, noted, n, candidate, teach):
    from softclip_kernels.backends.triton import edges, launch, recording, replay

    monkeypatch.setenv("SOFTCLIP_CANDIDATE", candidate)
    monkeypatch.setattr(launch, "SCRATCH", 2**21)  # several super-blocks
    monkeypatch.setattr(edges, "most", lambda: 2**21)
    of = problem(n) if teach is not external else external(problem())
    if candidate and teach(of).teachers:
        pytest.skip("for the loss without a teacher")
    of = teach(of)
    expected = computed(monkeypatch, noted, of)
    found = [launches(noted, of) for _ in range(4)]
    assert all(each == expected for each in found)
    assert [type(each) for each in replay._recordings.values()] == [recording.Recording] * 2


def changed(of, **others):
    return dataclasses.replace(of, **others)


def wide(n=N):
    return torch.zeros(n, 2 * D, dtype=torch.bfloat16)[:, :D]


def misaligned():
    return torch.zeros(N * D + 1, dtype=torch.bfloat16)[1:].view(N, D)


# What decides about the launches: a problem whose passes are replayed, and one of another kind, with its own launches.
OTHERS = {
    "rows": (problem, lambda: problem(N + 8)),
    "width": (problem, lambda: problem(d=2 * D)),
    "stride": (problem, lambda: changed(problem(), x=wide())),
    "order": (problem, lambda: changed(problem(), y=torch.zeros(D, N, dtype=torch.bfloat16).T)),
    "dtype": (lambda: external(problem()), lambda: external(problem(), torch.float16)),
    "alignment": (problem, lambda: changed(problem(), x=misaligned())),
    "positives": (problem, lambda: changed(problem(), positive_column=None, positive_row=None)),
    "known rows": (problem, lambda: changed(problem(), positive_row=None)),
    "one operand": (lambda: (lambda of: changed(of, y=of.x))(problem()), problem),
    "one vector": (lambda: (lambda of: changed(of, positive_row=of.positive_column))(problem()), problem),
    "source": (lambda: taught(problem()), lambda: taught(problem(), Source.TRANSPOSED)),
    "teacher's scale": (lambda: taught(problem()), lambda: taught(problem(), scale=torch.tensor(2.0))),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_has_launches_of_its_own(monkeypatch, noted, kind):
    first, other = (make() for make in OTHERS[kind])
    expected = computed(monkeypatch, noted, other)
    before = [launches(noted, first) for _ in range(4)][-1]
    assert launches(noted, other) == expected != before


@pytest.mark.parametrize(
    "wanted", (Wanted(y=False, rounded=True), Wanted(scale=False, rounded=True), Wanted()), ids=str
)
def test_other_gradients_have_launches_of_their_own(monkeypatch, noted, wanted):
    of = problem()
    expected = computed(monkeypatch, noted, of, wanted)
    before = [launches(noted, of) for _ in range(4)][-1]
    assert launches(noted, of, wanted) == expected != before


@pytest.mark.parametrize(
    ("setting", "value"),
    (
        ("SOFTCLIP_CANDIDATE", "forward=128x64x64w8s3,backward=128x64x64w8s3"),
        ("SOFTCLIP_AUTOTUNE", "0"),
        ("SOFTCLIP_REPLAY", "0"),
        ("SOFTCLIP_REPLAY", ""),
    ),
)
def test_settings_are_read_at_every_call(monkeypatch, noted, setting, value):
    from softclip_kernels.backends.triton import recording

    of, followed = taught(problem(), Source.TRANSPOSED), []
    follow = recording.Recording.follow
    monkeypatch.setattr(recording.Recording, "follow", lambda *given: followed.append(given) or follow(*given))
    if setting == "SOFTCLIP_CANDIDATE":
        of, value = external(problem()), "forward=128x64x64w8s3,backward=128x64x64w8s3"
    before = [launches(noted, of) for _ in range(4)][-1]
    assert len(followed) == 4
    monkeypatch.setenv(setting, value)
    expected = computed(monkeypatch, noted, of)
    assert launches(noted, of) == expected and len(followed) == 4
    assert (expected != before) == (setting == "SOFTCLIP_CANDIDATE")


def test_every_device_has_recordings_of_its_own(monkeypatch, noted):
    from softclip_kernels.backends.triton import recording

    of = problem()
    [launches(noted, of) for _ in range(3)]
    monkeypatch.setattr(recording.Recording, "follow", lambda *_: pytest.fail("replayed"))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 1)
    launches(noted, of)


@pytest.mark.parametrize(
    ("module", "value"), (("launch.SCRATCH", 2**18), ("edges.most", lambda: 2**18)), ids=("forward", "backward")
)
def test_limits_of_memory_are_those_of_now(monkeypatch, noted, module, value):
    of = problem(2600)
    before = [launches(noted, of) for _ in range(4)][-1]
    monkeypatch.setattr(f"softclip_kernels.backends.triton.{module}", value)
    expected = computed(monkeypatch, noted, of)
    assert launches(noted, of) == expected != before


def test_the_precision_of_products_is_that_of_now(monkeypatch, noted):
    from softclip_kernels.backends.triton import launch, replay

    rounded = []
    monkeypatch.setattr(replay.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch.precision, "rounds_operands", lambda device: bool(rounded))
    monkeypatch.setattr(launch, "_precision", lambda operand, ranked=False: "tf32" if rounded else "tf32x3")
    of = problem(dtype=torch.float32)
    before = [launches(noted, of) for _ in range(4)][-1]
    rounded.append(True)
    expected = computed(monkeypatch, noted, of)
    assert launches(noted, of) == expected != before


def test_nothing_is_replayed_where_somebody_watches(monkeypatch, noted):
    """A dispatch mode sees what is allocated, a graph has memory of its own, a subclass may be anything."""
    from bench.host import Operators
    from softclip_kernels.backends.triton import recording

    of = problem()
    [launches(noted, of) for _ in range(3)]
    monkeypatch.setattr(recording.Recording, "follow", lambda *_: pytest.fail("replayed"))
    with Operators() as operators:
        launches(noted, of)
    assert len(operators.names) > 20

    class Own(torch.Tensor):
        pass

    launches(noted, changed(of, x=of.x.as_subclass(Own)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launches(noted, of)


def test_tuning_is_no_part_of_a_pass(monkeypatch, noted):
    """A pass in which tiles are timed is recorded the next time."""
    from softclip_kernels.backends.triton import call, launch, recording, replay

    of, choose, choosing = problem(), launch.choose_shape, []

    def timed(kind, launch_pass, trial):
        if choosing:
            call.recorder.interrupt()
            trial(launch.candidates(kind, launch_pass)[0])[0]()
        return choose(kind, launch_pass, trial)

    monkeypatch.setattr(launch, "choose_shape", timed)
    expected = launches(noted, of)
    choosing.append(True)
    launches(noted, of)
    choosing.clear()
    assert [launches(noted, of) for _ in range(3)] == [expected] * 3
    assert all(isinstance(each, recording.Recording) for each in replay._recordings.values())


def test_a_launch_of_another_thread_is_no_part_of_a_pass(noted):
    import threading

    from softclip_kernels.backends.triton import recorder, recording, replay
    from softclip_kernels.backends.triton.softmax_forward import forward

    of, other = problem(), problem(N + 8)
    forward(other)
    launches(noted, of)
    note = recorder.Recorder.note

    def beside(watching, *given):
        thread = threading.Thread(target=forward, args=(other,))
        if threading.current_thread() is threading.main_thread():
            thread.start()
            thread.join()
        note(watching, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder.Recorder, "note", beside)
        launches(noted, of)
    expected = launches(noted, of)
    assert all(isinstance(each, recording.Recording) for each in replay._recordings.values())
    with pytest.MonkeyPatch.context() as patch:
        assert computed(patch, noted, of) == expected


def test_no_tensor_is_kept_and_few_kinds_are(monkeypatch, noted):
    from softclip_kernels.backends.triton import replay

    monkeypatch.setattr(replay, "MOST", 6)

    def run(n):
        of = problem(n)
        for _ in range(3):
            launches(noted, of)

    run(N)
    noted.clear()
    gc.collect()
    kept = {id(each) for each in gc.get_objects() if type(each) is torch.Tensor and each.numel()}
    run(N)
    noted.clear()
    gc.collect()
    assert not [
        each.shape for each in gc.get_objects() if type(each) is torch.Tensor and each.numel() and id(each) not in kept
    ]
    for n in range(8):
        run(N + 8 * n)
        assert len(replay._recordings) <= 6


@pytest.mark.parametrize(("teach", "candidate"), ((untaught, ""), (untaught, "128x256x64w8s3-tma"), (swapped, "")))
def test_memory_is_that_of_a_computed_pass(monkeypatch, noted, teach, candidate):
    """Of each pass the most at once, up to a part of it that is small vectors."""
    monkeypatch.setenv("SOFTCLIP_CANDIDATE", candidate)
    monkeypatch.setattr(noted, "off", True)
    from helpers.allocations import Allocations

    from softclip_kernels.backends.triton import edges, launch, recorder, recording, replay

    def peaks(of, name, owner):
        """While a function of the owner runs, each time."""
        found, function = [], getattr(owner, name)

        def counted(*given):
            with Allocations(*[each for each in of.tensors() if each is not None]) as memory:
                result = function(*given)
            found.append(memory.most)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            launches(noted, of)
        return found

    monkeypatch.setattr(launch, "SCRATCH", 2**21)
    monkeypatch.setattr(edges, "most", lambda: 2**21)
    monkeypatch.setattr(recorder, "VECTOR", 2**14)
    of = teach(problem(2600))
    launches(noted, of)  # compiles
    computed_peaks = peaks(of, "run", replay)  # which a dispatch mode keeps from being replayed
    for _ in range(2):
        launches(noted, of)
    replayed_peaks = peaks(of, "follow", recording.Recording)
    assert len(replayed_peaks) == len(computed_peaks) == 2 and computed_peaks[1] > 2**21
    for replayed, computed in zip(replayed_peaks, computed_peaks, strict=True):
        assert replayed <= 1.02 * computed
