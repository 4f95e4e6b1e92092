"""Linear probe: scikit-learn's logistic regression on embeddings that stay as they are, with the strength of its
regularization chosen on a fifth of the training rows.

As in CLIP's paper, C is searched on a logarithmic scale, every two decades from 1e-6 to 1e6 and then ever closer around
the best to an eighth of a decade: 15 fits at most, and one on all rows. Fits run on one thread and in float64, so that
neither the number of cores nor that of processes changes a figure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .. import heartbeat
from ..data import DataError
from ..option_checks import ConfigError

LOWEST, HIGHEST = -6, 6  # exponents of C
COARSE, FINER = 2, (1.0, 0.5, 0.25, 0.125)  # in decades
FOLDS = 5  # of which one is for validation
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """What a probe finds among the rows it is tested on, as shares of 1.

    acc1                   share of the rows whose class is found; a class that was never trained on cannot be
    mean_per_class_recall  the same within each class of these rows, averaged over the classes
    C                      inverse strength of the regularization
    chance, majority       acc1 of a guess among the classes trained on, and of always naming the largest class here
    converged              whether the fit on all rows ended within MAX_ITERATIONS. In the search, where values of C far
                           too high do not, a fit counts as it was by then
    """

    acc1: float
    mean_per_class_recall: float
    C: float
    chance: float
    majority: float
    converged: bool


@dataclass(frozen=True)
class Probe:
    """A probe that was fitted, by `fit`. `classifier`: scikit-learn's LogisticRegression."""

    classifier: Any
    converged: bool

    def score(self, rows: Tensor, classes: np.ndarray) -> LinearProbe:
        """rows (n, E) that were not trained on, and their classes (n,)."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            found = self.classifier.predict(_numbers(rows)) == classes
        _, class_of, sizes = np.unique(classes, return_inverse=True, return_counts=True)
        return LinearProbe(
            acc1=float(found.mean()),
            mean_per_class_recall=float((np.bincount(class_of, found) / sizes).mean()),
            C=self.classifier.C,
            chance=1 / len(self.classifier.classes_),
            majority=float(sizes.max() / len(classes)),
            converged=self.converged,
        )


def fit(rows: Tensor, classes: np.ndarray, seed: int, groups: np.ndarray | None = None) -> Probe:
    """Choose C on a validation split of the unit rows (n, E), then fit on all of them.

    classes  (n,), numbers or names
    seed     fixes the split
    groups   (n,), for example the concept that a row shows: the split leaves no group on both sides. Where each class
             is one group, as class folders have it, groups cannot be kept apart, and rows are

    Of values of C that are equally good the lowest is taken. Raises as require_scikit_learn and split do, which can be
    called before anything is embedded.
    """
    require_scikit_learn()
    from threadpoolctl import threadpool_limits

    fitted, held = split(classes, groups, seed)
    x = _numbers(rows)
    with threadpool_limits(1):
        c = _best(lambda c: float(_regress(x[fitted], classes[fitted], c)[0].score(x[held], classes[held])))
        return Probe(*_regress(x, classes, c))


def require_scikit_learn() -> None:
    """Raises ConfigError, which names our extra, where the library is missing."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"data.probe needs the library scikit-learn, which cannot be imported ({error}); install it by "
            "`pip install 'softclip-kernels[train]'`, or leave data.probe out"
        ) from error


def split(classes: np.ndarray, groups: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and to validate on, stratified by class as far as its rows or groups go; see `fit`. Raises
    DataError where they are too few."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    _, class_of = np.unique(classes, return_inverse=True)
    _, unit_of = np.unique(np.arange(len(classes)) if groups is None else groups, return_inverse=True)
    units = np.bincount(np.unique(np.stack([class_of, unit_of]), axis=1)[0])  # of each class, rows or groups
    if groups is not None and units.max() == 1:
        return split(classes, None, seed)
    folds = min(FOLDS, int(units.max()))
    if folds > 1 and len(units) > 1:
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # it may be on one side only
            parts = kind(folds, shuffle=True, random_state=seed % 2**32).split(classes, class_of, groups)
            fitted, held = next(parts)
        if len(np.unique(classes[fitted])) > 1 and len(held):
            return fitted, held
    raise DataError(
        f"data.probe holds {len(classes)} records of {len(units)} classes, too few to choose C on a part of them; give "
        "two classes or more, of several records each"
    )


def _best(score: Callable[[float], float]) -> float:
    """The C of the highest score."""
    scores = {float(exponent): score(10.0**exponent) for exponent in range(LOWEST, HIGHEST + 1, COARSE)}
    for step in FINER:
        best = _argmax(scores)
        for exponent in (best - step, best + step):
            if LOWEST <= exponent <= HIGHEST:
                scores[exponent] = score(10.0**exponent)
    return 10.0 ** _argmax(scores)


def _argmax(scores: dict[float, float]) -> float:
    return max(scores, key=lambda exponent: (scores[exponent], -exponent))


def _regress(x: np.ndarray, classes: np.ndarray, c: float) -> tuple[Any, bool]:
    """The classifier after at most MAX_ITERATIONS, and whether it converged by then. Counts as progress."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        classifier = LogisticRegression(C=c, max_iter=MAX_ITERATIONS).fit(x, classes)
    heartbeat.tick()
    return classifier, not said


def _numbers(rows: Tensor) -> np.ndarray:
    return rows.double().cpu().numpy()
