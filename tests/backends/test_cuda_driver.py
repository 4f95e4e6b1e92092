"""Calls of NVIDIA's driver, with a stand-in for it: what it is handed, and the error of each call by name."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import threading

import pytest
import torch
from helpers import ROOT
from helpers.cuda_driver import UNKNOWN, Encoded, Launched, StandIn

from softclip_kernels.backends.cuda import Unavailable, driver, launch
from softclip_kernels.backends.cuda.driver import Driver, DriverError
from softclip_kernels.backends.cuda.launch import Launch, Module
from softclip_kernels.backends.cuda.tensor_map import TensorMap

KERNELS = {"scaled": (128, 8, 4, 4, 8)}  # a tensor map, a pointer, an int, a float, another pointer
BOX = (64, 64)
SHARED = 200_000


def started(**options):
    """A stand-in in which device 0 is the current one, and the driver that talks to it."""
    stand_in = StandIn(KERNELS, **options)
    stand_in.current = 1000
    return stand_in, Driver(stand_in)


def matrix(rows=100, columns=96, dtype=torch.bfloat16):
    return torch.zeros(rows, columns, dtype=dtype)


def prepared(made, device=0):
    """A launch of `scaled` with its arguments."""
    function = Module(b"a cubin", device, made).function("scaled", SHARED)
    arguments = [
        TensorMap.of(matrix(), BOX, made),
        ctypes.c_void_p(0x7F00_0000_0010),
        ctypes.c_int32(-7),
        ctypes.c_float(0.5),
        ctypes.c_uint64(2**63 + 5),
    ]
    return Launch(function, arguments), arguments


# Launches.


def test_a_kernel_gets_its_arguments_in_order():
    stand_in, made = started()
    launch, _ = prepared(made)
    launch(132, 384, 1, 0x5555_0000_0020)
    assert stand_in.modules == [(1000, b"a cubin")]
    assert stand_in.launched == [
        Launched(
            "scaled",
            1000,
            (132, 1, 1),
            (384, 1, 1),
            None,
            SHARED,
            0x5555_0000_0020,
            [
                stand_in.map_bytes(0),
                struct.pack("<Q", 0x7F00_0000_0010),
                struct.pack("<i", -7),
                struct.pack("<f", 0.5),
                struct.pack("<Q", 2**63 + 5),
            ],
        )
    ]


def test_what_changes_between_launches_reaches_the_kernel():
    """Values, a matrix, the grid, the cluster, the stream; what the driver made of the first launch stays."""
    stand_in, made = started()
    launch, arguments = prepared(made)
    launch(132, 384, 1, 16)
    before = stand_in.launched[0]
    arguments[0].encode(matrix(rows=200))
    for argument, value in zip(arguments[1:], (32, 8, 1.5, 48), strict=True):
        argument.value = value
    launch(66, 128, 2, 0)
    after = stand_in.launched[1]
    assert (after.grid, after.block, after.cluster, after.stream) == ((66, 1, 1), (128, 1, 1), (2, 1, 1), None)
    assert after.parameters == [
        stand_in.map_bytes(1),
        *(struct.pack(f"<{kind}", value) for kind, value in (("Q", 32), ("i", 8), ("f", 1.5), ("Q", 48))),
    ]
    assert (before.grid, before.cluster, before.stream) == ((132, 1, 1), None, 16)
    launch(132, 384, 1, 16)
    assert stand_in.launched[2].cluster is None


def test_a_launch_is_one_call_of_the_driver():
    stand_in, made = started()
    launch, _ = prepared(made)
    del stand_in.called[:]
    launch(132, 384, 2, 0)
    assert stand_in.called == ["cuLaunchKernelEx"]


def test_arguments_that_are_not_the_kernels_are_refused():
    """One too few, one too many, one of another size, two in each other's place; where the driver is too old to say
    what a kernel takes, nobody knows."""
    _, made = started()
    launch, arguments = prepared(made)
    swapped = [arguments[1], arguments[0], *arguments[2:]]
    for given in (arguments[:-1], [*arguments, ctypes.c_int32(0)], [*arguments[:-1], ctypes.c_int32(0)], swapped):
        with pytest.raises(TypeError, match=r"scaled takes parameters of \[128, 8, 4, 4, 8\] bytes.*arguments have \["):
            Launch(launch.function, given)
    _, older = started(lacks=("cuFuncGetParamInfo",))
    launch, _ = prepared(older)
    launch(132, 384, 1, 0)


def test_shared_memory_once_granted_is_not_taken_back():
    """The driver keeps one limit for a kernel, whatever Function of it is launched."""
    stand_in, made = started()
    module = Module(b"a cubin", 0, made)
    _, arguments = prepared(made)
    large, small = module.function("scaled", SHARED), module.function("scaled", 1000)
    small.handle = large.handle  # as the driver has it
    for function, shared in ((large, SHARED), (small, 1000)):
        Launch(function, arguments)(132, 384, 1, 0)
        assert stand_in.launched[-1].shared_bytes == shared
    assert list(stand_in._shared.values())[1:] == [SHARED, SHARED]


# Contexts and threads.


def in_a_thread(function):
    """What it raised, or None."""
    raised: list[BaseException | None] = [None]

    def run():
        try:
            function()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


def test_a_thread_without_a_context_gets_the_modules():
    """As autograd's are, where nothing of torch has run on the GPU yet."""
    stand_in, made = started()
    launch, _ = prepared(made)

    def twice():
        for _ in range(2):
            launch(132, 384, 1, 0)
        assert stand_in.current == 1000

    del stand_in.called[:]
    assert in_a_thread(twice) is None
    assert [launched.context for launched in stand_in.launched] == [1000, 1000]
    assert stand_in.called == ["cuLaunchKernelEx", "cuCtxGetCurrent", "cuCtxSetCurrent", *["cuLaunchKernelEx"] * 2]


