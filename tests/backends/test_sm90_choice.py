"""The test that a CUDA kernel has to pass on the user's own operands before the clock may choose it, and the clock's
choice, without a GPU (helpers/posed.py): stand-ins for both kernels leave numbers where the real ones do."""

from __future__ import annotations

import ctypes
import json

import pytest
import torch
from helpers import posed
from helpers.backends import needs_triton
from helpers.posed import SWAPPED, own_teacher, problem

from softclip_kernels.stats import StatisticsGradient, Wanted

pytestmark = needs_triton

N = 1500
CASES = {"hard": (), "swapped": (SWAPPED,), "own teacher": (own_teacher(N, 128),)}
SLOTS = ("row_sums", "column_sums", "mirror_row_sums", "mirror_column_sums")


def fill(pointer, count, value, of=ctypes.c_float):
    (of * count).from_address(getattr(pointer, "data_ptr", lambda: pointer)())[:] = [value] * count


def bits(value):
    """Of a bfloat16."""
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item())


class Kernels:
    """What both leave: `value` in the first slot of every sum, the positives' logits and G. The CUDA kernels' are
    multiplied by `factor`, except in what `right` names."""

    def __init__(self, hopper, patch, factor=1.0, right=()):
        from softclip_kernels.backends.triton import tuning

        self.factor, self.right, self.timed = factor, right, []
        hopper.run, hopper.run_triton = self.cuda, self.triton
        patch.setattr(tuning, "WORTHWHILE", N**2)
        patch.setenv("SOFTCLIP_GPU_MIB", "2")  # several super-blocks
        patch.setattr(tuning, "measure", self.measure)
        self.hopper, self.seconds = hopper, {"cuda": 1.0, "triton": 2.0}

    def measure(self, launch):
        before = len(self.hopper.launched)
        launch()
        which = "cuda" if len(self.hopper.launched) > before else "triton"
        self.timed.append(which)
        return self.seconds[which]

    def of_cuda(self, name):
        return 3.0 * (1.0 if name in self.right else self.factor)

    def cuda(self, name, arguments):
        if name == "softmax_backward":
            g = [arguments["g"], *([arguments["mirror_g"]] if arguments["mirror_row_coefficient"] else [])]
            for each in g:
                fill(each.address, each.sizes[0] * each.sizes[1], bits(self.of_cuda("g")), ctypes.c_short)
            return
        for slots in SLOTS if name.endswith("pair") else SLOTS[:2]:
            fill(arguments[slots], arguments["edge"], self.of_cuda(slots))
        fill(arguments["positive_logit"], N, self.of_cuda("positive_logit"))

    def triton(self, name, arguments):
        if name.startswith("softmax_forward"):
            taught = arguments.get("mirror_row_sums") is not None
            for slots in SLOTS if taught else SLOTS[:2]:
                fill(arguments[slots], arguments["edge"], 3.0)
            fill(arguments["positive_logit"], N, 3.0)
        elif name in ("softmax_backward_kernel", "softmax_exchange_kernel", "softmax_backward_persistent_kernel"):
            for g in ("g", "mirror_g"):
                if arguments.get(g) is not None and not hasattr(arguments[g], "base"):
                    fill(arguments[g], arguments["edge"] ** 2, bits(3.0), ctypes.c_short)


def run(case):
    from softclip_kernels.backends.triton import softmax_backward, softmax_forward

    of, k = problem(N, teachers=CASES[case]), len(CASES[case])
    statistics = softmax_forward.forward(of)
    gradient = StatisticsGradient(torch.ones(1 + k, N), torch.ones(1 + k, N), torch.zeros(N))
    softmax_backward.backward(of, statistics, gradient, Wanted(rounded=True))


def measured():
    """By kind of kernel, of those that the CUDA kernels were candidates for."""
    from softclip_kernels.backends.triton import tuning

    found = {key.split()[0]: value for key, value in tuning.measurements().items()}
    return {kind: found[kind] for kind in ("forward", "backward")}


