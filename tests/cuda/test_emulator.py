"""The emulator of csrc/cuda/ptx.cuh: each function alone against what the PTX manual and CUTLASS say of it, a small
pipeline that is right under every seed, and faults that some seed finds."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import numpy as np
import pytest
from helpers.emulated import TESTS, EmulatorError, aligned, build, call, exact, rounded
from helpers.emulated_problem import KERNELS

SEEDS = 60  # of the pipeline; every fault is found by far fewer


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(TESTS / "emulator_tests.cpp", tmp_path_factory.mktemp("emulator") / "emulator_tests.so")


@pytest.fixture(scope="session")
def run(library: ctypes.CDLL) -> Callable[..., np.ndarray]:
    """Calls a program of emulator_tests.cpp."""

    def program(name: str, *arguments: int, into: np.ndarray, of: np.ndarray | None = None, seed: int = 1):
        call(library.run, name.encode(), ctypes.c_uint64(seed), (ctypes.c_int * 8)(*arguments), of, into)
        return into

    return program


def numbered(*shape: int) -> np.ndarray:
    """Every number another."""
    found = aligned(shape)
    found[...] = np.arange(found.size).reshape(shape) + 1
    return found


def test_every_function_of_ptx_is_emulated():
    """With the same parameters; and what it computes without an instruction is the same text."""
    real = (KERNELS / "ptx.cuh").read_text()
    emulated = " ".join((TESTS / "emulator.h").read_text().split())
    declared = [" ".join(each.split()) for each in re.findall(r"^DEVICE ([^{]+?) \{", real, re.M)]
    assert len(declared) > 30
    missing = [each for each in declared if f" {each};" not in emulated and f" {each} {{" not in emulated]
    assert not missing
    (descriptor,) = re.findall(r"^DEVICE (u64 matrix\(.*?^\})", real, re.M | re.S)
    assert " ".join(descriptor.split()) in emulated


# Loads.

# Which 16 bytes of a row of 128 lie where, in the rows 0 to 7 of 1024 bytes: the table of "Swizzling modes", 128 bytes,
# in the PTX manual.
SWIZZLE = (
    (0, 1, 2, 3, 4, 5, 6, 7),
    (1, 0, 3, 2, 5, 4, 7, 6),
    (2, 3, 0, 1, 6, 7, 4, 5),
    (3, 2, 1, 0, 7, 6, 5, 4),
    (4, 5, 6, 7, 0, 1, 2, 3),
    (5, 4, 7, 6, 1, 0, 3, 2),
    (6, 7, 4, 5, 2, 3, 0, 1),
    (7, 6, 5, 4, 3, 2, 1, 0),
)


def box_of(matrix: np.ndarray, column: int, row: int) -> np.ndarray:
    """64 x 64 numbers, zero beyond the matrix."""
    padded = np.pad(matrix, 128)
    return padded[128 + row : 192 + row, 128 + column : 192 + column]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("corner", ((0, 0), (64, 0), (64, 64), (40, 80), (-3, -5), (96, 0), (0, 100)))
def test_a_box_comes_swizzled_with_zeros_beyond_the_matrix(run, corner, seed):
    matrix = numbered(100, 96)
    found = run("load", 96, 100, *corner, 1, of=matrix, into=aligned((64, 8, 8)), seed=seed)
    expected = box_of(matrix, *corner).reshape(64, 8, 8)
    for row in range(64):
        for place, chunk in enumerate(SWIZZLE[row % 8]):
            np.testing.assert_array_equal(found[row, place], expected[row, chunk])


def test_a_box_without_swizzle_is_rows(run):
    matrix = numbered(100, 96)
    found = run("load", 96, 100, 40, 80, 0, of=matrix, into=aligned((64, 64)))
    np.testing.assert_array_equal(found, box_of(matrix, 40, 80))


# Products.


def fragments(result: np.ndarray) -> np.ndarray:
    """The registers of every thread, of a result (64, 128): CUTLASS's CLayout_64x128, ((4, 8, 4), (2, 2, 16)) :
    ((128, 1, 16), (64, 8, 512)), an index of the result by columns."""
    t, i = np.arange(128)[:, None], np.arange(64)
    index = t % 4 * 128 + t // 4 % 8 + t // 32 * 16 + i % 2 * 64 + i // 2 % 2 * 8 + i // 4 * 512
    return result.T.reshape(-1)[index]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", ((0, 1), (1, 1), (3, 1), (4, 1), (7, 1), (0, 8), (2, 4)))
def test_a_product_reads_what_its_descriptors_name_and_leaves_fragments(run, steps, seed):
    first, count = steps
    numbers = np.random.default_rng(0).standard_normal((192, 128))
    operands = rounded(numbers)
    found = run("product", first, count, 0, of=operands, into=aligned((128, 64), np.float32), seed=seed)
    part = exact(operands)[:, 16 * first : 16 * (first + count)]
    np.testing.assert_allclose(found, fragments(part[:64] @ part[64:].T), rtol=0, atol=1e-4)


def test_a_product_adds_to_its_registers(run):
    operands = rounded(np.random.default_rng(0).standard_normal((192, 128)))
    found = run("product", 0, 3, 1, of=operands, into=aligned((128, 64), np.float32))
    part = exact(operands)[:, :48]
    before = np.arange(128 * 64).reshape(128, 64)
    np.testing.assert_allclose(found, before + fragments(part[:64] @ part[64:].T), rtol=1e-6, atol=1e-4)


# Stores.


@pytest.mark.parametrize("transposed", (0, 1))
def test_stmatrix_takes_two_numbers_of_four_lanes_to_a_row(run, transposed):
    """Or with .trans to a column."""
    registers = numbered(32, 4, 2)  # of a lane: matrix, half
    found = run("store_matrix", transposed, of=registers, into=aligned((4, 8, 8)))
    if transposed:
        found = found.swapaxes(1, 2)
    for lane in range(32):
        for matrix in range(4):
            at = found[matrix, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            np.testing.assert_array_equal(at, registers[lane, matrix])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("corner", ((0, 0), (64, 64), (40, 80), (-3, -5)))
@pytest.mark.parametrize("adds", (False, True))
def test_a_stored_box_drops_what_is_beyond_the_matrix(run, corner, adds, seed):
    column, row = corner
    random = np.random.default_rng(0)
    tile, found = rounded(random.standard_normal((64, 64))), rounded(random.standard_normal((100, 96)))
    expected = np.zeros((356, 352), np.uint16)
    expected[128:228, 128:224] = found
    block = expected[128 + row : 192 + row, 128 + column : 192 + column]
    block[...] = rounded(exact(block) + exact(tile)) if adds else tile
    run("store", 96, 100, column, row, adds, of=tile, into=found, seed=seed)
    np.testing.assert_array_equal(found, expected[128:228, 128:224])


# Barriers and lanes.


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("program", ("phases", "named_barriers"))
def test_barriers_hold_back_whom_they_should(run, program, seed):
    run(program, into=aligned((1,)), seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_every_block_runs_once_and_alone(run, seed):
    np.testing.assert_array_equal(run("blocks_alone", into=aligned((3,)), seed=seed), 1)


def test_lanes_exchange_vote_and_round(run):
    x = aligned((32,), np.float32)
    x[...] = np.random.default_rng(0).uniform(-20, 20, 32)
    x[:6] = (-140, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8, -200, 70000)
    for bound, all_above in ((-201, 1), (-199, 0)):
        shuffled, powers, vote, packed = run("lanes", bound, of=x, into=aligned((4, 32), np.float32))
        np.testing.assert_array_equal(shuffled, x[np.arange(32) ^ 5])
        with np.errstate(over="ignore"):
            expected = np.exp2(x.astype(np.float64)).astype(np.float32)
        expected[[0, 4]] = 0  # flushed
        np.testing.assert_allclose(powers, expected, rtol=1e-6)
        np.testing.assert_array_equal(vote, all_above)
        both = packed.view(np.uint16).reshape(32, 2)
        np.testing.assert_array_equal(both, rounded(np.stack((x, -x), axis=1)))


def test_registers_are_never_more_than_a_block_has(run):
    run("registers", 240, into=aligned((1,)))
    with pytest.raises(EmulatorError, match=r"nothing can happen any more(.|\n)*take_registers(.|\n)*free registers"):
        run("registers", 248, into=aligned((1,)))


UNFIT = (
    r"tma_load: \+128 is no multiple of 1024",
    "tma_load: bytes 61440 to 69632 are outside of the 65536 bytes",
    r"tma_load: overwrites the barrier at \+32768",
    "expects 1048576 bytes, which it cannot count",
    r"mbarrier_arrive: one arrival too many at \+32768",
    r"a begins at \+256, within a group",
    "only that of 128 bytes",
    "lanes of the warp are in",
    "barrier 1 for (64|128) threads, and others said (64|128)",
    r"store_shared: \+32768 is a barrier",
    "ends with 32 of 64 threads at named barrier 3",
    r"load_shared: \+2 is no multiple of 4",
    "another load is under way",
    r"no barrier was initialized at \+32776",
    "not every warp of warpgroup 0 has set its registers",
    r"overwrites \+0, which thread 0 wrote without fence_proxy_async",
    "registers were written while they were in flight",
    "threads of a warpgroup disagree",
)


@pytest.mark.parametrize("what", range(len(UNFIT)))
def test_what_no_gpu_would_do_is_an_error(run, what):
    with pytest.raises(EmulatorError, match=r"seed 3: (.|\n)*" + UNFIT[what]):
        run("unfit", what, of=numbered(64, 64), into=aligned((1,)), seed=3)


# Adversarial time.

FAULTS = (
    "no wait for an empty stage",
    "no wait for a full stage",
    "no wait for the panel",
    "no wait for the last product",
    "no wait for the store before",
    "no wait for the last store",
    "no sync after the initialization",
    "no sync after the wait for the store",
    "no sync before the store",
    "no fence of the initialization",
    "no fence of the registers",
    "no proxy fence",
    "the proxy fence after the sync",
    "no commit",
    "no commit of the store",
    "no swizzle",
    "the producer's parity",
    "the consumers' parity",
    "too few bytes expected",
    "too many bytes expected",
    "an arrival less than consumers",
    "an arrival more than consumers",
    "released before its product",
    "released before the wait",
    "the last stage is kept",
)


@pytest.fixture(scope="session")
def pipeline(library: ctypes.CDLL) -> Callable[..., str | None]:
    """Runs the pipeline and returns what is wrong, or None."""
    rows, depth = 300, 128
    random = np.random.default_rng(0)
    x, y = (rounded(random.standard_normal((n, depth))) for n in (rows, 256))
    expected = exact(x) @ exact(y).T

    def one(seed: int, fault: str = "", stages: int = 3) -> str | None:
        out = aligned((rows, 256))
        out[...] = 0xFFFF
        try:
            call(library.run_pipeline, fault.encode(), ctypes.c_uint64(seed), stages, rows, depth, x, y, out)
        except EmulatorError as error:
            return str(error)
        error = np.abs(exact(out) - expected)
        return None if np.all(error <= 2.0**-8 * np.abs(expected) + 1e-4) else "a wrong number"

    return one


@pytest.mark.parametrize("stages", (2, 3, 4))
def test_the_pipeline_is_right_under_every_seed(pipeline, stages):
    for seed in range(SEEDS):
        assert pipeline(seed, stages=stages) is None, seed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_pipeline_is_found(pipeline, fault):
    assert any(pipeline(seed, fault) for seed in range(SEEDS))


def test_a_deadlock_is_reported_with_every_barrier(pipeline):
    found = pipeline(1, "the last stage is kept")
    for line in (
        "seed 1: ",
        "nothing can happen any more",
        "block 1, threads 0 to 0: mbarrier_wait at +114728, parity 0",
        "block 1, barrier at +114728: phase 0, 2 of 2 arrivals and 0 bytes to come",
    ):
        assert line in found, found


def test_the_same_seed_is_the_same_time(library, pipeline):
    library.counts.restype = ctypes.POINTER(ctypes.c_uint64 * 16)
    counts = []
    for seed in (7, 7, 8):
        assert pipeline(seed) is None
        counts.append(list(library.counts().contents))
    assert counts[0] == counts[1] != counts[2]