def test_a_module_is_loaded_where_it_belongs_and_the_current_context_stays():
    stand_in, made = started()
    for current in (None, 1000, 1001):
        stand_in.current = current
        launch, _ = prepared(made, device=1)
        assert stand_in.modules[-1] == (1001, b"a cubin") and stand_in.current == current
    launch(132, 384, 1, 0)  # on device 1, which is the current one
    assert stand_in.launched[0].context == 1001
    assert stand_in.called.count("cuDevicePrimaryCtxRetain") == 1


def test_a_launch_on_another_device_is_an_error_by_name():
    stand_in, made = started()
    launch, _ = prepared(made, device=1)
    with pytest.raises(DriverError, match=r"cuLaunchKernelEx of scaled .*CUDA_ERROR_INVALID_HANDLE"):
        launch(132, 384, 1, 0)
    assert stand_in.current == 1000


# Errors.

CALLS = (
    *("cuInit", "cuDriverGetVersion", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxSetCurrent"),
    *("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuFuncGetParamInfo", "cuTensorMapEncodeTiled"),
    *("cuLaunchKernelEx", "cuMemsetD8Async"),
)


def walk(stand_in):
    """Every call is made."""
    stand_in.current = None
    made = Driver(stand_in)
    made.version()
    launch, _ = prepared(made)
    launch(132, 384, 2, 0)
    made.call("cuMemsetD8Async", 4096, 0, 64, 0)


def test_the_walk_makes_every_call():
    stand_in = StandIn(KERNELS)
    walk(stand_in)
    assert set(stand_in.called) == set(CALLS) == set(driver.PROTOTYPES) - {"cuGetErrorName", "cuGetErrorString"}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_is_named(name):
    with pytest.raises(DriverError, match=rf"^{name}.* failed: CUDA_ERROR_UNKNOWN \(unknown error\)$") as raised:
        walk(StandIn(KERNELS, fails={name: UNKNOWN}))
    assert raised.value.code == UNKNOWN


def test_a_failed_launch_says_what_was_launched():
    stand_in, made = started()
    launch, _ = prepared(made)
    stand_in.fails["cuLaunchKernelEx"] = 1
    with pytest.raises(
        DriverError,
        match=r"cuLaunchKernelEx of scaled \(grid 131, block 384, cluster 2, 200000 bytes of shared memory\) failed: "
        r"CUDA_ERROR_INVALID_VALUE \(invalid argument\)",
    ):
        launch(131, 384, 2, 0)


def test_an_error_that_the_driver_does_not_know_is_a_number():
    for fails in (
        {"cuModuleLoadData": 4321},
        {"cuModuleLoadData": UNKNOWN, "cuGetErrorName": 1, "cuGetErrorString": 1},
    ):
        code = fails["cuModuleLoadData"]
        with pytest.raises(
            DriverError, match=rf"^cuModuleLoadData failed: error {code} \(which this driver does not know\)"
        ):
            walk(StandIn(KERNELS, fails=fails))


def test_a_kernel_that_is_not_there_is_an_error():
    _, made = started()
    with pytest.raises(DriverError, match=r"cuModuleGetFunction of scale .*CUDA_ERROR_NOT_FOUND"):
        Module(b"a cubin", 0, made).function("scale")


# A driver that is missing, too old or does not start.


@pytest.fixture
def fresh():
    """`driver()` has not been called yet."""
    driver.driver.cache_clear()
    yield
    driver.driver.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_no_driver_is_a_reason(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-nobody-has.so.1")
    with pytest.raises(Unavailable, match=r"there is no NVIDIA driver .*libcuda-that-nobody-has"):
        driver.driver()


@pytest.mark.usefixtures("fresh")
def test_a_driver_that_does_not_start_is_a_reason(monkeypatch):
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: StandIn(KERNELS, fails={"cuInit": UNKNOWN}))
    with pytest.raises(Unavailable, match="does not start: cuInit failed: CUDA_ERROR_UNKNOWN"):
        driver.driver()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: StandIn(KERNELS))
    assert driver.driver().version() == "12.8"
    assert launch.driver() is driver.driver()


