// Blocks of G, the gradient of every logit of a super-block through both of its softmaxes, with 0 at the positives,
// into the scratch of softclip_kernels/backends/triton/softmax_backward.py.
//
// A softmax's part of a tile is e (a_i + b_j), with e = 2^(logit - reference) and the coefficients of coefficients.py.
// With MIRROR a tile has two outputs: its own, and what it brings to its mirror (J, I), transposed, to which its logits
// are the teacher's. Whether an output is stored or added to what is there, a launch says for each.
#include "tiles.cuh"

// Defined for each compilation, as Triton's kernels have them: places of `scalars`, how far the reference of the
// exponentials lies below the largest logit, how many rows (columns) share a flag. MIRROR: 0 or 1; TIED: the mirror's
// teacher has the student's scale, hence the same exponentials.
constexpr int kFactor = FACTOR, kBound = BOUND, kTeacherFactor = TEACHER_FACTOR, kTeacherBound = TEACHER_BOUND;
constexpr float kHeadroom = HEADROOM;
constexpr int kFlagGroup = FLAG_GROUP;
constexpr int kOutputs = 1 + MIRROR;
constexpr bool kTied = TIED;
static_assert(kRows / kFlagGroup <= 32 && kColumns / kFlagGroup <= 32, "a warp reads the flags of a tile");

enum Put : int { kStore, kAdd };

// What rows (columns) are multiplied with.
struct Vectors {
  const float* coefficient;
  const float* exponent;        // for what is out of range: signed by its last bit
  const signed char* in_range;  // of every kFlagGroup
};

struct Output {
  Vectors rows, columns;
  Put put;
};

struct Input {
  const long long* positive_column;  // (N,), or null
  const float* scalars;
  Output outputs[kOutputs];  // the tile's own; the mirror's, as its vectors lie along this tile's rows and columns
  const ptx::TensorMap* g[kOutputs];
};

// Whether all of the positions [first, first + length) before `end` are in range: of a flag for each thread of a warp.
DEVICE bool flag_in_range(const Vectors& of, int first, int end, int length) {
  const int lane = ptx::thread() % 32, flag = first / kFlagGroup + lane;
  return lane >= length / kFlagGroup || flag * kFlagGroup >= end || of.in_range[flag] != 0;
}

// grad 2^(logit - log-sum-exp) from the signed exponent of coefficients.py.
DEVICE float through_exponent(float logit, float exponent) {
  const float value = ptx::exp2(logit - exponent);
  return __float_as_int(exponent) & 1 ? -value : value;
}

struct Entries {
  // A quarter of a tile, 64 rows and columns, leaves as a box by way of shared memory. Behind it lie what the columns
  // are multiplied with, and their positives.
  static constexpr int kBoxColumns = 64;
  static constexpr u32 kBoxBytes = kStageRows * kBoxColumns * 2;
  static constexpr u32 kVectorBytes = kColumns * 4;
  static constexpr u32 kUsed = kBoxBytes + (2 * kOutputs + MIRROR) * kVectorBytes;
  static constexpr u32 kBytes = (kUsed + 1023) / 1024 * 1024;  // so that the other consumer's box begins as it must

  const Share& share;
  const Input& in;
  const u32 memory, consumer;
  const Lane lane;
  float factor[kOutputs], reference[kOutputs];
  int panel = -1;  // the tile's local_column whose vectors are in shared memory
  Positives positives;
  float coefficient[kOutputs][kThreadRows];
  bool in_range;         // of the flags that this thread of a warp has asked for
  bool mirror_positive;  // some column of the tile has its positive among the tile's rows

  DEVICE Entries(const Share& share, u32 memory, u32 consumer, const Input& in)
      : share(share), in(in), memory(memory), consumer(consumer) {
    factor[0] = in.scalars[kFactor];
    reference[0] = fmaxf(in.scalars[kBound] - kHeadroom, 0.0f);
    if (kOutputs > 1) {
      factor[kOutputs - 1] = in.scalars[kTied ? kFactor : kTeacherFactor];
      reference[kOutputs - 1] = fmaxf(in.scalars[kTied ? kBound : kTeacherBound] - kHeadroom, 0.0f);
    }
  }

  DEVICE u32 coefficients(int of) const { return memory + kBoxBytes + 2 * of * kVectorBytes; }
  DEVICE u32 exponents(int of) const { return coefficients(of) + kVectorBytes; }
  DEVICE u32 column_positives() const { return coefficients(kOutputs); }

