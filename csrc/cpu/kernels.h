// The leaf functions that exist once per instruction set, and nothing else: plain pointers and sizes, so that no inline
// function is ever shared between files compiled with different flags.
//
// Legend, here and in every file: N rows (images), M columns (texts), D embedding width, K teachers. A block is at most
// kBlock rows by kBlock columns of the similarity matrix. "Dots" are x_i . y_j without the scale. Exponentials are
// powers of two: with w = factor * dot, factor = scale / ln 2, e^z = 2^w.
#pragma once

#include <cstddef>
#include <cstdint>

namespace softclip {

constexpr float kExcluded = -1e30f;  // as an exponent: 2 to this is 0, and stays 0 whatever reference is taken off it
constexpr float kEmpty = -1e29f;     // a maximum below this has seen excluded entries only

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// (rows, width), steps in elements.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, width = 0, row_step = 0, column_step = 0;
  Dtype dtype = Dtype::float32;
};

// One softmax weight 2^(w + bias) over a block: the student's or a teacher's. A bias comes in two parts, a whole number
// that joins the exponent and a factor; the whole number of excluded columns, and of those past the block's end, is
// kExcluded.
struct Weights {
  const float* dots;             // (rows, kBlock)
  float factor, factor_low;      // their sum is the factor in more than fp32
  int rows, columns;
  const float* column_exponent;  // (kBlock,) for sums along rows
  const float* column_factor;    // (kBlock,) or null: no biases at all
  const float* row_exponent;     // (kBlock,) for sums along columns; null without biases
  const float* row_factor;
  const int32_t* row_segment;    // (kBlock,) or null: a pair of unequal segments is excluded
  const int32_t* column_segment;
};

// Sums over one block, (kBlock,) each. References are whole numbers: row_sum_i = sum_j 2^(w_ij + bias_j -
// row_reference_i), row_dot_i the same times other_ij.
struct BlockSums {
  const float *row_reference, *column_reference;
  const float* other;  // (rows, kBlock) dots, or null: no dot sums
  float *row_sum, *column_sum, *row_dot, *column_dot;
};

// Coefficients of one distribution's part of G: row_i * 2^(w + bias_j - row_reference_i) + the same for columns.
struct Coefficients {
  const float *row_reference, *row, *column_reference, *column;  // (kBlock,) each
};

// One side of a block for a student and its tied teacher (plan.h): G from the side's own exponentials and from the
// other side's, which have the other side's references. `g` may be the dots.
struct PairedGradient {
  const float* dots;  // (rows, kBlock)
  Coefficients own, teacher;
  float* g;
};

struct Kernels {
  int block;               // kBlock
  int tile_rows;           // width of a left panel
  int tile_columns;        // width of a right panel
  bool bfloat16;           // multiplies bf16 in pairs; without it bf16 inputs are widened when packed
  // Panels. `pairs`: an element is two consecutive bf16 along the summed dimension. Panels are padded with zeros.
  // panels: (ceil(count / width), summed, width) from rows [begin, begin + count) of m, the summed dimension m.width.
  void (*pack)(const Matrix& m, int64_t begin, int count, int width, bool pairs, void* panels);
  // panels: (ceil(m.width / tile_columns), summed, tile_columns), the summed dimension being the rows.
  void (*pack_transposed)(const Matrix& m, int64_t begin, int count, bool pairs, void* panels);
  // dots (rows, kBlock) = left . right over `summed` elements.
  void (*multiply)(const void* left, const void* right, int64_t summed, int rows, int columns, bool pairs, float* dots);
  // out (rows, width), contiguous, += G . right; G (rows, kBlock).
  void (*add_product)(const float* g, const void* right, int rows, int columns, int64_t width, float* out);
  // G^T . right (columns, width), stored in tiles or added to them: (ceil(width / tile_columns), kBlock, tile_columns).
  // A register tile of these is one stretch of memory; the rows of `out` may compete for the same lines of the cache.
  void (*add_transposed_product)(const float* g, const void* right, int rows, int columns, int64_t width, bool add,
                                 float* tiles);
  // The same with G in bf16: pairs along columns (rows, kBlock / 2), pairs along rows (ceil(rows / 2), kBlock).
  void (*narrow)(const float* g, int rows, int columns, void* column_pairs, void* row_pairs);
  void (*add_product_pairs)(const void* column_pairs, const void* right, int rows, int columns, int64_t width,
                            float* out);
  void (*add_transposed_product_pairs)(const void* row_pairs, const void* right, int rows, int columns, int64_t width,
                                       bool add, float* tiles);
  // out (rows, width), contiguous, += tiles.
  void (*add_tiles)(const float* tiles, int rows, int64_t width, float* out);
  // Epilogues.
  void (*maxima)(const Weights&, float* row_maximum, float* column_maximum);  // of w + bias, below kEmpty: none
  void (*accumulate)(const Weights&, const BlockSums&);
  void (*gradient)(const Weights&, const Coefficients&, bool add, float* g);  // g (rows, kBlock) may be the dots
  void (*paired_gradient)(const PairedGradient& first, const PairedGradient& second, float factor, float factor_low,
                          int rows, int columns);
  // How many scale * dot exceed the thresholds, among the pairs that Weights does not exclude; counts are floats.
  void (*count_above)(const Weights&, float scale, const float* row_threshold, const float* column_threshold,
                      float* row_count, float* column_count);
  // Floating-point operations of `repeats` rounds of multiply-adds on registers alone: the benchmark's yardstick.
  double (*multiply_registers)(int64_t repeats, bool pairs);
};

namespace avx512bf16 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace portable { extern const Kernels kernels; }

}  // namespace softclip
