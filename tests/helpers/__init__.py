"""What tests share: processes, measurements, results that are wrong on purpose."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
