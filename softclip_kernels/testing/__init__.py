"""For tests and benchmarks, the library's and yours.

problems   embeddings to compute a loss on
catalogue  every kind of target
dense      the dense loss, written independently of the library's own way
standard   the rule by which a result counts as correct
exact      whether a training step follows the gradient of the whole batch, whatever its loss and its wrapper; with
           its verdict (exact_report) and the defects that it knows (defects)
"""

from .catalogue import ALL_TARGETS, RECTANGULAR_TARGETS, SQUARE_TARGETS
from .dense import DenseTarget, dense_loss, dense_row_losses, dense_target
from .exact import assert_exact, check_exact
from .exact_report import Report, Row
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
    "Report",
    "Result",
    "Row",
    "Standard",
    "assert_as_accurate_as_dense",
    "assert_exact",
    "bounds",
    "check_exact",
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
