// A block: its shared memory, its mbarriers, its named barriers and its registers.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "memory.h"

namespace emulator {

struct Thread;
struct Pipe;

struct Mbarrier {
  u32 arrivals, left;  // of a phase; until it is complete
  i64 bytes = 0;       // expected and not there yet
  u64 phase = 0;
  const Fibre* initialized_by = nullptr;
  bool fenced = false;
  Waiting waiting;
};

struct NamedBarrier {
  u32 threads = 0, arrived = 0;
  u64 generation = 0;
  Waiting waiting;
};

struct Block {
  Block(u32 index, u32 threads, u32 shared_bytes)
      : index(index), threads(threads), live(threads), live_warps(threads / 32), memory(shared_bytes) {
    const u32 each = std::min(65536 / threads / 8 * 8, 248u);
    registers.assign(threads / 32, each);
    requests.resize((threads + 127) / 128);
    requested.assign(threads / 32, 0);
  }

  const u32 index, threads;
  u32 live, live_warps;
  SharedMemory memory;
  std::map<u32, Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<u32> registers;  // of a thread of every warp
  std::vector<u32> wanted = std::vector<u32>(32, 0);
  u32 free_registers = 0;
  Waiting for_registers;
  std::vector<std::vector<int>> requests;  // of every warpgroup; how many of them each warp has made
  std::vector<u32> requested;
  std::vector<Pipe*> pipes;  // of every warpgroup

  // For a thread, or for the copy engine if there is none.
  Mbarrier& mbarrier(const char* what, u32 address, const Fibre* user) {
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end()) {
      fail("%s: no barrier was initialized at +%d of block %u", what, static_cast<int>(address - kSharedBase), index);
    }
    if (!found->second.fenced && user != found->second.initialized_by) {
      fail("%s: the barrier at +%u of block %u was initialized without mbarrier_init_fence", what,
           address - kSharedBase, index);
    }
    return found->second;
  }

  void initialize(u32 address, u32 arrivals, const Fibre* thread) {
    if (arrivals == 0 || arrivals >= 1 << 20) fail("mbarrier_init: %u arrivals", arrivals);
    if (mbarriers.count(address) != 0) fail("mbarrier_init: +%u was initialized before", address - kSharedBase);
    memory.reserve_for_barrier(address);
    Mbarrier& barrier = mbarriers[address];
    barrier.arrivals = barrier.left = arrivals;
    barrier.initialized_by = thread;
  }

  void arrive(Scheduler& scheduler, const char* what, u32 address, u32 bytes, const Fibre* user) {
    Mbarrier& barrier = mbarrier(what, address, user);
    if (barrier.left == 0) fail("%s: one arrival too many at +%u of block %u", what, address - kSharedBase, index);
    count(what, address, barrier, bytes);
    --barrier.left;
    settle(scheduler, barrier);
  }

  // Bytes of a load that was issued in this phase are there.
  void complete(Scheduler& scheduler, u32 address, u32 bytes, u64 phase) {
    Mbarrier& barrier = mbarrier("tma_load", address, nullptr);
    if (barrier.phase != phase) {
      fail(
          "tma_load: the phase of the barrier at +%u of block %u is complete, and bytes of it were still to come: "
          "too few were expected",
          address - kSharedBase, index);
    }
    count("tma_load", address, barrier, -static_cast<i64>(bytes));
    settle(scheduler, barrier);
  }

  // A warp's arrival.
  void arrive_at_named(Scheduler& scheduler, const char* what, u32 barrier, u32 expected) {
    if (barrier >= 16) fail("%s: barrier %u of 16", what, barrier);
    if (expected == 0 || expected % 32 != 0 || expected > threads) {
      fail("%s: barrier %u for %u threads of %u", what, barrier, expected, threads);
    }
    NamedBarrier& named_barrier = named[barrier];
    if (named_barrier.arrived > 0 && named_barrier.threads != expected) {
      fail("%s: barrier %u for %u threads, and others said %u", what, barrier, expected, named_barrier.threads);
    }
    named_barrier.threads = expected;
    named_barrier.arrived += 32;
    settle(scheduler, named_barrier);
  }
  static void settle(Scheduler& scheduler, NamedBarrier& barrier) {
    if (barrier.arrived == 0 || barrier.arrived < barrier.threads) return;
    barrier.arrived = 0;
    ++barrier.generation;
    scheduler.wake(barrier.waiting);
  }

  // A warp asks for so many registers a thread, or returns some.
  void set_registers(Scheduler& scheduler, const char* what, u32 warp, int count, bool more) {
    if (count < 24 || count > 256 || count % 8 != 0) fail("%s: %d registers", what, count);
    std::vector<int>& asked = requests[warp / 4];
    const u32 request = requested[warp]++;
    if (request == asked.size()) asked.push_back(more ? count : -count);
    if (asked[request] != (more ? count : -count)) fail("%s: the warps of a warpgroup disagree", what);
    const u32 target = static_cast<u32>(count), own = registers[warp];
    if (more ? target < own : target > own) fail("%s: %u registers, and each thread has %u", what, target, own);
    if (more) {
      wanted[warp] = target;
    } else {
      free_registers += (own - target) * 32;
      registers[warp] = target;
    }
    for (u32 i = 0; i < registers.size(); ++i) {
      if (wanted[i] == 0 || (wanted[i] - registers[i]) * 32 > free_registers) continue;
      free_registers -= (wanted[i] - registers[i]) * 32;
      registers[i] = wanted[i];
      wanted[i] = 0;
    }
    u32 all = 0;
    for (u32 each : registers) all += each * 32;
    if (all > 65536) fail("%s: %u registers in all", what, all);
    scheduler.wake(for_registers);
  }

  void check_end() const {
    for (u32 i = 0; i < 16; ++i) {
      if (named[i].arrived != 0) {
        fail("block %u ends with %u of %u threads at named barrier %u", index, named[i].arrived, named[i].threads, i);
      }
    }
    for (const auto& [address, barrier] : mbarriers) {
      if (barrier.bytes != 0) {
        fail("block %u ends while the barrier at +%u expects %lld bytes", index, address - kSharedBase, barrier.bytes);
      }
    }
    for (u32 i = 0; i < requested.size(); ++i) {
      if (requested[i] != requests[i / 4].size())
        fail("block %u: not every warp of warpgroup %u has set its registers", index, i / 4);
    }
  }

 private:
  static void count(const char* what, u32 address, Mbarrier& barrier, i64 bytes) {
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20 || barrier.bytes <= -(1 << 20)) {
      fail("%s: the barrier at +%u expects %lld bytes, which it cannot count", what, address - kSharedBase,
           barrier.bytes);
    }
  }
  static void settle(Scheduler& scheduler, Mbarrier& barrier) {
    if (barrier.left != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.left = barrier.arrivals;
    scheduler.wake(barrier.waiting);
  }
};

}  // namespace emulator
