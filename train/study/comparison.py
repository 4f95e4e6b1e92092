"""What the finished runs of a study say: each method's figures, and their differences to the reference's at the same
seed and under the same condition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from .. import PROGRAM
from ..config import ConfigError
from ..data import DataError
from ..evaluate.records import Hits, read_records
from ..evaluate.results import results_in
from . import intervals
from .finished import Lines, folder_in
from .intervals import Interval

MACRO = "macro"  # in a metric's name in place of a set: the mean over all sets that have it
MEAN = "mean"  # likewise, with a name of the study's file: the mean over all that fit its patterns
USUAL = ("*recall@1", "*acc1")  # patterns of the metrics that are compared unless others are asked for
Figures = dict[str, float]
Means = Mapping[str, Sequence[str]]  # of a study: patterns of SET/METRIC by the mean's name
CLOSE = 1e-6  # between a metric and the mean of its records, which some wrote in float32


@dataclass(frozen=True)
class Comparison:
    """One metric of one method under one condition, beside the reference.

    metric       SET/METRIC, MACRO/METRIC, or MEAN/NAME
    values       by seed, of all finished runs
    differences  to the reference, by seed, of those seeds at which both are finished
    interval     of the differences' mean: the wider of those over seeds and, with records, over seeds and concepts,
                 with the larger p value of both; None for fewer than two seeds
    p            that one, corrected for all comparisons of the same family
    """

    condition: str
    metric: str
    method: str
    values: dict[int, float]
    differences: dict[int, float]
    interval: Interval | None
    p: float | None

    @property
    def difference(self) -> float:
        return float(np.mean(list(self.differences.values())))


@dataclass(frozen=True)
class Runs:
    """The finished runs of one condition: by method and seed, the figures of each and, where they are there, its
    records."""

    figures: dict[str, dict[int, Figures]]
    records: dict[str, dict[int, dict[str, Hits]]]


def read_runs(folder: Path, lines: Lines, means: Means) -> dict[str, Runs]:
    """By condition. Raises DataError where there are no results to compare."""
    if not lines:
        raise DataError(f"{folder} has no finished run; `{PROGRAM} grid` carries them out")
    runs: dict[str, Runs] = {}
    for name, line in lines.items():
        of = runs.setdefault(line["condition"], Runs({}, {}))
        figures = _figures(name, line["results"], means)
        records = read_records(folder_in(folder, name))
        _check_records(name, figures, records)
        of.figures.setdefault(line["method"], {})[line["seed"]] = figures
        of.records.setdefault(line["method"], {})[line["seed"]] = records
    return runs


def _figures(name: str, results: Any, means: Means) -> Figures:
    """By SET/METRIC, in the order of their coming, then MACRO/METRIC of those that several sets have, then the study's
    own means."""
    try:
        found = {
            f"{of}/{metric}": value for of, metrics in results_in(results).items() for metric, value in metrics.items()
        }
    except ValueError as error:
        raise DataError(
            f"the results of {name} cannot be compared ({error}): the run is evaluated on nothing, or they are of an "
            f"earlier version; `{PROGRAM} grid` with --evaluate-again writes them anew"
        ) from error
    shared = [metric for metric, count in Counter(key.rpartition("/")[2] for key in found).items() if count > 1]
    derived = [*(f"{MACRO}/{metric}" for metric in shared), *(f"{MEAN}/{one}" for one in means)]
    parts = {metric: _parts(found, metric, means) for metric in derived}
    return found | {metric: float(np.mean([found[key] for key in some])) for metric, some in parts.items() if some}


def _parts(keys: Iterable[str], metric: str, means: Means) -> list[str]:
    """Of `keys`, each SET/METRIC, those that the metric is the mean of: itself where it is one."""
    place, _, name = metric.partition("/")
    if place == MEAN:
        return [key for key in keys if any(fnmatchcase(key, pattern) for pattern in means[name])]
    return [key for key in keys if key == metric or (place == MACRO and key.rpartition("/")[2] == name)]


def _check_records(name: str, figures: Figures, records: Mapping[str, Hits]) -> None:
    for metric, hits in records.items():
        if metric in figures and abs(float(hits.hits.mean()) - figures[metric]) > CLOSE:
            raise DataError(
                f"{metric} of {name} is {figures[metric]}, but the mean of its records {hits.hits.mean()}: they are of "
                f"another evaluation; `{PROGRAM} grid` with --evaluate-again writes both anew"
            )


def choose_metrics(runs: Mapping[str, Runs], patterns: Sequence[str] | None, primary: str | None) -> list[str]:
    """The metrics that some run has and some pattern fits, the primary one first; without patterns those of USUAL.
    Raises ConfigError where there is no primary one, or a pattern fits none."""
    present = _different(
        metric for of in runs.values() for seeds in of.figures.values() for run in seeds.values() for metric in run
    )
    if primary is not None and primary not in present:
        raise ConfigError(f"primary={primary!r}, which no run has; allowed: {', '.join(present)}")
    for pattern in patterns or ():
        if not any(fnmatchcase(metric, pattern) for metric in present):
            raise ConfigError(f"--metric {pattern!r} fits none; allowed: {', '.join(present)}")
    chosen = [metric for metric in present if any(fnmatchcase(metric, one) for one in patterns or USUAL)]
    return _different([*filter(None, [primary]), *chosen])


def compare(
    runs: Mapping[str, Runs], reference: str | None, metrics: Sequence[str], primary: str | None, means: Means
) -> list[Comparison]:
    """Condition by condition, metric by metric and method by method. The primary metric's comparisons are one family,
    all others another."""
    made = []
    for condition, of in runs.items():
        drawn = {method: _draw(of, method, reference, metrics, means) for method in of.figures if method != reference}
        for metric in metrics:
            for method in of.figures:
                values = _values(of, method, metric)
                beside = {} if reference in (None, method) else _values(of, str(reference), metric)
                differences = {seed: values[seed] - beside[seed] for seed in values if seed in beside}
                over_seeds = intervals.t_interval(list(differences.values()))
                both = () if over_seeds is None else (over_seeds, drawn.get(method, {}).get(metric))
                interval = intervals.widest([one for one in both if one is not None])
                if values:
                    made.append(Comparison(condition, metric, method, values, differences, interval, None))
    return _corrected(made, primary)


def _values(of: Runs, method: str, metric: str) -> dict[int, float]:
    seeds = of.figures.get(method, {})
    return {seed: figures[metric] for seed, figures in sorted(seeds.items()) if metric in figures}


def _draw(
    of: Runs, method: str, reference: str | None, metrics: Sequence[str], means: Means
) -> dict[str, Interval | None]:
    """The bootstrap's interval of the difference in each metric that has records in all runs of the two methods."""
    seeds = sorted(of.figures[method].keys() & of.figures.get(str(reference), {}).keys())
    sides = [[of.records[side][seed] for seed in seeds] for side in (method, str(reference))] if seeds else []
    present = [set(run) for side in sides for run in side]
    keys = [metric for metric in sides[0][0] if all(metric in run for run in present)] if sides else []
    figures = [key for key in next(iter(of.figures[method].values())) if key.partition("/")[0] not in (MACRO, MEAN)]
    parts = {metric: _parts(figures, metric, means) for metric in metrics}
    parts = {metric: some for metric, some in parts.items() if some and all(key in keys for key in some)}
    used = _different(key for some in parts.values() for key in some)
    if not used:
        return {}
    concepts = np.unique(np.concatenate([run[key].labels for side in sides for run in side for key in used]))

    def totals(hits: Hits, weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(np.searchsorted(concepts, hits.labels), weights, len(concepts))

    flat = [[run[key] for run in side] for side in sides for key in used]
    sums = np.array([[totals(hits, hits.hits) for hits in row] for row in flat])
    counts = np.array([[totals(hits, None) for hits in row] for row in flat])
    ours, theirs = np.split(intervals.draw_means(sums, counts), 2, axis=1)
    columns = dict(zip(used, (ours - theirs).T, strict=True))
    return {
        metric: intervals.percentile_interval(np.mean([columns[key] for key in some], axis=0))
        for metric, some in parts.items()
    }


def _corrected(made: Sequence[Comparison], primary: str | None) -> list[Comparison]:
    """With the p values of each family corrected."""
    corrected = dict[int, float]()
    for of_primary in (True, False):
        family = [(index, one) for index, one in enumerate(made) if (one.metric == primary) == of_primary]
        values = {index: one.interval.p for index, one in family if one.interval is not None}
        corrected |= dict(zip(values, intervals.holm(list(values.values())), strict=True))
    return [replace(one, p=corrected.get(index)) for index, one in enumerate(made)]


def _different(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
