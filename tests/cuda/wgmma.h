// Tensor cores: a warpgroup's products m64n128k16, in order, at any moment between their issue and the wait for them.
#pragma once

#include <deque>
#include <vector>

#include "copies.h"

namespace emulator {

constexpr u32 kRows = 64, kColumns = 128, kDepth = 16;

struct Product {
  u64 a, b;
  bool add;
  u32 slot;
  u32 threads;  // that have issued it
};

struct Slot {
  float value[kRows][kColumns];
  u32 holders = 0;  // threads whose registers it is in place of
};

struct Pipe {
  Block* block = nullptr;
  std::deque<Product> products;  // issued by one thread at least
  u64 executed = 0;
  std::deque<Slot> slots;
  struct Sleeper {
    Thread* thread;
    u64 products;
  };
  std::vector<Sleeper> waiting;  // until so many are executed

  bool ready() const { return !products.empty() && products.front().threads == 128; }
  u32 free_slot() {
    for (u32 i = 0; i < slots.size(); ++i) {
      if (slots[i].holders == 0) return i;
    }
    slots.emplace_back();
    return static_cast<u32>(slots.size() - 1);
  }
};

// Where register i of a thread of the warpgroup lies in the result.
inline u32 fragment_row(u32 thread, u32 i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
inline u32 fragment_column(u32 thread, u32 i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// An operand of `rows` rows, 32 bytes of each.
struct Operand {
  u32 start, group_bytes;

  Operand(const char* name, u64 descriptor, const SharedMemory& memory, u32 rows)
      : start((descriptor & 0x3FFF) << 4), group_bytes((descriptor >> 32 & 0x3FFF) << 4) {
    if (descriptor >> 62 != 1)
      fail("wgmma: swizzle %u of %s; only that of 128 bytes (1) is emulated", static_cast<u32>(descriptor >> 62), name);
    if ((descriptor >> 49 & 7) != 0) fail("wgmma: a base offset of %s", name);
    if (start % 1024 >= 128) fail("wgmma: %s begins at +%u, within a group of 8 rows", name, start - kSharedBase);
    if (group_bytes != 1024) fail("wgmma: groups of 8 rows of %s are %u bytes apart", name, group_bytes);
    memory.check("wgmma", begin(), rows * 128, 1024);
  }
  u32 begin() const { return start / 1024 * 1024; }
  u16 at(const SharedMemory& memory, u32 row, u32 column) const {
    const u32 address = swizzled(start + row / 8 * group_bytes + row % 8 * 128 + column * 2);
    u16 value;
    std::memcpy(&value, memory.async(address), 2);
    return value;
  }
};

inline const float* operand_values() {
  static std::vector<float> values;
  if (values.empty()) {
    for (u32 i = 0; i < 65536; ++i) values.push_back(from_operand(static_cast<u16>(i)));
  }
  return values.data();
}

#if defined(__x86_64__)
__attribute__((target_clones("arch=haswell", "default")))
#endif
inline void multiply(const float (*a)[kDepth], const float (*b)[kColumns], float (*d)[kColumns], bool add) {
  typedef float Vector __attribute__((vector_size(32), aligned(4)));
  constexpr u32 kVectors = 8;
  for (u32 row = 0; row < kRows; ++row) {
    for (u32 column = 0; column < kColumns; column += kVectors * 8) {
      Vector sum[kVectors] = {};
      for (u32 k = 0; k < kDepth; ++k) {
        const Vector* of_b = reinterpret_cast<const Vector*>(&b[k][column]);
        for (u32 i = 0; i < kVectors; ++i) sum[i] += a[row][k] * of_b[i];
      }
      Vector* of_d = reinterpret_cast<Vector*>(&d[row][column]);
      for (u32 i = 0; i < kVectors; ++i) of_d[i] = add ? of_d[i] + sum[i] : sum[i];
    }
  }
}

class TensorCores : public Source {
 public:
  explicit TensorCores(Scheduler& scheduler) : scheduler_(scheduler) {}
  std::vector<Pipe*> pipes;

  static Pipe& pipe(const Thread& thread) {
    if (thread.index / 128 * 128 + 128 > thread.block->threads) fail("wgmma: no whole warpgroup");
    return *thread.block->pipes[thread.index / 128];
  }

  // The thread's registers are in flight from here on: they hold NaN until the wait for the product.
  void issue(Thread& thread, float* d, u64 a, u64 b, bool add) {
    Pipe& pipe = TensorCores::pipe(thread);
    const u64 number = thread.products++;
    Accumulator& accumulator = accumulator_of(thread, d);
    if (number == pipe.executed + pipe.products.size()) {
      Operand("a", a, thread.block->memory, kRows), Operand("b", b, thread.block->memory, kColumns);
      pipe.products.push_back({a, b, add, accumulator.in_flight ? accumulator.slot : pipe.free_slot(), 0});
      if (!accumulator.in_flight) ++pipe.slots[pipe.products.back().slot].holders;  // until all have issued it
    }
    Product& product = pipe.products[number - pipe.executed];
    if (product.a != a || product.b != b || product.add != add) fail("wgmma: threads of a warpgroup disagree");
    const u32 own = thread.index % 128;
    if (!accumulator.in_flight) {
      if (thread.product_fences == accumulator.fences) fail("wgmma: registers were used, and no wgmma_fence since");
      accumulator.in_flight = true;
      accumulator.slot = product.slot;
      Slot& slot = pipe.slots[product.slot];
      if (product.threads > 0) ++slot.holders;
      if (add) {
        for (u32 i = 0; i < 64; ++i) slot.value[fragment_row(own, i)][fragment_column(own, i)] = d[i];
      }
      std::memset(d, 0xFF, 64 * sizeof *d);
    } else {
      check_untouched(d);
    }
    if (product.slot != accumulator.slot) fail("wgmma: threads of a warpgroup name different accumulators");
    accumulator.last = number;
    ++product.threads;
  }

  void wait(Thread& thread, u64 groups_left) {
    Pipe& pipe = TensorCores::pipe(thread);
    const u64 groups = thread.product_groups.size();
    if (groups <= groups_left) return;
    const u64 needed = thread.product_groups[groups - 1 - groups_left];
    while (pipe.executed < needed) {
      pipe.waiting.push_back({&thread, needed});
      scheduler_.sleep("wgmma_wait");
    }
    const u32 own = thread.index % 128;
    for (Accumulator& accumulator : thread.accumulators) {
      if (!accumulator.in_flight || accumulator.last >= needed) continue;
      float* d = const_cast<float*>(accumulator.registers);
      check_untouched(d);
      Slot& slot = pipe.slots[accumulator.slot];
      for (u32 i = 0; i < 64; ++i) d[i] = slot.value[fragment_row(own, i)][fragment_column(own, i)];
      --slot.holders;
      accumulator.in_flight = false;
      accumulator.fences = thread.product_fences;
    }
  }

  // Whether bytes of shared memory are still to be read.
  void check_overwritten(const Block* block, u32 address, u32 bytes) const {
    for (u32 group = 0; group < block->pipes.size(); ++group) {
      for (const Product& product : block->pipes[group]->products) {
        const Operand a("a", product.a, block->memory, kRows), b("b", product.b, block->memory, kColumns);
        if (overlap(address, bytes, a.begin(), kRows * 128) || overlap(address, bytes, b.begin(), kColumns * 128)) {
          fail("+%u of block %u is overwritten, and a wgmma of warpgroup %u still has to read it",
               address - kSharedBase, block->index, group);
        }
      }
    }
  }

  bool pending() const override {
    for (const Pipe* pipe : pipes) {
      if (pipe->ready()) return true;
    }
    return false;
  }
  void advance(Random& random, bool) override {
    const u32 first = random.below(static_cast<u32>(pipes.size()));
    for (u32 i = 0; i < pipes.size(); ++i) {
      Pipe& pipe = *pipes[(first + i) % pipes.size()];
      if (pipe.ready()) return execute(pipe);
    }
  }

 private:
  static Accumulator& accumulator_of(Thread& thread, float* d) {
    for (Accumulator& known : thread.accumulators) {
      if (known.registers == d) return known;
    }
    Accumulator fresh;
    fresh.registers = d;
    thread.accumulators.push_back(fresh);
    return thread.accumulators.back();
  }

  static void check_untouched(const float* d) {
    static const u64 poison[32] = {~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull,
                                   ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull,
                                   ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull, ~0ull};
    if (std::memcmp(d, poison, sizeof poison) != 0) fail("wgmma: registers were written while they were in flight");
  }

  void execute(Pipe& pipe) {
    const Product product = pipe.products.front();
    const SharedMemory& memory = pipe.block->memory;
    const Operand a("a", product.a, memory, kRows), b("b", product.b, memory, kColumns);
    const float* value = operand_values();
    static float of_a[kRows][kDepth], of_b[kDepth][kColumns];
    for (u32 k = 0; k < kDepth; ++k) {
      for (u32 row = 0; row < kRows; ++row) of_a[row][k] = value[a.at(memory, row, k)];
      for (u32 column = 0; column < kColumns; ++column) of_b[k][column] = value[b.at(memory, column, k)];
    }
    multiply(of_a, of_b, pipe.slots[product.slot].value, product.add);
    pipe.products.pop_front();
    ++pipe.executed;
    ++statistics.products;
    for (std::size_t i = 0; i < pipe.waiting.size();) {
      if (pipe.waiting[i].products > pipe.executed) {
        ++i;
        continue;
      }
      scheduler_.wake(*pipe.waiting[i].thread);
      pipe.waiting[i] = pipe.waiting.back();
      pipe.waiting.pop_back();
    }
  }

  Scheduler& scheduler_;
};

}  // namespace emulator
