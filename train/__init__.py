"""The trainer: run it as ``python -m train``."""
