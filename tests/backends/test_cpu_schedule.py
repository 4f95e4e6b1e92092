"""How the CPU kernels divide blocks between threads, by arithmetic: nothing is left out or done twice, no two threads
meet in a row or column, and none waits long for another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.backends import needs_cpu_kernels

from softclip_kernels.backends import cpu

pytestmark = needs_cpu_kernels

THREADS = (1, 2, 3, 4, 7, 8, 16, 31, 64)


def rounds(n, m, threads, mirrored):
    """By round, by thread: jobs (row begin, row end, column begin, column end, triangle)."""
    return cpu._cpu.schedule(n, m, threads, mirrored)


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("threads", THREADS)
def test_every_pair_is_met_once(threads, mirrored):
    n = 150
    m = n if mirrored else 190
    met = np.zeros((n, m), dtype=int)
    for jobs in itertools.chain.from_iterable(rounds(n, m, threads, mirrored)):
        for row, row_end, column, column_end, triangle in jobs:
            assert triangle == (mirrored and (row, row_end) == (column, column_end))
            met[row:row_end, column:column_end] += 1
            if mirrored and not triangle:  # the mirror is visited with the block
                met[column:column_end, row:row_end] += 1
    assert (met == 1).all()


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("threads", THREADS)
def test_within_a_round_threads_share_no_row_and_no_column(threads, mirrored):
    n = 150
    for of_round in rounds(n, n, threads, mirrored):
        rows, columns = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
        for jobs in of_round:
            own_rows, own_columns = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
            for row, row_end, column, column_end, _ in jobs:
                own_rows[row:row_end] = own_columns[column:column_end] = True
                if mirrored:
                    own_rows[column:column_end] = own_columns[row:row_end] = True
            rows += own_rows
            columns += own_columns
        assert rows.max() <= 1 and columns.max() <= 1


@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("threads", THREADS)
def test_threads_are_busy_alike(threads, mirrored):
    """All wait for the slowest at the end of a round: together that is less than 4 % of the pairs at 32 rows a group,
    and the mirrored schedule's rounds on the diagonal are one in as many as there are groups."""
    n = 64 * threads + 5
    done = slowest = 0
    for of_round in rounds(n, n, threads, mirrored):
        pairs = [sum(_pairs(*job) for job in jobs) for jobs in of_round]
        done += sum(pairs)
        slowest += threads * max(pairs)
    assert done == (n * (n + 1) // 2 if mirrored else n * n)
    assert slowest <= 1.04 * done + threads


def _pairs(row, row_end, column, column_end, triangle):
    rows, columns = row_end - row, column_end - column
    return rows * (rows + 1) // 2 if triangle else rows * columns
