"""What an evaluation found for each record by itself: what a comparison of runs needs to draw test concepts anew.

A file `evaluation-records.npz` in the run's folder, of the same evaluation as the table beside it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import DataError
from ..files import write_atomically

RECORDS = "evaluation-records.npz"
LABELS, HITS = "labels", "hits"


@dataclass(frozen=True)
class Hits:
    """Of n queries; their mean is the metric.

    labels  (n,) int64: what the query shows. Queries of one label, in whichever set, are drawn together; where records
            have no label, each has a number of its own
    hits    (n,) float64 in [0, 1]: whether what was asked for was found; a chance where there were ties
    """

    labels: np.ndarray
    hits: np.ndarray


def write_records(run: Path, found: Mapping[str, Hits]) -> None:
    """By `SET/METRIC`, for example `vendor/text_retrieval_recall@1`, whose queries are the pictures of the set."""
    arrays = {}
    for name, of in found.items():
        arrays[f"{name}/{LABELS}"] = of.labels.astype(np.int64)
        arrays[f"{name}/{HITS}"] = of.hits.astype(np.float64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # names that it calls arguments
    write_atomically(run / RECORDS, buffer.getvalue())


def read_records(run: Path) -> dict[str, Hits]:
    """Empty where the run has none. Raises DataError where the file holds something else."""
    path = run / RECORDS
    if not path.exists():
        return {}
    try:
        with np.load(path) as arrays:
            names = [name.removesuffix(f"/{HITS}") for name in arrays.files if name.endswith(f"/{HITS}")]
            return {name: Hits(arrays[f"{name}/{LABELS}"], arrays[f"{name}/{HITS}"]) for name in names}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no records ({type(error).__name__}: {error}); evaluate the run again") from error
