"""Linear probes on frozen embeddings."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from threadpoolctl import threadpool_info
from torch import Tensor

from train import heartbeat
from train.data import DataError
from train.evaluate import probe
from train.evaluate.probe import fit, split
from train.options import ConfigError

SEED = 3


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, np.ndarray]:
    """450 scanned digits as unit rows, with noise that makes the choice of C matter; and which digits they are."""
    pixels, classes = load_digits(return_X_y=True)
    rows = torch.from_numpy(pixels[:450]) + 6 * torch.randn(450, 64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(rows.float(), dim=1), classes[:450]


def regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000)


@pytest.mark.parametrize("grouped", (False, True))
def test_a_probe_is_scikit_learns_on_the_same_features(digits: tuple[Tensor, np.ndarray], grouped: bool) -> None:
    rows, classes = digits
    groups = np.arange(300) // 3 if grouped else None
    found = fit(rows[:300], classes[:300], SEED, groups).score(rows[300:], classes[300:])

    x, y = rows.double().numpy(), classes
    splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(5, shuffle=True, random_state=SEED)
    fitted, held = next(splitter.split(x[:300], y[:300], groups))
    accuracy = {c: regression(c).fit(x[fitted], y[fitted]).score(x[held], y[held]) for c in 10.0 ** np.arange(-6, 7, 2)}
    chosen = regression(found.C).fit(x[fitted], y[fitted]).score(x[held], y[held])
    assert chosen >= max(accuracy.values())
    assert chosen > max(accuracy[1e-6], accuracy[1e6])  # or any C would do

    predicted = regression(found.C).fit(x[:300], y[:300]).predict(x[300:])
    assert found.acc1 == pytest.approx(accuracy_score(y[300:], predicted), abs=1e-12)
    assert found.mean_per_class_recall == pytest.approx(balanced_accuracy_score(y[300:], predicted), abs=1e-12)
    assert (found.chance, found.majority, found.converged) == (0.1, np.bincount(y[300:]).max() / 150, True)
    assert found.acc1 != found.mean_per_class_recall and found.acc1 > 3 * found.majority


@pytest.mark.parametrize("eighths", (-48, -47, -13, 0, 5, 22, 48))
def test_the_best_c_is_found_to_an_eighth_of_a_decade(eighths: int) -> None:
    asked: list[float] = []

    def score(c: float) -> float:
        asked.append(c)
        return -abs(np.log10(c) - eighths / 8)

    assert probe._best(score) == pytest.approx(10 ** (eighths / 8))
    assert len(set(asked)) == len(asked) <= 15


def test_of_values_of_c_that_are_equally_good_the_lowest_is_taken() -> None:
    assert probe._best(lambda c: 0.5) == 1e-6
    assert probe._best(lambda c: float(c > 0.99)) == 1.0


def test_a_group_is_on_one_side_of_the_split() -> None:
    classes, groups = np.repeat(["a", "b", "c"], [200, 100, 50]), np.arange(350) // 5
    fitted, held = split(classes, groups, 0)
    assert sorted([*fitted, *held]) == list(range(350))
    assert not set(groups[fitted]) & set(groups[held])
    assert [int((classes[held] == name).sum()) for name in "abc"] == [40, 20, 10]
    assert set(split(classes, groups, 1)[1]) != set(held)


def test_where_each_class_is_one_group_its_rows_are_split() -> None:
    classes = np.repeat([4, 7, 9], [100, 50, 5])
    fitted, held = split(classes, classes, 2**40)  # as large as data.seed may be
    assert sorted([*fitted, *held]) == list(range(155))
    assert [int((classes[held] == number).sum()) for number in (4, 7, 9)] == [20, 10, 1]


def test_a_class_that_was_not_trained_on_is_a_miss() -> None:
    rows = torch.eye(3).repeat(6, 1)
    names = np.array(["cat", "dog", "owl"] * 6)
    trained = names != "owl"
    found = fit(rows[trained], names[trained], SEED).score(rows[:8], names[:8])
    assert (found.acc1, found.mean_per_class_recall) == (6 / 8, pytest.approx(2 / 3))
    assert (found.chance, found.majority) == (1 / 2, 3 / 8)


@pytest.mark.filterwarnings("error")
def test_a_fit_that_does_not_converge_is_told_and_not_warned_of(
    digits: tuple[Tensor, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, classes = digits
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 2)
    found = fit(rows[:300], classes[:300], SEED).score(rows[300:], classes[300:])
    assert not found.converged
    assert found.acc1 > found.chance


def test_fits_run_on_one_thread_and_each_counts_as_progress(
    digits: tuple[Tensor, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    regress: Callable[..., object] = probe._regress
    monkeypatch.setattr(
        probe,
        "_regress",
        lambda *given: (threads.extend(pool["num_threads"] for pool in threadpool_info()), regress(*given))[1],
    )
    ticks: list[None] = []
    monkeypatch.setattr(heartbeat, "tick", lambda: ticks.append(None))
    fit(*digits, SEED)
    assert set(threads) == {1}
    assert 9 < len(ticks) <= 16


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", ([0] * 8, list(range(8)), [0, 0, 1]))
def test_too_few_rows_are_refused(classes: list[int]) -> None:
    said = f"data.probe holds {len(classes)} records of {len(set(classes))} classes, too few .*; give two classes"
    with pytest.raises(DataError, match=said):
        fit(torch.eye(8)[: len(classes)], np.array(classes), SEED)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=re.escape("install it by `pip install 'softclip-kernels[train]'`")):
        fit(torch.eye(4), np.array([0, 0, 1, 1]), SEED)
