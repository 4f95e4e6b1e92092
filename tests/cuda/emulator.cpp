// Definitions of emulator.h. The functions of ptx.cuh are explained there.
#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "machine.h"

namespace emulator {

Statistics statistics;
Machine* machine = nullptr;

void launch(u32 blocks, u32 shared_bytes, u32 threads, u64 seed, void (*body)(const void*), const void* context) {
  statistics = {};
  try {
    if (shared_bytes > kSharedBytes)
      fail("launch: %u bytes of shared memory, and there are %u", shared_bytes, kSharedBytes);
    if (threads % 32 != 0 || threads < 32 || threads > 1024) fail("launch: %u threads", threads);
    std::vector<u32> order;
    for (u32 block = 0; block < blocks; ++block) order.push_back(block);
    Random random(seed);
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(static_cast<u32>(i))]);
    for (u32 block : order) {
      Machine of_block(block, blocks, shared_bytes, threads, random.next(), [&] { body(context); });
      machine = &of_block;
      of_block.run();
    }
  } catch (const Error& error) {
    throw Error(text("seed %llu: ", seed) + error.what());
  }
}

ptx::TensorMap tensor_map(const void* base, u64 columns, u64 rows, u64 row_bytes, u32 box_columns, u32 box_rows,
                          u32 element, bool swizzle) {
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

static Matrix matrix_of(const ptx::TensorMap& map) {
  Matrix matrix;
  std::memcpy(&matrix, map.opaque, sizeof matrix);
  return matrix;
}

}  // namespace emulator

