// The forward pass of a student with one teacher, whose logits are a product of their own: sums of both softmaxes'
// exponentials over the rows and the columns of every tile, and of the teacher's times the student's products, into the
// slots that softclip_kernels/backends/triton/softmax_forward.py has for them; the logits of the positives.
//
// With MIRROR the teacher's logits are those of the mirror (J, I), tied: e1 of the tile and e2 of its mirror serve as
// student's and teacher's exponentials of both, whose sums are
//
//                  student    teacher    teacher times product
//   the tile's     sum e1     sum e2     sum e2 z1
//   the mirror's   sum e2     sum e1     sum e1 z2
//
// Here a thread of ptx::wgmma's layout has two columns of a tile, and 32 of its rows: tiles are multiplied transposed.
#include "tiles.cuh"

// Defined for each compilation, as Triton's kernels have them: places of `scalars`, and how far the reference of the
// exponentials lies below the largest logit. MIRROR: 0 or 1.
constexpr int kScale = SCALE, kFactor = FACTOR, kBound = BOUND, kTeacherFactor = TEACHER_FACTOR;
constexpr int kTeacherBound = TEACHER_BOUND;
constexpr float kHeadroom = HEADROOM;
constexpr bool kMirror = MIRROR;
constexpr int kStatistics = 3;          // of a slot
constexpr int kSums = kMirror ? 4 : 3;  // of a tile: e1, e2, e2 z1, e1 z2
constexpr int kLaneColumns = 2;         // of a thread
// Of a mirror's statistics, which of the sums each is.
DEVICE constexpr int mirrored(int statistic) { return statistic < 2 ? 1 - statistic : kSums - 1; }

struct Output {
  const long long* positive_column;  // (N,), or null
  const float* scalars;
  float* row_sums;            // (tile columns, kStatistics, edge)
  float* column_sums;         // (tile rows, kStatistics, edge)
  float* mirror_row_sums;     // (tile rows, kStatistics, edge)
  float* mirror_column_sums;  // (tile columns, kStatistics, edge)
  float* positive_logit;      // (N,)
  int edge;
};

// A share of a super-block on the diagonal of a mirrored problem, whose tiles are the squares of kRows on it and those
// above. Down a panel the last come first, the square on the diagonal that is: its mirror, which is itself, has no
// sums, so that a panel's last slot is one that is read.
struct MirrorShare : Share {
  bool diagonal;

  // Tiles before the n-th panel: panels 2m and 2m + 1 have m + 1 each.
  DEVICE static int before(int panel) { return panel / 2 * (panel / 2 + 1) + panel % 2 * (panel / 2 + 1); }

  DEVICE MirrorShare(int row_start, int row_end, int column_start, int column_end)
      : Share(row_start, row_end, column_start, column_end), diagonal(kMirror && row_start == column_start) {
    if (diagonal) {
      const long long tiles = before(panels());
      first = static_cast<int>(tiles * ptx::block() / ptx::blocks());
      last = static_cast<int>(tiles * (ptx::block() + 1) / ptx::blocks());
    }
  }
  DEVICE int panel(int number) const {
    if (!diagonal) return number / height;
    int panel = 2 * static_cast<int>((sqrtf(4.0f * number + 1.0f) - 1.0f) * 0.5f);
    while (before(panel) > number) --panel;  // where the root was rounded
    while (before(panel + 1) <= number) ++panel;
    return panel;
  }
  DEVICE int nth_panel(int number) const { return panel(number) - panel(first); }
  DEVICE Tile tile(int number) const {
    const int of = panel(number);
    const int row = diagonal ? of / 2 - (number - before(of)) : number - of * height;
    return {row_start + row * kRows, column_start + of * kColumns, row * kRows, of * kColumns};
  }
  // Whether the tile is in a square that is its own mirror.
  DEVICE bool own_mirror(const Tile& tile) const {
    return diagonal && tile.local_column / kRows * kRows == tile.local_row;
  }
};

struct PairSums {
  static constexpr u32 kWarpSums = kSums * kRows * 4;  // of a warp: the sums of the tile's rows over its columns
  static constexpr u32 kPlaces = 4 * kWarpSums;        // the rows' positives, then whether a warp has found any
  static constexpr u32 kBytes = kPlaces + kRows * 4 + 16;

  const MirrorShare& share;
  const Output& out;
  const u32 memory, consumer;
  const Lane lane;
  float factor, reference, teacher_factor, teacher_reference;
  float column[kSums][kLaneColumns] = {};   // sums over the rows of this consumer's tiles of the panel
  float on_diagonal[2][kLaneColumns] = {};  // of e1 and e2, of the tile that has no mirror
  int positive;                             // of the row that is this thread's by number
  int mirror_positive[kLaneColumns];        // of the thread's columns, as rows

