"""Measurements; `python -m bench` lists them. Rows go to bench/results/, a file for each kind and machine."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]  # of a record: labels, then figures
