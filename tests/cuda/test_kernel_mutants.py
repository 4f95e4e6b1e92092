"""The emulator finds every mutant of the kernels' synchronization, each under some seed."""

from __future__ import annotations

import pytest
from helpers.kernel_mutants import MUTANTS, caught

FILES = sorted({mutant.file for mutant in MUTANTS})


@pytest.mark.parametrize("file", FILES)
def test_every_mutant_is_caught(file, tmp_path):
    missed = []
    for mutant in MUTANTS:
        if mutant.file != file:
            continue
        found = caught(mutant, tmp_path)
        print(f"{mutant.name:52} " + ("MISSED" if found is None else f"seed {found[0]:3}  {found[1]}"))
        if found is None:
            missed.append(mutant.name)
    assert not missed


def test_there_are_enough():
    assert len(MUTANTS) >= 150
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
