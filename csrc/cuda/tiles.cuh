// How the kernels of this folder walk over the tiles of a block of logits: one main loop, which multiplies, and an
// epilogue of the kernel's own for every finished tile.
//
// A tile has kRows rows of x and kColumns columns, rows of y. A block stays for many tiles, in three warpgroups:
//
//   producer      one thread of it asks for boxes: the panel, all of kColumns rows of y, which stays in shared memory
//                 for all tiles beside it, and the stages, kDepth columns of rows of x, which stream
//   consumers     two, which take tiles in turns: while one multiplies, the other finishes its tile
//
//   consumer 0    | multiply tile 0 | epilogue 0 ....| multiply tile 2 | epilogue 2 ....
//   consumer 1                      | multiply tile 1 | epilogue 1 ....| multiply tile 3 | ...
//
// A tile's accumulator has two parts, each of 64 x 128. Usually these are its upper and its lower half, of 128 columns.
// With PAIR they are two products of the same 128 rows and 64 columns, transposed: the panel is then the first operand,
// and there are two panels and two matrices that stream. docs/cuda.md has pictures of a block's time and memory.
#ifndef SOFTCLIP_TILES
#define SOFTCLIP_TILES

#include "ptx.cuh"

using ptx::u16;
using ptx::u32;
using ptx::u64;

// Defined for each compilation: WIDTH, of the embeddings, a multiple of kDepth; STAGES; PAIR, 0 or 1; HALF for float16
// instead of bfloat16.
constexpr int kWidth = WIDTH;
constexpr int kStages = STAGES;

constexpr bool kPair = PAIR;
constexpr int kParts = 2;  // of an accumulator
constexpr int kPanels = kPair ? 2 : 1;

constexpr int kRows = 128;
constexpr int kColumns = kPair ? 64 : 128;
constexpr int kStageRows = kPair ? kRows : kRows / kParts;
constexpr int kDepth = 64;  // columns of a box: 128 bytes, the longest row that is swizzled
constexpr int kSteps = kWidth / kDepth;
constexpr int kInFlight = 1;     // stages whose products are on their way while the next ones are asked for
constexpr int kWarpgroup = 128;  // threads
constexpr int kThreads = 3 * kWarpgroup;
static_assert(kWidth % kDepth == 0 && kSteps >= 1, "WIDTH");

using Accumulator = float[kParts][64];  // each part in the layout of ptx::wgmma

// Shared memory, in bytes from its beginning. Boxes are swizzled by their address, hence multiples of 1024.
constexpr u32 kStageBytes = kStageRows * kDepth * 2;
constexpr u32 kPanelStep = kColumns * kDepth * 2;
constexpr u32 kPanel = 0;
constexpr u32 kStage = kPanel + kPanels * kSteps * kPanelStep;
constexpr u32 kEpilogue = kStage + kStages * kStageBytes;  // kEpilogueBytes for each consumer
template <u32 kEpilogueBytes>
struct Barriers {
  u32 base;
  DEVICE u32 full(int stage) const { return base + 8 * stage; }
  DEVICE u32 empty(int stage) const { return base + 8 * (kStages + stage); }
  DEVICE u32 panel_full() const { return base + 16 * kStages; }
  // One arrival of each consumer, or two of one whose next panel is one further: it has its turn after the other has
  // left the panel between.
  DEVICE u32 panel_empty() const { return base + 16 * kStages + 8; }
  static constexpr u32 kOffset = kEpilogue + 2 * kEpilogueBytes;
  static constexpr u32 kBytes = 16 * kStages + 16;
};

// Of a super-block of rows [row_start, row_end) and columns [column_start, column_end) of the problem.
struct Tile {
  int row, column;              // its corner, in the problem
  int local_row, local_column;  // in the super-block
};

// What a block multiplies: with PAIR the second of each is that of the second product.
struct Operands {
  const ptx::TensorMap* x[kPanels];  // streams
  const ptx::TensorMap* y[kPanels];  // stays
};

// This block's share of the tiles of a super-block: numbers [first, last), down one panel after the other.
struct Share {
  int row_start, row_end, column_start, column_end;
  int height;  // tiles of a panel
  int first, last;

  DEVICE Share(int row_start, int row_end, int column_start, int column_end)
      : row_start(row_start), row_end(row_end), column_start(column_start), column_end(column_end) {
    height = (row_end - row_start + kRows - 1) / kRows;
    const long long tiles = static_cast<long long>(height) * panels();
    first = static_cast<int>(tiles * ptx::block() / ptx::blocks());
    last = static_cast<int>(tiles * (ptx::block() + 1) / ptx::blocks());
  }
  DEVICE Tile tile(int number) const {
    const int panel = number / height;
    Tile tile;
    tile.local_row = (number - panel * height) * kRows;
    tile.local_column = panel * kColumns;
    tile.row = row_start + tile.local_row;
    tile.column = column_start + tile.local_column;
    return tile;
  }
  DEVICE int panels() const { return (column_end - column_start + kColumns - 1) / kColumns; }
  // How many panels the tile's lies behind the share's first.
  DEVICE int nth_panel(int number) const { return number / height - first / height; }
};

