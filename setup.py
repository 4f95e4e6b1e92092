"""The package's metadata is in pyproject.toml; this adds the CPU extension, which csrc/build_extension.py builds."""

from setuptools import Extension, setup

setup(ext_modules=[Extension("softclip_kernels._cpu", sources=[])])
