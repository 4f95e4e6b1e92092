"""The package's metadata is in pyproject.toml; this adds the CPU extension."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from build_extension import EXTENSION, BuildCpu

setup(ext_modules=[EXTENSION], cmdclass={"build_ext": BuildCpu})