// A position in the ring of stages: of the n-th stage that is filled.
struct Position {
  int stage;
  u32 parity;
  DEVICE explicit Position(int n) : stage(n % kStages), parity(n / kStages & 1) {}
  DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <class Share, class Barriers>
DEVICE void produce(const Share& share, const Barriers& barriers, u32 memory, const Operands& operands) {
  Position position(0);
  for (int number = share.first; number < share.last; ++number) {
    const Tile tile = share.tile(number);
    if (number == share.first || share.nth_panel(number) > share.nth_panel(number - 1)) {
      // A panel takes the place of the one before, when both consumers have left that.
      ptx::mbarrier_wait(barriers.panel_empty(), (share.nth_panel(number) & 1) ^ 1);
      ptx::mbarrier_expect(barriers.panel_full(), kPanels * kSteps * kPanelStep);
      for (int n = 0; n < kPanels * kSteps; ++n) {
        ptx::tma_load(memory + kPanel + n * kPanelStep, *operands.y[n / kSteps], n % kSteps * kDepth, tile.column,
                      barriers.panel_full());
      }
    }
    for (int n = 0; n < kSteps * kParts; ++n) {
      const int column = n / kParts * kDepth, part = n % kParts;
      const int row = tile.row + (kPair ? 0 : part * kStageRows);
      const u32 full = barriers.full(position.stage);
      const u32 stage = memory + kStage + position.stage * kStageBytes;
      ptx::mbarrier_wait(barriers.empty(position.stage), position.parity ^ 1);
      ptx::mbarrier_expect(full, kStageBytes);
      ptx::tma_load(stage, *operands.x[kPair ? part : 0], column, row, full);
      position.advance();
    }
  }
}

// The products of a tile: d = x y^T, or with PAIR its transpose. Returns when all are there, and lets the other
// consumer begin as soon as all are on their way (`pass_on`).
template <class Barriers, class PassOn>
DEVICE void multiply(Accumulator& d, Position position, const Barriers& barriers, u32 memory, u32 thread,
                     const PassOn& pass_on) {
  Position read = position;  // the first stage that is not released yet
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ptx::mbarrier_wait(barriers.full(position.stage), position.parity);
      const u64 panel = ptx::matrix(memory + kPanel + ((kPair ? part : 0) * kSteps + step) * kPanelStep);
      const u64 stage = ptx::matrix(memory + kStage + position.stage * kStageBytes);
      const u64 a = kPair ? panel : stage, b = kPair ? stage : panel;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {  // 16 numbers of a row, in units of 16 bytes
        ptx::wgmma(d[part], a + k * 2, b + k * 2, step > 0 || k > 0);
      }
      ptx::wgmma_commit();
      position.advance();
      if (step * kParts + part >= kInFlight) {
        ptx::wgmma_wait<kInFlight>();
        if (thread == 0) ptx::mbarrier_arrive(barriers.empty(read.stage));
        read.advance();
      }
    }
  }
  pass_on();
  ptx::wgmma_wait<0>();
  for (int stage = 0; stage < kInFlight; ++stage) {
    if (thread == 0) ptx::mbarrier_arrive(barriers.empty(read.stage));
    read.advance();
  }
}

// Named barriers; 0 is the block's. Consumer c waits on kTurn + c for its turn, and alone on kOwn + c.
constexpr u32 kTurn = 1;
constexpr u32 kOwn = 3;