@pytest.mark.parametrize("name", sorted(driver.PROTOTYPES))
def test_a_driver_that_lacks_a_call_is_a_reason(name):
    if name == "cuFuncGetParamInfo":
        assert Driver(StandIn(KERNELS, lacks=(name,))).version() == "12.8"
        return
    hint = {"cuLaunchKernelEx": ".*CUDA 11.8: update", "cuTensorMapEncodeTiled": ".*CUDA 12.0: update"}.get(name, "$")
    with pytest.raises(Unavailable, match=f"NVIDIA's driver has no {name}{hint}"):
        Driver(StandIn(KERNELS, lacks=(name,)))


def test_importing_the_package_loads_none_of_this():
    code = """
import sys
import softclip_kernels, softclip_kernels.backends.cuda
print([name for name in sys.modules if name.startswith("softclip_kernels.backends.cuda.")])
import softclip_kernels.backends.cuda.kernels
print(any("libcuda.so" in line or "libnvrtc" in line for line in open("/proc/self/maps")))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "False"]


# Tensor maps.

FLOAT16, BFLOAT16, SWIZZLE_128B, L2_256B = 6, 9, 3, 3
STRIDED = torch.zeros(100, 512, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("of", "box", "dtype", "sizes", "stride"),
    (
        (matrix(), (64, 64), BFLOAT16, [96, 100], 192),
        (matrix(dtype=torch.float16), (128, 32), FLOAT16, [96, 100], 192),
        (STRIDED[:, 64:192], (256, 64), BFLOAT16, [128, 100], 1024),
        (STRIDED[3::7], (1, 8), BFLOAT16, [512, 14], 7 * 1024),
        (STRIDED[:, :3], (64, 64), BFLOAT16, [3, 100], 1024),
        (STRIDED[:, ::512], (64, 64), BFLOAT16, [1, 100], 1024),
        (STRIDED[:1].expand(1, 512), (64, 64), BFLOAT16, [512, 1], 1024),
        (torch.zeros(1, 20, dtype=torch.bfloat16), (64, 64), BFLOAT16, [20, 1], 48),
    ),
    ids=("whole", "float16", "some columns", "some rows", "narrow", "a column", "a row", "a row of no whole step"),
)
def test_a_tensor_map_says_how_the_matrix_lies(of, box, dtype, sizes, stride):
    stand_in, made = started()
    tensor_map = TensorMap.of(of, box, made)
    rows, columns = box
    options = (0, SWIZZLE_128B, L2_256B, 0)
    assert stand_in.encoded == [Encoded(dtype, of.data_ptr(), sizes, [stride], [columns, rows], [1, 1], options)]
    assert tensor_map.address % 128 == 0
    assert ctypes.string_at(tensor_map.address, 128) == stand_in.map_bytes(0)


@pytest.mark.parametrize(
    ("of", "message"),
    (
        (matrix(dtype=torch.float32), "a matrix of torch.float32; .*bfloat16 and float16"),
        (matrix()[0], r"a matrix of shape \(96,\); TMA takes two sizes"),
        (matrix(rows=0), r"a matrix of shape \(0, 96\); TMA takes two sizes of 1 to 4294967296"),
        (matrix().T, "elements 96 apart along its rows; TMA takes contiguous rows"),
        (matrix(columns=97), "rows 194 bytes apart; TMA takes multiples of 16 from the 194 bytes"),
        (STRIDED[:, 4:], "at address 0x[0-9a-f]+8; TMA takes multiples of 16"),
        (STRIDED[:1].expand(100, 512), "rows 0 bytes apart; TMA takes multiples of 16 from the 1024 bytes of a row"),
        (STRIDED.as_strided((4, 96), (48, 1)), "rows 96 bytes apart; TMA takes multiples of 16 from the 192 bytes"),
    ),
    ids=("dtype", "a vector", "empty", "transposed", "odd width", "odd address", "repeated", "overlapping"),
)
def test_a_matrix_that_tma_cannot_read_is_refused(of, message):
    stand_in, made = started()
    with pytest.raises(ValueError, match=message):
        TensorMap.of(of, BOX, made)
    assert stand_in.encoded == []


@pytest.mark.parametrize(("rows", "columns"), ((0, 64), (257, 64), (64, 0), (64, 12), (64, 72)))
def test_a_box_that_tma_cannot_take_is_refused(rows, columns):
    _, made = started()
    wrong = f"a box of {rows} rows" if not 0 < rows < 257 else f"a box of {columns} columns"
    with pytest.raises(ValueError, match=f"{wrong};.* TMA takes .*1 to 256|{wrong};.*multiples of 8 up to 64"):
        TensorMap(((rows, columns)), made)
