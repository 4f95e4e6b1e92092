// Runs the text of csrc/cuda/ on a CPU: takes the place of ptx.cuh and defines the same functions. Everything that a
// GPU does asynchronously happens here at a legal moment that the seed chooses, so that a synchronization that is
// missing gives NaN, a wrong number or an error under some seed.
//
//     fibres.h    threads, and who runs when          memory.h    shared memory of a block
//     barriers.h  mbarriers, named barriers           thread.h    a thread
//     copies.h    loads and stores by tensor maps     wgmma.h     products
//     machine.h   a cluster from start to end
//
// What it cannot show: memory ordering between threads (here all see all writes in one order), bank conflicts, speed,
// and a misreading of the manual that it shares with the kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "machine.h"

#define SOFTCLIP_PTX  // instead of ptx.cuh
#define DEVICE inline
#define __device__
#define __host__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

// What nvcc defines for device code, as far as the kernels use it.
template <class Number>
Number min(Number a, Number b) {
  return a < b ? a : b;
}
template <class Number>
Number max(Number a, Number b) {
  return a < b ? b : a;
}
inline int __float_as_int(float value) { return static_cast<int>(emulator::float_to_bits(value)); }
inline float __int_as_float(int bits) { return emulator::bits_to_float(static_cast<unsigned>(bits)); }

namespace ptx {

using u16 = emulator::u16;
using u32 = emulator::u32;
using u64 = emulator::u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

}  // namespace ptx

namespace emulator {

// Each block of a cluster of 1 or 2, and the clusters one after another in an order of the seed's, runs `body()` with
// so many threads. Throws Error.
template <class Body>
void launch(u32 blocks, u32 cluster, u32 shared_bytes, u32 threads, u64 seed, const Body& body) {
  statistics = {};
  try {
    if (cluster < 1 || cluster > 8 || blocks % cluster != 0)
      fail("launch: %u blocks in clusters of %u", blocks, cluster);
    if (shared_bytes > kSharedBytes)
      fail("launch: %u bytes of shared memory, and there are %u", shared_bytes, kSharedBytes);
    if (threads % 32 != 0 || threads < 32 || threads > 1024) fail("launch: %u threads", threads);
    if (cluster * threads > 2048) fail("launch: %u threads in a cluster, 2048 are emulated", cluster * threads);
    std::vector<u32> order;
    for (u32 first = 0; first < blocks; first += cluster) order.push_back(first);
    Random random(seed);
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(static_cast<u32>(i))]);
    for (u32 first : order) {
      Machine cluster_machine(first, cluster, blocks, shared_bytes, threads, random.next(), body);
      machine = &cluster_machine;
      cluster_machine.run();
    }
  } catch (const Error& error) {
    throw Error(text("seed %llu: ", seed) + error.what());
  }
}

// Calls `action`. Returns 0, or 1 with the message of what it threw: what a function called from Python returns.
template <class Action>
int guarded(char* message, u64 size, const Action& action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}

// A map of a matrix with rows `row_bytes` apart, as cuTensorMapEncodeTiled makes one and with its conditions.
inline ptx::TensorMap tensor_map(const void* base, u64 columns, u64 rows, u64 row_bytes, u32 box_columns, u32 box_rows,
                                 u32 element = 2, bool swizzle = true) {
  const Matrix matrix = {
      kMagic, const_cast<u8*>(static_cast<const u8*>(base)), columns, rows, row_bytes, box_columns, box_rows, element,
      swizzle};
  if (reinterpret_cast<std::uintptr_t>(base) % 16 != 0) fail("tensor_map: the matrix is not aligned to 16 bytes");
  if (row_bytes % 16 != 0 || row_bytes >= 1ull << 40) fail("tensor_map: rows are %llu bytes apart", row_bytes);
  if (columns == 0 || rows == 0 || columns > 1ull << 32 || rows > 1ull << 32) fail("tensor_map: an empty matrix");
  if (box_columns == 0 || box_rows == 0 || box_columns > 256 || box_rows > 256) fail("tensor_map: a box's sides");
  if (matrix.box_row_bytes() % 16 != 0) fail("tensor_map: a box's rows are %u bytes", matrix.box_row_bytes());
  if (swizzle && matrix.box_row_bytes() != 128) fail("tensor_map: rows of a swizzled box are not 128 bytes");
  ptx::TensorMap map = {};
  static_assert(sizeof matrix <= sizeof map.opaque);
  std::memcpy(map.opaque, &matrix, sizeof matrix);
  return map;
}

inline Matrix matrix_of(const ptx::TensorMap& map) {
  Matrix matrix;
  std::memcpy(&matrix, map.opaque, sizeof matrix);
  return matrix;
}

}  // namespace emulator

#include "ptx_emulated.h"