template <class Epilogue, class Share, class Barriers>
DEVICE void consume(const Share& share, const Barriers& barriers, u32 memory, u32 consumer, Epilogue& epilogue) {
  const u32 thread = ptx::thread() % kWarpgroup;
  const auto nth_panel = [&](int number) { return share.nth_panel(number < share.last ? number : share.last - 1); };
  int left_panels = 0;  // that this consumer does not read any more
  const auto leave_panels = [&](int until) {
    for (; left_panels < until; ++left_panels) {
      if (thread == 0) ptx::mbarrier_arrive(barriers.panel_empty());
    }
  };

  Accumulator d;
  const int rounds = (share.last - share.first + 1) / 2;
  if (rounds > 0) {
    if (consumer == 1) ptx::barrier_arrive(kTurn, 2 * kWarpgroup);
    leave_panels(nth_panel(share.first + consumer));
  }
  for (int round = 0; round < rounds; ++round) {
    const int number = share.first + 2 * round + consumer;
    const auto pass_on = [&] {
      if (consumer == 0 || round + 1 < rounds) ptx::barrier_arrive(kTurn + 1 - consumer, 2 * kWarpgroup);
    };
    ptx::barrier_sync(kTurn + consumer, 2 * kWarpgroup);
    if (number >= share.last) {
      pass_on();
      continue;
    }
    const Tile tile = share.tile(number);
    const int panel = share.nth_panel(number), next_panel = nth_panel(number + 2);
    // A panel that this consumer has skipped was waited for by the other, whose turn came before.
    ptx::mbarrier_wait(barriers.panel_full(), panel & 1);
    epilogue.prepare(tile);
    multiply(d, Position((number - share.first) * kSteps * kParts), barriers, memory, thread, pass_on);
    leave_panels(next_panel);
    epilogue.finish(d, tile, next_panel > panel || number + 2 >= share.last);
  }
  epilogue.end();
}

// A whole kernel. An Epilogue is made of (share, the consumer's memory, its number, arguments) and has
//   kBytes                          of shared memory for each consumer
//   prepare(tile)                   before the products: asks for what finish() needs, so that it arrives meanwhile
//   finish(d, tile, last_of_panel)  the finished products; whether the consumer has no other tile of this panel
//   end()                           after the last tile
template <class Epilogue, class Share, class... Arguments>
DEVICE void run(const Operands& operands, const Share& share, const Arguments&... arguments) {
  using OwnBarriers = Barriers<Epilogue::kBytes>;
  const u32 memory = ptx::shared_memory();
  const OwnBarriers barriers{memory + OwnBarriers::kOffset};
  if (ptx::thread() == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(barriers.full(stage), 1);
      ptx::mbarrier_init(barriers.empty(stage), 1);
    }
    ptx::mbarrier_init(barriers.panel_full(), 1);
    ptx::mbarrier_init(barriers.panel_empty(), 2);
    ptx::mbarrier_init_fence();
  }
  ptx::block_sync();

  const u32 warpgroup = ptx::thread() / kWarpgroup;
  if (warpgroup == 0) {
    ptx::give_registers<24>();
    if (ptx::thread() == 0) produce(share, barriers, memory, operands);
  } else {
    ptx::take_registers<240>();
    const u32 consumer = warpgroup - 1;
    Epilogue epilogue(share, memory + kEpilogue + consumer * Epilogue::kBytes, consumer, arguments...);
    consume(share, barriers, memory, consumer, epilogue);
  }
}

// Where a thread of a consumer stands in the layout of ptx::wgmma.
struct Lane {
  u32 thread, warp, row, column;
  DEVICE Lane()
      : thread(ptx::thread() % kWarpgroup),
        warp(thread / 32),
        row(16 * warp + thread % 32 / 4),
        column(2 * (thread % 4)) {}
};
// Without PAIR:
constexpr int kThreadRows = 2 * kParts;           // of a tile that a thread has entries of
constexpr int kThreadColumns = kColumns / 8 * 2;  // likewise
// The i-th of its rows within the tile, less lane.row; the j-th of its columns, less lane.column; and their entry.
DEVICE constexpr int row_offset(int i) { return i / 2 * 64 + i % 2 * 8; }
DEVICE constexpr int column_offset(int j) { return j / 2 * 8 + j % 2; }
DEVICE float& entry(Accumulator& d, int i, int j) { return d[i / 2][j / 2 * 4 + i % 2 * 2 + j % 2]; }

// The positives of a thread's rows: asked for before the products, looked at after them.
struct Positives {
  int column[kThreadRows];

  // Of a (N,) of int64, the lower halves, which say all: positions are below 2^31 in size, and negative where there is
  // none.
  DEVICE void load(const long long* positive_column, const Share& share, const Tile& tile, const Lane& lane) {
    const int* halves = reinterpret_cast<const int*>(positive_column);
    const int last = share.row_end - 1;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int row = tile.row + static_cast<int>(lane.row) + row_offset(i);
      column[i] = halves ? halves[2ll * (row < last ? row : last)] : -1;
    }
  }
  // Within the tile, less lane.column; negative where there is none.
  DEVICE int place(int i, const Share& share, const Tile& tile, const Lane& lane) const {
    const bool row_inside = tile.row + static_cast<int>(lane.row) + row_offset(i) < share.row_end;
    const bool inside = row_inside && column[i] >= tile.column && column[i] < share.column_end;
    const int within = column[i] - tile.column;
    return inside && within < kColumns ? within - static_cast<int>(lane.column) : -kColumns;
  }
};

#endif
