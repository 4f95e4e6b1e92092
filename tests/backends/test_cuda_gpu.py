"""The loader on a Hopper GPU: the real driver and compiler, a kernel that copies a matrix by TMA."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from softclip_kernels.backends.cuda import kernels, sources
from softclip_kernels.backends.cuda.driver import DriverError
from softclip_kernels.backends.cuda.launch import Launch, Module
from softclip_kernels.backends.cuda.nvrtc import nvrtc
from softclip_kernels.backends.cuda.tensor_map import TensorMap

DEVICE = torch.device("cuda", 0)
WHY_NOT = kernels.why_not(DEVICE) if torch.cuda.is_available() else "no CUDA device: run on a machine with a GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

ROWS, COLUMNS, BOX, BLOCKS = 100, 64, (64, 64), 2
SHARED = 100_000  # more than a kernel has without asking

# out = the bits of the matrix + added, box by box; ranks = each block's own in its cluster.
TEXT = """
#include "ptx.cuh"
extern "C" __global__ void copied(const __grid_constant__ ptx::TensorMap map, short* out, int added, unsigned* ranks) {
  unsigned box = ptx::shared_memory(), barrier = box + 64 * 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_expect(barrier, 64 * 128);
    ptx::tma_load(box, map, 0, 64 * blockIdx.x, barrier);
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(ranks[blockIdx.x]));
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int place = threadIdx.x; place < 64 * 64; place += blockDim.x) {
    int row = place / 64, column = place % 64;
    short value;
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=h"(value)
                 : "r"(box + row * 128 + (column / 8 ^ row % 8) * 16 + column % 8 * 2));
    out[(64 * blockIdx.x + row) * 64 + column] = value + added;
  }
}
"""


@pytest.fixture(scope="module")
def function():
    cubin = nvrtc().compile("copied.cu", TEXT, sources.headers(), kernels.OPTIONS)
    return Module(cubin, 0).function("copied", SHARED)


class Copied:
    """The launch, its operand (a part of a wider matrix) and its results."""

    def __init__(self, function, dtype=torch.bfloat16):
        self.x = torch.randn(ROWS, 512, device=DEVICE).to(dtype)[:, 128 : 128 + COLUMNS]
        self.out = torch.full((128, COLUMNS), -1, dtype=torch.int16, device=DEVICE)
        self.ranks = torch.full((BLOCKS,), 7, dtype=torch.int32, device=DEVICE)
        self.added = ctypes.c_int32(0)
        self.map = TensorMap.of(self.x, BOX)
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (self.out, self.ranks)]
        self.launch = Launch(function, [self.map, pointers[0], self.added, pointers[1]])

    def __call__(self, cluster=1):
        self.launch(BLOCKS, 128, cluster, torch.cuda.current_stream().cuda_stream)

    def check(self, added=0, cluster=1):
        torch.cuda.synchronize()
        expected = torch.zeros_like(self.out)
        expected[:ROWS] = self.x.contiguous().view(torch.int16)
        assert torch.equal(self.out, expected + added)
        assert self.ranks.tolist() == ([0, 1] if cluster == 2 else [0, 0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("cluster", (1, 2))
def test_a_launch_does_what_its_arguments_say(function, dtype, cluster):
    copied = Copied(function, dtype)
    copied(cluster)
    copied.check(cluster=cluster)
    copied.added.value = 5
    copied.x = torch.randn(ROWS, COLUMNS, device=DEVICE).to(dtype)
    copied.map.encode(copied.x)
    copied(cluster)
    copied.check(5, cluster)


def test_a_launch_from_a_thread_that_never_saw_the_gpu(function):
    copied = Copied(function)
    stream = torch.cuda.current_stream().cuda_stream
    thread = threading.Thread(target=lambda: copied.launch(BLOCKS, 128, 1, stream))
    thread.start()
    thread.join()
    copied.check()


def test_a_launch_keeps_to_its_stream_and_is_captured(function):
    copied = Copied(function)
    copied()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copied()
    copied.out.fill_(-1)
    graph.replay()
    copied.check()


def test_what_the_driver_knows_of_a_kernel_is_checked(function):
    if function.parameter_bytes is not None:  # from CUDA 12.4 on
        assert function.parameter_bytes == [128, 8, 4, 8]
        with pytest.raises(TypeError, match="copied takes parameters"):
            Launch(function, [ctypes.c_int32(0)])
    copied = Copied(function)
    with pytest.raises(
        DriverError, match=r"cuLaunchKernelEx of copied \(grid 2, block 2048, .*CUDA_ERROR_INVALID_VALUE"
    ):
        copied.launch(BLOCKS, 2048, 1, 0)
    copied()
    copied.check()