  DEVICE PairSums(const MirrorShare& share, u32 memory, u32 consumer, const Output& out)
      : share(share),
        out(out),
        memory(memory),
        consumer(consumer),
        factor(out.scalars[kFactor]),
        reference(fmaxf(out.scalars[kBound] - kHeadroom, 0.0f)),
        teacher_factor(out.scalars[kMirror ? kFactor : kTeacherFactor]),
        teacher_reference(fmaxf(out.scalars[kMirror ? kBound : kTeacherBound] - kHeadroom, 0.0f)) {}

  // The r-th of the thread's columns within the tile.
  DEVICE int column_of(int r) const { return lane.row + 8 * r; }

  DEVICE void prepare(const Tile& tile) {
    const int* halves = reinterpret_cast<const int*>(out.positive_column);  // as Positives takes them
    const int row = tile.row + lane.thread;
    positive = halves && row < share.row_end ? halves[2ll * row] : -1;
    if (kMirror) {
#pragma unroll
      for (int r = 0; r < kLaneColumns; ++r) {
        const int own = tile.column + column_of(r);
        mirror_positive[r] = halves && own < share.column_end ? halves[2ll * own] : -1;
      }
    }
  }

  DEVICE void finish(Accumulator& d, const Tile& tile, bool last_of_panel) {
    const bool own_mirror = share.own_mirror(tile);
    store_positives(d, tile, own_mirror);
    if (tile.row + kRows <= share.row_end && tile.column + kColumns <= share.column_end) {
      add<true>(d, tile);
    } else {
      add<false>(d, tile);
    }
    if (own_mirror) {
#pragma unroll
      for (int r = 0; r < kLaneColumns; ++r) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          on_diagonal[s][r] = column[s][r];
          column[s][r] = 0.0f;
        }
        column[kSums - 1][r] = 0.0f;
      }
    }
    store_rows(d, tile, own_mirror);
    store_columns(tile, own_mirror, last_of_panel);
  }

  DEVICE void end() {}

  // Of the tile's rows as places among its columns, which every thread then looks at where there is one.
  DEVICE void store_positives(Accumulator& d, const Tile& tile, bool own_mirror) {
    const int end = min(kColumns, share.column_end - tile.column);
    const int place = positive >= tile.column && positive - tile.column < end ? positive - tile.column : -1;
    const bool none = ptx::all_of_warp(place < 0);
    ptx::store_shared(memory + kPlaces + 4 * lane.thread, __int_as_float(place));
    if (lane.thread % 32 == 0) ptx::store_shared(memory + kPlaces + 4 * (kRows + lane.warp), none ? 0.0f : 1.0f);
    ptx::barrier_sync(kOwn + consumer, kWarpgroup);  // and the sums of the tile before have been read
    float any = 0.0f;
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) any += ptx::load_shared(memory + kPlaces + 4 * (kRows + warp));
    if (any > 0.0f) {
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const int row = lane.column + column_offset(n);  // the tile's rows are columns of ptx::wgmma's layout
        const int of_row = __float_as_int(ptx::load_shared(memory + kPlaces + 4 * row));
#pragma unroll
        for (int r = 0; r < kLaneColumns; ++r) {
          if (of_row == column_of(r)) out.positive_logit[tile.row + row] = product(d, 0, n, r) * out.scalars[kScale];
        }
      }
    }
    if (kMirror && !own_mirror) {
#pragma unroll
      for (int r = 0; r < kLaneColumns; ++r) {
        const int row = mirror_positive[r] - tile.row;
        if (row < 0 || row >= min(kRows, share.row_end - tile.row)) continue;
#pragma unroll
        for (int n = 0; n < 32; ++n) {
          if (row == static_cast<int>(lane.column) + column_offset(n)) {
            out.positive_logit[tile.column + column_of(r)] = product(d, 1, n, r) * out.scalars[kScale];
          }
        }
      }
    }
  }

  // The product of the thread's n-th row and r-th column.
  DEVICE static float& product(Accumulator& d, int part, int n, int r) { return d[part][n / 2 * 4 + 2 * r + n % 2]; }
  // Where the s-th sum of the n-th row over the thread's columns takes the place of the products.
  DEVICE static float& sum(Accumulator& d, int s, int n) { return product(d, s / 2, n, s % 2); }

  template <bool kWhole>
  DEVICE void add(Accumulator& d, const Tile& tile) {
    const int row_left = share.row_end - tile.row - lane.column;
    const int column_left = share.column_end - tile.column - lane.row;
#pragma unroll
    for (int n = 0; n < 32; ++n) {
      float of_row[kSums] = {};
#pragma unroll
      for (int r = 0; r < kLaneColumns; ++r) {
        const float z1 = product(d, 0, n, r), z2 = product(d, 1, n, r);
        float e1 = ptx::exp2(fmaf(z1, factor, -reference));
        float e2 = ptx::exp2(fmaf(z2, teacher_factor, -teacher_reference));
        if (!kWhole && (column_offset(n) >= row_left || 8 * r >= column_left)) e1 = e2 = 0.0f;
        of_row[0] += e1;
        of_row[1] += e2;
        of_row[2] = fmaf(e2, z1, of_row[2]);
        column[0][r] += e1;
        column[1][r] += e2;
        column[2][r] = fmaf(e2, z1, column[2][r]);
        if (kMirror) {
          of_row[kSums - 1] = fmaf(e1, z2, of_row[kSums - 1]);
          column[kSums - 1][r] = fmaf(e1, z2, column[kSums - 1][r]);
        }
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) sum(d, s, n) = of_row[s];
    }
  }

  // The sums of a row are spread over the eight threads of a warp that have its other columns, and over four warps. Of
  // two threads each takes half of their rows, until each has four whole ones of its warp.
  DEVICE void store_rows(Accumulator& d, const Tile& tile, bool own_mirror) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      halve<16, 16>(d, s);
      halve<8, 8>(d, s);
      halve<4, 4>(d, s);
      const u32 group = lane.thread % 32 / 4;  // bit 2 of which has chosen between upper and lower half first
      const u32 first = 64 * (group / 4) + 32 * (group / 2 % 2) + 16 * (group % 2) + lane.column;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        ptx::store_shared(memory + lane.warp * kWarpSums + 4 * (s * kRows + first + column_offset(n)), sum(d, s, n));
      }
    }
    ptx::barrier_sync(kOwn + consumer, kWarpgroup);
    float total[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      total[s] = 0.0f;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) {
        total[s] += ptx::load_shared(memory + warp * kWarpSums + 4 * (s * kRows + lane.thread));
      }
    }
    if (tile.row + static_cast<int>(lane.thread) < share.row_end) {
      const int local = tile.local_row + lane.thread;
      float* slot =
          out.row_sums + static_cast<long long>(tile.local_column / kColumns) * kStatistics * out.edge + local;
      float* mirror = out.mirror_column_sums +
                      static_cast<long long>(tile.local_column / kColumns) * kStatistics * out.edge + local;
#pragma unroll
      for (int s = 0; s < kStatistics; ++s) {
        slot[static_cast<long long>(s) * out.edge] = total[s];
        if (kMirror && !own_mirror) mirror[static_cast<long long>(s) * out.edge] = total[mirrored(s)];
      }
    }
  }

  // Of 2 kRowsLeft rows a thread keeps the half that bit kLanes of its number says, and adds the other thread's to it.
  template <int kRowsLeft, u32 kLanes>
  DEVICE void halve(Accumulator& d, int s) {
    const bool upper = lane.thread & kLanes;
#pragma unroll
    for (int n = 0; n < kRowsLeft; ++n) {
      const float low = sum(d, s, n), high = sum(d, s, n + kRowsLeft);
      sum(d, s, n) = (upper ? high : low) + ptx::shuffle_xor(upper ? low : high, kLanes);
    }
  }

  // As in softmax_forward.cu: the sums of all of the consumer's tiles of the panel to the slot of the last, zeros to
  // the others'.
  DEVICE void store_columns(const Tile& tile, bool own_mirror, bool last_of_panel) {
    const long long slot = static_cast<long long>(tile.local_row / kRows) * kStatistics * out.edge + tile.local_column;
#pragma unroll
    for (int r = 0; r < kLaneColumns; ++r) {
      float total[kSums] = {}, mirror[kSums] = {};
      if (last_of_panel) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
          mirror[s] = over_rows(column[s][r]);
          total[s] = mirror[s];
          if (kMirror && s < 2) total[s] += over_rows(on_diagonal[s % 2][r]);
        }
      }
      if (lane.column == 0 && tile.column + column_of(r) < share.column_end) {
#pragma unroll
        for (int s = 0; s < kStatistics; ++s) {
          const long long place = slot + static_cast<long long>(s) * out.edge + column_of(r);
          out.column_sums[place] = total[s];
          if (kMirror && !own_mirror) out.mirror_row_sums[place] = mirror[mirrored(s)];
        }
      }
      if (last_of_panel) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) column[s][r] = 0.0f;
        on_diagonal[0][r] = on_diagonal[1][r] = 0.0f;
      }
    }
  }

  // Four threads have the other rows of a column.
  DEVICE static float over_rows(float value) {
    value += ptx::shuffle_xor(value, 1);
    return value + ptx::shuffle_xor(value, 2);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    softmax_forward_pair(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y,
                         const __grid_constant__ ptx::TensorMap teacher_x,
                         const __grid_constant__ ptx::TensorMap teacher_y, const long long* positive_column,
                         const float* scalars, float* row_sums, float* column_sums, float* mirror_row_sums,
                         float* mirror_column_sums, float* positive_logit, int row_start, int row_end, int column_start,
                         int column_end, int edge) {
  const MirrorShare share(row_start, row_end, column_start, column_end);
  const Output out{positive_column,    scalars,        row_sums, column_sums, mirror_row_sums,
                   mirror_column_sums, positive_logit, edge};
  run<PairSums>(Operands{{&x, &teacher_x}, {&y, &teacher_y}}, share, out);
}
