// The hard forward pass: sums of exponentials over the rows and the columns of every tile, into the slots that
// softclip_kernels/backends/triton/softmax_forward.py has for them, and the logits of the positives.
#include "tiles.cuh"

// Defined for each compilation, as Triton's kernels have them: places of `scalars`, and how far the reference of the
// exponentials lies below the largest logit.
constexpr int kScale = SCALE, kFactor = FACTOR, kBound = BOUND;
constexpr float kHeadroom = HEADROOM;

struct Output {
  const long long* positive_column;  // (N,), or null
  const float* scalars;
  float* row_sums;        // (tile columns, edge)
  float* column_sums;     // (tile rows, edge)
  float* positive_logit;  // (N,)
  int edge;
};

struct Sums {
  static constexpr u32 kBytes = 4 * kColumns * 4;  // a consumer's column sums, of each of its warps

  const Share& share;
  const Output& out;
  const u32 memory, consumer;
  const Lane lane;
  const float factor, reference;
  float column[kThreadColumns];  // sums over the rows of this consumer's tiles of the panel
  Positives positives;

  DEVICE Sums(const Share& share, u32 memory, u32 consumer, const Output& out)
      : share(share),
        out(out),
        memory(memory),
        consumer(consumer),
        factor(out.scalars[kFactor]),
        reference(fmaxf(out.scalars[kBound] - kHeadroom, 0.0f)) {
    clear();
  }

  DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) column[j] = 0.0f;
  }

  DEVICE void prepare(const Tile& tile) { positives.load(out.positive_column, share, tile, lane); }

  DEVICE void finish(Accumulator& d, const Tile& tile, bool last_of_panel) {
    const int row_left = share.row_end - tile.row - lane.row;
    const int column_left = share.column_end - tile.column - lane.column;
    const bool whole = tile.row + kRows <= share.row_end && tile.column + kColumns <= share.column_end;
    float row_sum[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) row_sum[i] = 0.0f;
    if (whole) {
      add<true>(d, row_sum, row_left, column_left);
    } else {
      add<false>(d, row_sum, row_left, column_left);
    }
    float* rows =
        out.row_sums + static_cast<long long>(tile.local_column / kColumns) * out.edge + tile.local_row + lane.row;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      float sum = row_sum[i];
      sum += ptx::shuffle_xor(sum, 1);
      sum += ptx::shuffle_xor(sum, 2);
      if (lane.column == 0 && row_offset(i) < row_left) rows[row_offset(i)] = sum;
    }
    store_positives(d, tile);
    store_columns(tile, last_of_panel);
  }

  DEVICE void end() {}

  // The exponentials of a tile, to the sums of its rows and columns; kWhole: none of them lies beyond the end.
  template <bool kWhole>
  DEVICE void add(Accumulator& d, float (&row_sum)[kThreadRows], int row_left, int column_left) {
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        float e = ptx::exp2(fmaf(entry(d, i, j), factor, -reference));
        if (!kWhole && (row_offset(i) >= row_left || column_offset(j) >= column_left)) e = 0.0f;
        row_sum[i] += e;
        column[j] += e;
      }
    }
  }

  // The column sums of all of the consumer's tiles of the panel go to the slot of the last of them, zeros to the
  // others': what is added there has a slot for every tile.
  DEVICE void store_columns(const Tile& tile, bool last_of_panel) {
    float sum = 0.0f;
    if (last_of_panel) {
#pragma unroll
      for (int j = 0; j < kThreadColumns; ++j) {
        float of_warp = column[j];
        of_warp += ptx::shuffle_xor(of_warp, 4);
        of_warp += ptx::shuffle_xor(of_warp, 8);
        of_warp += ptx::shuffle_xor(of_warp, 16);
        if (lane.thread % 32 < 4) {
          ptx::store_shared(memory + 4 * (lane.warp * kColumns + lane.column + column_offset(j)), of_warp);
        }
      }
      ptx::barrier_sync(kOwn + consumer, kWarpgroup);
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) sum += ptx::load_shared(memory + 4 * (warp * kColumns + lane.thread));
      clear();  // and the next ones are written after the consumer's next turn, for which all its threads wait
    }
    const int column_number = tile.column + lane.thread;
    if (column_number < share.column_end) {
      out.column_sums[static_cast<long long>(tile.local_row / kRows) * out.edge + column_number - share.column_start] =
          sum;
    }
  }

  DEVICE void store_positives(Accumulator& d, const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const int place = positives.place(i, share, tile, lane);
      if (place >= 0) {
#pragma unroll
        for (int j = 0; j < kThreadColumns; ++j) {
          if (place == column_offset(j)) {
            out.positive_logit[tile.row + lane.row + row_offset(i)] = entry(d, i, j) * out.scalars[kScale];
          }
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    softmax_forward(const __grid_constant__ ptx::TensorMap x, const __grid_constant__ ptx::TensorMap y,
                    const long long* positive_column, const float* scalars, float* row_sums, float* column_sums,
                    float* positive_logit, int row_start, int row_end, int column_start, int column_end, int edge) {
  const Share share(row_start, row_end, column_start, column_end);
  const Output out{positive_column, scalars, row_sums, column_sums, positive_logit, edge};
  run<Sums>(Operands{{&x}, {&y}}, share, out);
}
