"""Measurements; `python -m bench` lists them. Rows go to bench/results/, a file for each kind and machine."""

from typing import Any

Row = dict[str, Any]  # of a record: labels, then figures
