// The copy engine: boxes of matrices to and from shared memory.
#pragma once

#include <algorithm>
#include <vector>

#include "thread.h"

namespace emulator {

// What a tensor map says. It lies in the map's 128 bytes.
struct Matrix {
  u64 magic;
  u8* base;
  u64 columns, rows, row_bytes;
  u32 box_columns, box_rows, element, swizzle;  // bytes of a number; whether 128-byte swizzle
  u32 box_row_bytes() const { return box_columns * element; }
  u32 box_bytes() const { return box_row_bytes() * box_rows; }
};
constexpr u64 kMagic = 0x50414D524F534E45;

// Rows of a box move together, so many.
constexpr u32 kRowsAtOnce = 8;

struct Piece {
  u32 first_row, rows;
};

struct Load {
  Matrix matrix;
  Block* block;
  u32 destination, barrier;
  u64 phase;  // of the barrier, on which it counts
  int column, row;
  std::vector<Piece> left;
  bool stalls;
};

struct Store {
  Matrix matrix;
  bool adds;  // to what is there, in the embeddings' dtype
  u32 source;
  int column, row;
  Thread* issuer;
  u64 group;
  std::vector<Piece> left;
  bool stalls;
};

inline bool overlap(u32 a, u32 a_bytes, u32 b, u32 b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

inline std::vector<Piece> pieces(Random& random, const Matrix& matrix) {
  std::vector<Piece> all;
  for (u32 row = 0; row < matrix.box_rows; row += kRowsAtOnce) {
    all.push_back({row, std::min(kRowsAtOnce, matrix.box_rows - row)});
  }
  for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[random.below(static_cast<u32>(i))]);
  return all;
}

inline u32 place(const Matrix& matrix, u32 box, u32 row, u32 byte) {
  const u32 address = box + row * matrix.box_row_bytes() + byte;
  return matrix.swizzle ? swizzled(address) : address;
}

// How many of `count` pieces happen at once.
inline u32 some(Random& random, std::size_t count) {
  return random.chance(0.5) ? static_cast<u32>(count) : 1 + random.below(static_cast<u32>(count));
}

class Loads : public Source {
 public:
  explicit Loads(Scheduler& scheduler) : scheduler_(scheduler) {}
  Pending<Load> under_way;

  void issue(const Matrix& matrix, u32 destination, int column, int row, u32 barrier, Block& block) {
    const char* name = "tma_load";
    if (matrix.magic != kMagic) fail("%s: no tensor map", name);
    block.memory.check(name, destination, matrix.box_bytes(), matrix.swizzle ? 1024 : 128);
    for (const Load& other : under_way.all()) {
      if (overlap(destination, matrix.box_bytes(), other.destination, other.matrix.box_bytes())) {
        fail("%s: +%u of block %u, where another load is under way", name, destination - kSharedBase, block.index);
      }
    }
    block.memory.poison(name, destination, matrix.box_bytes());
    const u64 phase = block.mbarrier(name, barrier, nullptr).phase;
    under_way.add({matrix, &block, destination, barrier, phase, column, row, pieces(scheduler_.random, matrix),
                   scheduler_.random.chance(scheduler_.policy.stalls)});
  }

  bool pending() const override { return !under_way.empty(); }
  void advance(Random& random, bool forced) override {
    Load* load = under_way.choose(random, forced);
    if (load == nullptr) return;
    for (u32 count = some(random, load->left.size()); count > 0; --count) {
      const Piece piece = load->left.back();
      load->left.pop_back();
      for (u32 row = piece.first_row; row < piece.first_row + piece.rows; ++row) {
        land(*load, load->block->memory, row);
      }
      load->block->complete(scheduler_, load->barrier, piece.rows * load->matrix.box_row_bytes(), load->phase);
    }
    if (load->left.empty()) under_way.remove(load);
  }

