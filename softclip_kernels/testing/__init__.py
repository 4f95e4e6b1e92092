"""For tests and benchmarks, the library's and yours.

problems   embeddings to compute a loss on
catalogue  every kind of target
dense      the dense loss, written independently of the library's own way
standard   the rule by which a result counts as correct
"""

from .catalogue import ALL_TARGETS, RECTANGULAR_TARGETS, SQUARE_TARGETS
from .dense import DenseTarget, dense_loss, dense_row_losses, dense_target
from .problems import contested_cosine, contested_rows, matching_rows, operands, unit_rows
from .standard import (
    FIELDS,
    LARGEST_TOLERANCE,
    RELATIVE,
    InsensitiveError,
    Result,
    Standard,
    assert_as_accurate_as_dense,
    bounds,
    check_sensitive,
    sizes,
    tolerances,
    truth,
)

__all__ = [
    "ALL_TARGETS",
    "FIELDS",
    "LARGEST_TOLERANCE",
    "RECTANGULAR_TARGETS",
    "RELATIVE",
    "SQUARE_TARGETS",
    "DenseTarget",
    "InsensitiveError",
    "Result",
    "Standard",
    "assert_as_accurate_as_dense",
    "bounds",
    "check_sensitive",
    "contested_cosine",
    "contested_rows",
    "dense_loss",
    "dense_row_losses",
    "dense_target",
    "matching_rows",
    "operands",
    "sizes",
    "tolerances",
    "truth",
    "unit_rows",
]