  DEVICE void prepare(const Tile& tile) {
    const int corner_row = tile.row, last = share.row_end - 1;
    positives.load(in.positive_column, share, tile, lane);
    in_range = true;
#pragma unroll
    for (int of = 0; of < kOutputs; ++of) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const int row = corner_row + lane.row + row_offset(i);
        coefficient[of][i] = in.outputs[of].rows.coefficient[row < last ? row : last];
      }
      in_range &= flag_in_range(in.outputs[of].rows, corner_row, share.row_end, kRows);
      in_range &= flag_in_range(in.outputs[of].columns, tile.column, share.column_end, kColumns);
    }
  }

  DEVICE void finish(Accumulator& d, const Tile& tile, bool) {
    in_range = ptx::all_of_warp(in_range);
    if (tile.local_column != panel) load_vectors(tile);
    if (MIRROR) find_mirror_positives(tile);
    quarter<0, 0>(d, tile);
    quarter<0, 1>(d, tile);
    quarter<1, 0>(d, tile);
    quarter<1, 1>(d, tile);
  }

  // All threads have read the ones before: they have waited for the consumer's turn since.
  DEVICE void load_vectors(const Tile& tile) {
    panel = tile.local_column;
    const int column = tile.column + lane.thread;
    const bool inside = column < share.column_end;
#pragma unroll
    for (int of = 0; of < kOutputs; ++of) {
      const Vectors& columns = in.outputs[of].columns;
      ptx::store_shared(coefficients(of) + 4 * lane.thread, inside ? columns.coefficient[column] : 0.0f);
      ptx::store_shared(exponents(of) + 4 * lane.thread, inside ? columns.exponent[column] : 0.0f);
    }
    if (MIRROR) {
      const int* halves = reinterpret_cast<const int*>(in.positive_column);  // as Positives takes them
      const int row = inside && halves ? halves[2ll * column] : -1;
      ptx::store_shared(column_positives() + 4 * lane.thread, __int_as_float(row));
    }
    ptx::barrier_sync(kOwn + consumer, kWarpgroup);
  }

  DEVICE void find_mirror_positives(const Tile& tile) {
    bool any = false;
#pragma unroll
    for (int column = ptx::thread() % 32; column < kColumns; column += 32) {
      const int within = __float_as_int(ptx::load_shared(column_positives() + 4 * column)) - tile.row;
      any |= within >= 0 && within < kRows;
    }
    mirror_positive = !ptx::all_of_warp(!any);
  }

  template <int kBox, int kHalf>
  DEVICE void quarter(Accumulator& d, const Tile& tile) {
    output<kBox, kHalf, 0>(d, tile);
    if (MIRROR) output<kBox, kHalf, kOutputs - 1>(d, tile);
  }

  template <int kBox, int kHalf, int kOutput>
  DEVICE void output(Accumulator& d, const Tile& tile) {
    float value[32];  // of two rows, kBoxColumns / 4 columns, in the layout of ptx::wgmma
    if (in_range) {
      compute<kBox, kHalf, kOutput, true>(d, value, tile);
    } else {
      compute<kBox, kHalf, kOutput, false>(d, value, tile);
    }
    without_positives<kBox, kHalf, kOutput>(value, tile);
    put<kBox, kHalf, kOutput>(value, tile);
  }

  // kInRange: one exponential serves both directions; else each has its own, relative to its log-sum-exp.
  template <int kBox, int kHalf, int kOutput, bool kInRange>
  DEVICE void compute(Accumulator& d, float (&value)[32], const Tile& tile) {
    constexpr int kFirst = kBox * kBoxColumns / 4;         // of the thread's columns
    constexpr bool kShared = MIRROR && kTied && kInRange;  // the first output leaves its exponentials to the second
    float row_exponent[2] = {};
    if (!kInRange) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile.row + lane.row + row_offset(2 * kHalf + i);
        if (row < share.row_end) row_exponent[i] = in.outputs[kOutput].rows.exponent[row];
      }
    }