@pytest.mark.parametrize("case", CASES)
def test_one_that_agrees_is_timed_and_chosen_where_it_is_faster(hopper, monkeypatch, case):
    from softclip_kernels.backends.triton import tuning

    stand_ins = Kernels(hopper, monkeypatch)
    run(case)
    for kind, found in measured().items():
        assert found["chosen"].endswith("-sm90") and found["left out"] == {}, kind
        assert found["chosen"] in found["ps an entry"] and len(found["ps an entry"]) > 1
    chosen = json.loads(tuning.path().read_text())["tiles"]
    assert sum(name.endswith("-sm90") for name in chosen.values()) == 2
    # Another process takes it from the file, and times nothing.
    posed.new_process(monkeypatch)
    stand_ins.timed.clear()
    hopper.launched.clear()
    run(case)
    assert stand_ins.timed == [] and hopper.launched


def test_one_that_is_slower_is_not_chosen(hopper, monkeypatch):
    stand_ins = Kernels(hopper, monkeypatch)
    stand_ins.seconds["cuda"] = 3.0
    run("hard")
    for found in measured().values():
        assert not found["chosen"].endswith("-sm90") and any(name.endswith("-sm90") for name in found["ps an entry"])


@pytest.mark.parametrize("factor", (1.1, 0.0, float("nan"), float("inf")))
@pytest.mark.parametrize("case", CASES)
def test_one_that_differs_is_left_out_with_the_reason(hopper, monkeypatch, case, factor):
    stand_ins = Kernels(hopper, monkeypatch, factor)
    run(case)
    for kind, what in (("forward", "row_sums"), ("backward", "blocks of G")):
        found = measured()[kind]
        ((name, why),) = found["left out"].items()
        assert name.endswith("-sm90") and name not in found["ps an entry"]
        assert not found["chosen"].endswith("-sm90") and why.startswith(f"{what} differ from Triton's in")
    assert "cuda" not in stand_ins.timed


@pytest.mark.parametrize("wrong", (*SLOTS, "positive_logit"))
def test_every_output_of_the_forward_pass_is_looked_at(hopper, monkeypatch, wrong):
    Kernels(hopper, monkeypatch, 1.1, {*SLOTS, "positive_logit", "g"} - {wrong})
    run("swapped")
    ((_, why),) = measured()["forward"]["left out"].items()
    assert why.startswith(f"{wrong} differ from Triton's in")
    assert measured()["backward"]["left out"] == {}


@pytest.mark.parametrize("right", (True, False))
def test_a_single_super_block_is_its_own_mirror(hopper, monkeypatch, right):
    """The scratch for another's mirror is left as it was allocated, and is not looked at."""
    Kernels(hopper, monkeypatch, 1.0 if right else 1.1)
    monkeypatch.setenv("SOFTCLIP_GPU_MIB", "384")
    allocated = torch.Tensor.new_empty

    def filled(like, *shape, **options):
        found = allocated(like, *shape, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    run("swapped")
    assert bool(measured()["backward"]["left out"]) is not right


def test_a_launch_that_the_driver_refuses_is_left_out(hopper, monkeypatch):
    Kernels(hopper, monkeypatch)
    hopper.fails["cuLaunchKernelEx"] = 200
    run("hard")
    for found in measured().values():
        ((name, why),) = found["left out"].items()
        assert name.endswith("-sm90") and "cuLaunchKernelEx of softmax" in why


def test_rows_agree_up_to_a_share_of_their_largest_entry():
    from softclip_kernels.backends.triton import sm90
    from softclip_kernels.backends.triton.tuning import SelfTestError

    expected = torch.tensor([[1.0, 100.0], [1.0, 0.01], [torch.inf, 1.0]])
    sm90.check("sums", expected + torch.tensor([[0.9, 0.0], [0.009, 0.0], [0.0, 0.0]]), expected, 0.01)
    for row, off in ((0, 1.1), (1, 0.011), (1, torch.nan)):
        found = expected.clone()
        found[row, 0] += off
        with pytest.raises(SelfTestError, match=r"^sums differ from Triton's in 1 rows, by"):
            sm90.check("sums", found, expected, 0.01)
    sm90.check("nothing", expected[:0], expected[:0], 0.01)
