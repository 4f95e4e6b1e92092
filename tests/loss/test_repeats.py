"""The same bits, 250 times over, with one thread and with several."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreter

from softclip_kernels.backends import chunked, cpu
from softclip_kernels.testing import ALL_TARGETS, Result, unit_rows

REPEATS = 250
N, D, BLOCK = 300, 112, 192  # a block and the embeddings hold enough entries for PyTorch to share them among threads
# labels, indices and groups: rows that share a column are summed. In bfloat16 only the kernels' own sums are others.
TARGETS = ("hard", "labels", "two_indices", "groups", "psd")
CASES = [("chunked", "float32", name) for name in TARGETS]
if cpu.levels():
    CASES += [("cpu", "float32", name) for name in TARGETS]
    CASES += [("cpu", "bfloat16", name) for name in ("hard", "psd")]


def first_difference(backend: str, dtype: str, name: str) -> int | None:
    """The first call whose bits are others than call 0's."""
    cpu.MULTIPLY_ADDS_PER_THREAD = dict.fromkeys(cpu.THREADS, 1)  # as many threads as PyTorch, for problems of any size
    chunked.BLOCK["cpu"] = BLOCK
    x, y = (unit_rows(N, D, seed=seed, dtype=getattr(torch, dtype)) for seed in (0, 1))
    target, scale = ALL_TARGETS[name](N, N), torch.tensor(14.3)

    def bits() -> tuple[torch.Tensor, ...]:
        result = Result.of_loss(x, y, scale, target, backend=backend)
        return result.loss, result.dx, result.dy, result.dscale

    first = bits()
    assert all(one.isfinite().all() and one.any() for one in first)
    return next((k for k in range(1, REPEATS) if not all(map(torch.equal, bits(), first))), None)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_one_thread(case, monkeypatch):
    monkeypatch.setattr(cpu, "MULTIPLY_ADDS_PER_THREAD", dict.fromkeys(cpu.THREADS, 1))
    monkeypatch.setitem(chunked.BLOCK, "cpu", BLOCK)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert first_difference(*case) is None
    finally:
        torch.set_num_threads(before)


def differences(threads: int) -> dict[str, int | None]:
    """Every case's first difference."""
    torch.set_num_threads(threads)
    return {" ".join(case): first_difference(*case) for case in CASES}


def test_two_threads():
    """In a process of its own, whose OpenMP threads sleep while they wait: spinning, two of them on a busy core each
    take a hundred times as long."""
    found = interpreter.result_of("loss.test_repeats", "differences", 2, OMP_NUM_THREADS="2")
    assert len(found) == len(CASES) and not any(found.values()), found