namespace ptx {

static emulator::Thread& self() { return emulator::machine->self(); }
static emulator::Scheduler& scheduler() { return emulator::machine->scheduler; }
template <class Action>
static void together(const char* name, const Action& action) {
  scheduler().together(name, action);
}

u32 thread() { return self().index; }
u32 block() { return self().block->index; }
u32 blocks() { return emulator::machine->grid; }

u32 shared_memory() { return emulator::kSharedBase; }
template <class Value>
static Value read_shared(u32 address) {
  Value value;
  ++emulator::statistics.shared_reads;
  self().block->memory.read("load_shared", address, &value, sizeof value);
  scheduler().preempt();
  return value;
}
float load_shared(u32 address) { return read_shared<float>(address); }
void load_shared(u32 address, float& first, float& second) {
  struct Pair {
    float first, second;
  };
  const Pair pair = read_shared<Pair>(address);
  first = pair.first, second = pair.second;
}
static void write_shared(const char* name, emulator::Thread& thread, u32 address, const void* from, u32 bytes) {
  emulator::machine->stores.check_write(thread.block, address, bytes);
  const bool leaks = scheduler().random.chance(scheduler().policy.leaks);
  thread.block->memory.write(name, address, from, bytes, thread.writer(), thread.unfenced, leaks);
}
void store_shared(u32 address, float value) {
  ++emulator::statistics.shared_writes;
  write_shared("store_shared", self(), address, &value, sizeof value);
  scheduler().preempt();
}

void set_registers(const char* name, int registers, bool more) {
  emulator::Block& block = *self().block;
  const u32 warp = self().index / 32;
  together(name, [&](emulator::Warp&) { block.set_registers(scheduler(), name, warp, registers, more); });
  scheduler().until(block.for_registers, [&] { return block.wanted[warp] == 0; }, name);
}

void barrier_sync(u32 barrier, u32 threads) {
  emulator::Block& block = *self().block;
  together("barrier_sync", [&](emulator::Warp& warp) {
    ++emulator::statistics.named_barriers;
    if (barrier < 16) warp.note = block.named[barrier].generation;
    block.arrive_at_named(scheduler(), "barrier_sync", barrier, threads);
  });
  const emulator::NamedBarrier& named = block.named[barrier];
  const u64 generation = self().warp->note;
  scheduler().until(
      block.named[barrier].waiting, [&] { return named.generation != generation; }, "barrier_sync", barrier, threads);
}
void barrier_arrive(u32 barrier, u32 threads) {
  emulator::Block& block = *self().block;
  together("barrier_arrive", [&](emulator::Warp&) {
    ++emulator::statistics.named_barriers;
    block.arrive_at_named(scheduler(), "barrier_arrive", barrier, threads);
  });
}
void block_sync() {
  emulator::Block& block = *self().block;
  together("block_sync", [&](emulator::Warp& warp) {
    ++emulator::statistics.block_barriers;
    warp.note = block.named[0].generation;
    emulator::machine->block_barrier();
  });
  const u64 generation = self().warp->note;
  scheduler().until(block.named[0].waiting, [&] { return block.named[0].generation != generation; }, "block_sync");
}

void mbarrier_init(u32 barrier, u32 arrivals) {
  self().block->initialize(barrier, arrivals, &self());
  scheduler().preempt();
}
void mbarrier_init_fence() {
  for (auto& [address, barrier] : self().block->mbarriers) {
    if (barrier.initialized_by == &self()) barrier.fenced = true;
  }
  scheduler().preempt();
}
void mbarrier_expect(u32 barrier, u32 bytes) {
  ++emulator::statistics.mbarrier_arrivals;
  self().block->arrive(scheduler(), "mbarrier_expect", barrier, bytes, &self());
  scheduler().preempt();
}
void mbarrier_arrive(u32 barrier) {
  ++emulator::statistics.mbarrier_arrivals;
  self().block->arrive(scheduler(), "mbarrier_arrive", barrier, 0, &self());
  scheduler().preempt();
}
void mbarrier_wait(u32 barrier, u32 parity) {
  ++emulator::statistics.mbarrier_waits;
  if (parity > 1) emulator::fail("mbarrier_wait: parity %u", parity);
  scheduler().preempt();
  emulator::Mbarrier& waited = self().block->mbarrier("mbarrier_wait", barrier, &self());
  scheduler().until(waited.waiting, [&] { return (waited.phase & 1) != parity; }, "mbarrier_wait", barrier, parity);
}

void tma_load(u32 destination, const TensorMap& map, int column, int row, u32 barrier) {
  ++emulator::statistics.loads;
  emulator::Block& block = *self().block;
  const emulator::Matrix matrix = emulator::matrix_of(map);
  emulator::machine->tensor_cores.check_overwritten(&block, destination, matrix.box_bytes());
  emulator::machine->stores.check_write(&block, destination, matrix.box_bytes());
  emulator::statistics.load_bytes += matrix.box_bytes();
  emulator::machine->loads.issue(matrix, destination, column, row, barrier, block);
  scheduler().preempt();
}
static void store_from(const char* name, bool adds, const TensorMap& map, int column, int row, u32 source) {
  ++emulator::statistics.stores;
  emulator::machine->stores.issue(name, adds, emulator::matrix_of(map), column, row, source, self());
  scheduler().preempt();
}
void tma_store(const TensorMap& map, int column, int row, u32 source) {
  store_from("tma_store", false, map, column, row, source);
}
void tma_add(const TensorMap& map, int column, int row, u32 source) {
  store_from("tma_add", true, map, column, row, source);
}
void tma_store_commit() { ++self().store_groups; }
void store_wait_read(u32 left) {
  emulator::Thread& thread = self();
  const u64 groups = thread.store_groups - std::min<u64>(left, thread.store_groups);
  thread.stores_awaited = std::max(thread.stores_awaited, groups);
  scheduler().preempt();
  scheduler().until(
      thread.for_stores, [&] { return emulator::machine->stores.read(thread, groups); }, "tma_store_wait_read");
}
void fence_proxy_async() {
  ++emulator::statistics.proxy_fences;
  self().block->memory.fence(self().writer(), self().unfenced);
  scheduler().preempt();
}

void wgmma_fence() {
  ++self().product_fences;
  together("wgmma_fence", [](emulator::Warp&) {});
}
void wgmma_commit() {
  self().product_groups.push_back(self().products);
  together("wgmma_commit", [](emulator::Warp&) {});
}
void product_wait(u32 left) {
  together("wgmma_wait", [](emulator::Warp&) {});
  emulator::machine->tensor_cores.wait(self(), left);
}
void wgmma(float (&d)[64], u64 a, u64 b, bool add) {
  emulator::machine->tensor_cores.issue(self(), d, a, b, add);
  together("wgmma", [](emulator::Warp&) {});
}

static void store_matrices(const char* name, bool transposed, u32 address, const u32 (&registers)[4]) {
  struct Row {
    u32 address;
    u16 numbers[4][2];
  };
  static Row rows[32][32];  // what the lanes of every warp give
  const Row* of_warp = rows[self().warp->number];
  Row& own = rows[self().warp->number][self().lane];
  own.address = address;
  std::memcpy(own.numbers, registers, sizeof registers);
  together(name, [&](emulator::Warp& warp) {
    ++emulator::statistics.stored_matrices;
    for (u32 lane = 0; lane < 32; ++lane) {  // row lane % 8 of matrix lane / 8
      u16 row[8];
      for (u32 column = 0; column < 8; ++column) {
        const u32 i = transposed ? column : lane % 8, j = transposed ? lane % 8 : column;
        row[column] = of_warp[i * 4 + j / 2].numbers[lane / 8][j % 2];
      }
      auto& writer = static_cast<emulator::Thread&>(*warp.lanes[lane]);
      write_shared(name, writer, of_warp[lane].address, row, sizeof row);
    }
  });
}
void stmatrix(u32 address, u32 a, u32 b, u32 c, u32 d) { store_matrices("stmatrix", false, address, {a, b, c, d}); }
void stmatrix_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  store_matrices("stmatrix_transposed", true, address, {a, b, c, d});
}
u32 pack(float low, float high) {
  return emulator::to_operand(low) | static_cast<u32>(emulator::to_operand(high)) << 16;
}
float exp2(float x) {
  ++emulator::statistics.exponentials;
  const float y = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}

template <class Value, class Combine>
static Value of_lanes(const char* name, Value value, const Combine& combine) {
  static Value values[32][32];
  Value* of_warp = values[self().warp->number];
  of_warp[self().lane] = value;
  static Value results[32][32];
  Value* result = results[self().warp->number];
  together(name, [&](emulator::Warp&) { combine(of_warp, result); });
  return result[self().lane];
}
float shuffle_xor(float value, u32 lanes) {
  if (lanes > 31) emulator::fail("shuffle_xor: by %u", lanes);
  return of_lanes("shuffle_xor", value, [lanes](const float* from, float* to) {
    ++emulator::statistics.shuffles;
    for (u32 lane = 0; lane < 32; ++lane) to[lane] = from[lane ^ lanes];
  });
}
bool all_of_warp(bool value) {
  return of_lanes("all_of_warp", value, [](const bool* from, bool* to) {
    ++emulator::statistics.votes;
    const bool all = std::all_of(from, from + 32, [](bool each) { return each; });
    std::fill(to, to + 32, all);
  });
}

}  // namespace ptx
