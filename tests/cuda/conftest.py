"""Kernels in the emulator, built once a process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
from helpers.emulated_problem import Specialization


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Specialization], ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("kernels")
    libraries: dict[Specialization, ctypes.CDLL] = {}

    def library(specialization: Specialization) -> ctypes.CDLL:
        if specialization not in libraries:
            libraries[specialization] = specialization.build(folder)
        return libraries[specialization]

    return library
