"""Other people's trainers, as they are installed; a file of tests is skipped, by name, where its host is not."""

import os
from unittest import mock

import pytest
from helpers.hosts import on_cpu

on_cpu.prepare()


@pytest.fixture(autouse=True)
def environment_kept():
    """Lightning leaves a rank and a port in the environment, with which every later host would wait for other ranks."""
    with mock.patch.dict(os.environ):
        yield
