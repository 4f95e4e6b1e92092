"""The package's metadata is in pyproject.toml; this adds what that cannot say: the CPU extension, which
csrc/build_extension.py builds, and that the folder train/ is installed as the package softclip_train."""

from setuptools import Extension, find_packages, setup

TRAINER = [f"softclip_{name}" for name in find_packages(include=["train", "train.*"])]

setup(
    packages=find_packages(include=["softclip_kernels", "softclip_kernels.*"]) + TRAINER,
    package_dir={"softclip_train": "train"},
    ext_modules=[Extension("softclip_kernels._cpu", sources=[])],
)
