"""The package's metadata is in pyproject.toml; this adds what that cannot say: the CPU extension, which
csrc/build_extension.py builds, that the folder train/ is installed as the package softclip_train, and that the text of
the CUDA kernels lies in the package that compiles it."""

from setuptools import Extension, find_packages, setup

KERNELS = "softclip_kernels.backends.cuda.csrc"
TRAINER = [f"softclip_{name}" for name in find_packages(include=["train", "train.*"])]

setup(
    packages=[*find_packages(include=["softclip_kernels", "softclip_kernels.*"]), *TRAINER, KERNELS],
    package_dir={"softclip_train": "train", KERNELS: "csrc/cuda"},
    ext_modules=[Extension("softclip_kernels._cpu", sources=[])],
)
