"""Measurements: `python -m bench cpu` and `python -m bench gpu`. Rows go to bench/results/ as JSON."""
