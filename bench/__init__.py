"""Measurements; `python -m bench` lists them. Rows go to bench/results/, a file for each kind and machine."""
