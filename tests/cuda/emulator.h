// Runs the text of csrc/cuda/ on a CPU: takes the place of ptx.cuh and declares the same functions. Everything that a
// GPU does asynchronously happens here at a legal moment that the seed chooses, so that a synchronization that is
// missing gives NaN, a wrong number or an error under some seed.
//
//     emulator.cpp  the functions                       machine.h  a block from start to end
//     fibres.h      threads, and who runs when          thread.h   a thread
//     barriers.h    mbarriers, named barriers           memory.h   shared memory of a block
//     copies.h      loads and stores by tensor maps     wgmma.h    products
//
// What it cannot show: memory ordering between threads (here all see all writes in one order), bank conflicts, speed,
// and a misreading of the manual that it shares with the kernel.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>

#include "statistics.h"

#define SOFTCLIP_PTX  // instead of ptx.cuh
#define DEVICE inline
#define __device__
#define __host__
#define __global__
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
inline int __float_as_int(float value) {
  int bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

namespace ptx {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

u32 thread();
u32 block();
u32 blocks();

u32 shared_memory();
float load_shared(u32 address);
void load_shared(u32 address, float& first, float& second);
void store_shared(u32 address, float value);

void set_registers(const char* name, int registers, bool more);
template <int kRegisters>
void take_registers() {
  set_registers("take_registers", kRegisters, true);
}
template <int kRegisters>
void give_registers() {
  set_registers("give_registers", kRegisters, false);
}

void barrier_sync(u32 barrier, u32 threads);
void barrier_arrive(u32 barrier, u32 threads);
void block_sync();

void mbarrier_init(u32 barrier, u32 arrivals);
void mbarrier_init_fence();
void mbarrier_expect(u32 barrier, u32 bytes);
void mbarrier_arrive(u32 barrier);
void mbarrier_wait(u32 barrier, u32 parity);

void tma_load(u32 destination, const TensorMap& map, int column, int row, u32 barrier);
void tma_store(const TensorMap& map, int column, int row, u32 source);
void tma_add(const TensorMap& map, int column, int row, u32 source);
void tma_store_commit();
void store_wait_read(u32 left);
template <int kGroups>
void tma_store_wait_read() {
  store_wait_read(kGroups);
}
void fence_proxy_async();

void wgmma_fence();
void wgmma_commit();
void product_wait(u32 left);
template <int kGroups>
void wgmma_wait() {
  product_wait(kGroups);
}
inline u64 matrix(u32 address) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | 1ull << 16 | static_cast<u64>(1024 >> 4) << 32 | 1ull << 62;
}
void wgmma(float (&d)[64], u64 a, u64 b, bool add);

void stmatrix(u32 address, u32 a, u32 b, u32 c, u32 d);
void stmatrix_transposed(u32 address, u32 a, u32 b, u32 c, u32 d);
u32 pack(float low, float high);
float exp2(float x);
float shuffle_xor(float value, u32 lanes);
bool all_of_warp(bool value);

}  // namespace ptx

namespace emulator {

// The blocks, one after another in an order of the seed's, call body(context) with so many threads. Throws Error.
void launch(unsigned blocks, unsigned shared_bytes, unsigned threads, unsigned long long seed,
            void (*body)(const void*), const void* context);
template <class Body>
void launch(unsigned blocks, unsigned shared_bytes, unsigned threads, unsigned long long seed, const Body& body) {
  const auto call = [](const void* context) { (*static_cast<const Body*>(context))(); };
  launch(blocks, shared_bytes, threads, seed, call, &body);
}

// A map of a matrix with rows `row_bytes` apart, as cuTensorMapEncodeTiled makes one and with its conditions.
ptx::TensorMap tensor_map(const void* base, unsigned long long columns, unsigned long long rows,
                          unsigned long long row_bytes, unsigned box_columns, unsigned box_rows, unsigned element = 2,
                          bool swizzle = true);

// Calls `action`. Returns 0, or 1 with the message of what it threw: what a function called from Python returns.
template <class Action>
int guarded(char* message, unsigned long long size, const Action& action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
}

}  // namespace emulator
