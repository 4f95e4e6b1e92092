// A thread of the kernel, and what it must know of its asynchronous operations.
#pragma once

#include <vector>

#include "barriers.h"
#include "statistics.h"

namespace emulator {

struct Accumulator {
  const float* registers;  // 64, the thread's own
  u32 slot = 0;            // where its value is while it is in flight
  u64 last = 0;            // product that it takes part in
  bool in_flight = false;
  u64 fences = 0;  // of the thread when it was returned
};

struct Thread : Fibre {
  u32 index = 0;  // in the block
  Block* block = nullptr;
  u16 writer() const { return static_cast<u16>(index + 1); }

  std::vector<u32> unfenced;  // words of shared memory

  u64 products = 0, product_fences = 0;  // issued
  std::vector<u64> product_groups;       // how many products had been issued at each commit
  std::vector<Accumulator> accumulators;

  u64 store_groups = 0, stores_awaited = 0, stores_needed = 0;  // groups: committed, waited for, holding a store
  Waiting for_stores;
};

}  // namespace emulator