#pragma unroll
    for (int j = 0; j < kBoxColumns / 4; j += 2) {
      float of_column[2];
      const u32 vector = kInRange ? coefficients(kOutput) : exponents(kOutput);
      ptx::load_shared(vector + 4 * (lane.column + column_offset(kFirst + j)), of_column[0], of_column[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& dot = entry(d, 2 * kHalf + i, kFirst + j + k);
          float& out = value[4 * (j / 2) + 2 * i + k];
          if (kInRange) {
            const bool known = kShared && kOutput > 0;
            const float e = known ? dot : ptx::exp2(fmaf(dot, factor[kOutput], -reference[kOutput]));
            if (kShared) dot = e;
            out = e * (coefficient[kOutput][2 * kHalf + i] + of_column[k]);
          } else {
            const float logit = dot * factor[kOutput];
            out = through_exponent(logit, of_column[k]) + through_exponent(logit, row_exponent[i]);
          }
        }
      }
    }
  }

  template <int kBox, int kHalf, int kOutput>
  DEVICE void without_positives(float (&value)[32], const Tile& tile) {
    constexpr int kFirst = kBox * kBoxColumns / 4;
    if (kOutput == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int place = positives.place(2 * kHalf + i, share, tile, lane);
        if (place >= 0) {
#pragma unroll
          for (int j = 0; j < kBoxColumns / 4; ++j) {
            if (place == column_offset(kFirst + j)) value[4 * (j / 2) + 2 * i + j % 2] = 0.0f;
          }
        }
      }
    } else if (mirror_positive) {
      const int row = tile.row + lane.row + row_offset(2 * kHalf);
#pragma unroll
      for (int j = 0; j < kBoxColumns / 4; ++j) {
        const u32 column = lane.column + column_offset(kFirst + j);
        const int positive = __float_as_int(ptx::load_shared(column_positives() + 4 * column));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (positive == row + 8 * i) value[4 * (j / 2) + 2 * i + j % 2] = 0.0f;
        }
      }
    }
  }

  template <int kBox, int kHalf, int kOutput>
  DEVICE void put(const float (&value)[32], const Tile& tile) {
    constexpr bool kTransposed = kOutput > 0;
    const u32 box = memory;
    if (lane.thread == 0) ptx::tma_store_wait_read<0>();
    ptx::barrier_sync(kOwn + consumer, kWarpgroup);
    const u32 matrix = lane.thread % 32 / 8;  // of four of 8 x 8, whose row's address this thread gives to stmatrix
#pragma unroll
    for (int c = 0; c < kBoxColumns / 8; c += 2) {
      const u32 part[4] = {ptx::pack(value[4 * c], value[4 * c + 1]), ptx::pack(value[4 * c + 2], value[4 * c + 3]),
                           ptx::pack(value[4 * c + 4], value[4 * c + 5]),
                           ptx::pack(value[4 * c + 6], value[4 * c + 7])};
      const u32 own = 2 * lane.warp + matrix % 2, other = c + matrix / 2;  // the matrix's place along rows, columns
      const u32 row = 8 * (kTransposed ? other : own) + lane.thread % 8, chunk = kTransposed ? own : other;
      const u32 address = box + row * 128 + (chunk ^ row % 8) * 16;  // swizzled as the box is read
      if (kTransposed) {
        ptx::stmatrix_transposed(address, part[0], part[1], part[2], part[3]);
      } else {
        ptx::stmatrix(address, part[0], part[1], part[2], part[3]);
      }
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(kOwn + consumer, kWarpgroup);
    if (lane.thread == 0) {
      const int along_rows = tile.local_row + kHalf * kStageRows;
      const int along_columns = tile.local_column + kBox * kBoxColumns;
      const int row = kTransposed ? along_columns : along_rows, column = kTransposed ? along_rows : along_columns;
      if (in.outputs[kOutput].put == kAdd) {
        ptx::tma_add(*in.g[kOutput], column, row, box);
      } else {
        ptx::tma_store(*in.g[kOutput], column, row, box);
      }
      ptx::tma_store_commit();
    }
  }

  DEVICE void end() {
    if (lane.thread == 0) ptx::tma_store_wait_read<0>();
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    softmax_backward(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y,
                     const __grid_constant__ ptx::TensorMap g, const __grid_constant__ ptx::TensorMap mirror_g,
                     const long long* positive_column, const float* scalars, const float* row_coefficient,
                     const float* row_exponent, const signed char* row_in_range, const float* column_coefficient,
                     const float* column_exponent, const signed char* column_in_range,
                     const float* mirror_row_coefficient, const float* mirror_row_exponent,
                     const float* mirror_column_coefficient, const float* mirror_column_exponent, int put,
                     int mirror_put, int row_start, int row_end, int column_start, int column_end) {
  const Share share(row_start, row_end, column_start, column_end);
  Input in{positive_column, scalars, {}, {}};
  in.outputs[0] = {{row_coefficient, row_exponent, row_in_range},
                   {column_coefficient, column_exponent, column_in_range},
                   static_cast<Put>(put)};
  in.g[0] = &g;
  if (MIRROR) {  // a row is the mirror's column
    in.outputs[kOutputs - 1] = {{mirror_row_coefficient, mirror_row_exponent, column_in_range},
                                {mirror_column_coefficient, mirror_column_exponent, row_in_range},
                                static_cast<Put>(mirror_put)};
    in.g[kOutputs - 1] = &mirror_g;
  }
  run<Entries>(Operands{{&x}, {&y}}, share, in);
}