 private:
  static void land(const Load& load, SharedMemory& memory, u32 box_row) {
    const Matrix& m = load.matrix;
    alignas(16) u8 bytes[1024] = {};
    const i64 row = static_cast<i64>(load.row) + box_row, first = load.column;
    if (row >= 0 && row < static_cast<i64>(m.rows)) {
      const i64 begin = std::max<i64>(first, 0);
      const i64 end = std::min<i64>(first + m.box_columns, static_cast<i64>(m.columns));
      if (begin < end) {
        std::memcpy(bytes + (begin - first) * m.element, m.base + row * m.row_bytes + begin * m.element,
                    static_cast<std::size_t>(end - begin) * m.element);
      }
    }
    for (u32 byte = 0; byte < m.box_row_bytes(); byte += 16) {
      memory.async_write(place(m, load.destination, box_row, byte), bytes + byte);
    }
  }

  Scheduler& scheduler_;
};

class Stores : public Source {
 public:
  explicit Stores(Scheduler& scheduler) : scheduler_(scheduler) {}
  Pending<Store> under_way;

  void issue(const char* name, bool adds, const Matrix& matrix, int column, int row, u32 source, Thread& issuer) {
    if (matrix.magic != kMagic) fail("%s: no tensor map", name);
    issuer.block->memory.check(name, source, matrix.box_bytes(), matrix.swizzle ? 1024 : 128);
    issuer.stores_needed = issuer.store_groups + 1;
    under_way.add({matrix, adds, source, column, row, &issuer, issuer.store_groups, pieces(scheduler_.random, matrix),
                   scheduler_.random.chance(scheduler_.policy.stalls)});
  }
  // Whether the first so many groups of a thread have left shared memory.
  bool read(const Thread& thread, u64 groups) const {
    for (const Store& store : under_way.all()) {
      if (store.issuer == &thread && store.group < groups) return false;
    }
    return true;
  }
  void check_write(const Block* block, u32 address, u32 bytes) const {
    for (const Store& store : under_way.all()) {
      if (store.issuer->block == block && overlap(address, bytes, store.source, store.matrix.box_bytes())) {
        fail("writes +%u of shared memory, which a store under way still has to read", address - kSharedBase);
      }
    }
  }

  bool pending() const override { return !under_way.empty(); }
  void advance(Random& random, bool forced) override {
    Store* store = under_way.choose(random, forced);
    if (store == nullptr) return;
    for (u32 count = some(random, store->left.size()); count > 0; --count) {
      const Piece piece = store->left.back();
      store->left.pop_back();
      for (u32 row = piece.first_row; row < piece.first_row + piece.rows; ++row) leave(*store, row);
    }
    if (!store->left.empty()) return;
    Thread* issuer = store->issuer;
    under_way.remove(store);
    scheduler_.wake(issuer->for_stores);
  }

 private:
  static void leave(const Store& store, u32 box_row) {
    const Matrix& m = store.matrix;
    const i64 row = static_cast<i64>(store.row) + box_row;
    if (row < 0 || row >= static_cast<i64>(m.rows)) return;
    for (u32 byte = 0; byte < m.box_row_bytes(); byte += 16) {
      const u8* from = store.issuer->block->memory.async(place(m, store.source, box_row, byte));
      for (u32 i = 0; i < 16; i += m.element) {
        const i64 column = store.column + static_cast<i64>((byte + i) / m.element);
        if (column < 0 || column >= static_cast<i64>(m.columns)) continue;
        u8* to = m.base + row * m.row_bytes + column * m.element;
        if (!store.adds) {
          std::memcpy(to, from + i, m.element);
          continue;
        }
        u16 own, other;
        std::memcpy(&own, to, 2);
        std::memcpy(&other, from + i, 2);
        own = to_operand(from_operand(own) + from_operand(other));
        std::memcpy(to, &own, 2);
      }
    }
  }

  Scheduler& scheduler_;
};

}  // namespace emulator
