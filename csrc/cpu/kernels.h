// The leaf functions that exist once per instruction set, and what they are given: plain pointers and sizes, so that no
// inline function is ever shared between files compiled with different flags.
//
// Legend: a block is at most kBlock rows by kBlock columns of the similarity matrix (the other letters are in
// problem.h). "Dots" are x_i . y_j without the scale. Exponentials are powers of two: with w = factor * dot,
// factor = scale / ln 2, e^z = 2^w. G is the gradient with respect to the dots. A row of dots is a step long, which
// holds whole register tiles of columns: tiles are stored and vectors read past the block's end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"

namespace softclip {

constexpr float kExcluded = -1e30f;  // as an exponent: 2 to this is 0, and stays 0 whatever reference is taken off it
constexpr float kEmpty = -1e29f;     // a maximum below this has seen excluded entries only

// One softmax weight 2^(w + bias) over a block: the student's or a teacher's. A bias comes in two parts, a whole number
// that joins the exponent and a factor; the whole number of excluded columns, and of those past the block's end, is
// kExcluded.
struct Weights {
  const float* dots;  // (rows, dots_step)
  int64_t dots_step;
  float factor, factor_low;  // their sum is the factor in more than fp32
  int rows, columns;
  const float* column_exponent;  // (kBlock,) for sums along rows
  const float* column_factor;    // (kBlock,) or null: no biases at all
  const float* row_exponent;     // (kBlock,) for sums along columns; null without biases
  const float* row_factor;
  const int32_t* row_segment;  // (kBlock,) or null: a pair of unequal segments is excluded
  const int32_t* column_segment;
};

// Sums over one block, (kBlock,) each. References are whole numbers: row_sum_i = sum_j 2^(w_ij + bias_j -
// row_reference_i), row_dot_i the same times other_ij.
struct BlockSums {
  const float *row_reference, *column_reference;
  const float* other;  // dots of the same step, or null: no dot sums
  float *row_sum, *column_sum, *row_dot, *column_dot;
};

// Coefficients of one distribution's part of G: row_i * 2^(w + bias_j - row_reference_i) + the same for columns.
struct Coefficients {
  const float *row_reference, *row, *column_reference, *column;  // (kBlock,) each
};

// A block, or its mirror (plan.h), for a student and the teacher that shares its exponentials: G comes from the
// student's own exponentials and, for the teacher, from those of the other of the two, with their references.
struct MirroredGradient {
  const float* dots;  // (rows, dots_step)
  int64_t dots_step;
  Coefficients student, teacher;
  float* g;  // (rows, kBlock); may be the dots, where these have that step
};

// Matrix products for one kind of operand element of 4 bytes: a float, or two bf16 that follow one another along the
// summed dimension (bf16x2). Operands are panels; `summed` counts elements.
struct ProductKernels {
  // dots (rows, dots_step), in whole register tiles, = left . right.
  void (*multiply)(const void* left, const void* right, int64_t summed, int rows, int columns, float* dots,
                   int64_t dots_step);
  // out (rows, width), contiguous, += G . right. G (rows, kBlock floats), or bf16x2 along its columns.
  void (*add_product)(const void* g, const void* right, int rows, int columns, int64_t width, float* out);
  // G^T . right (columns, width), stored in tiles or added to them: (ceil(width / tile_columns), kBlock, tile_columns).
  // A register tile of these is one stretch of memory; the rows of a matrix may compete for the same lines of the
  // cache. G (rows, kBlock floats), or bf16x2 along its rows.
  void (*add_transposed_product)(const void* g, const void* right, int rows, int columns, int64_t width, bool add,
                                 float* tiles);
  // Floating-point operations of `repeats` rounds of multiply-adds on registers alone: the benchmark's yardstick.
  double (*multiply_registers)(int64_t repeats);
};

struct Kernels {
  int block;         // kBlock
  int tile_rows;     // width of a left panel
  int tile_columns;  // width of a right panel

  // Panels are padded with zeros. Without bf16x2, bf16 inputs are widened to floats.
  // panels: (ceil(count / width), summed, width) from rows [begin, begin + count) of m, the summed dimension m.width.
  void (*pack)(const Matrix& m, int64_t begin, int count, int width, bool bf16x2, void* panels);
  // panels: (ceil(m.width / tile_columns), summed, tile_columns), the summed dimension being the rows.
  void (*pack_transposed)(const Matrix& m, int64_t begin, int count, bool bf16x2, void* panels);

  ProductKernels float32;
  ProductKernels bf16x2;  // null, as is the next, where the instruction set multiplies no bf16
  // G rounded to bf16, both ways: (rows, kBlock / 2) along its columns, (ceil(rows / 2), kBlock) along its rows.
  void (*round_to_bf16x2)(const float* g, int rows, int columns, void* along_columns, void* along_rows);
  // out (rows, width), contiguous, += tiles of an add_transposed_product.
  void (*add_tiles)(const float* tiles, int rows, int64_t width, float* out);

  // out (m.width,) += factor * row of m.
  void (*add_row)(const Matrix& m, int64_t row, float factor, float* out);
  // The last pass over a product g = G . y of rows [begin, end), (end - begin, m.width) contiguous: out, in its dtype,
  // = factor * g, unless it is null; it may be g itself. Returns the sum of m * g over these rows.
  double (*finish_rows)(const Matrix& m, int64_t begin, int64_t end, const float* g, float factor, const Outgoing& out);

  void (*maxima)(const Weights&, float* row_maximum, float* column_maximum);  // of w + bias, below kEmpty: none
  void (*accumulate)(const Weights&, const BlockSums&);
  // g (rows, kBlock) may be the dots, where these have that step.
  void (*gradient)(const Weights&, const Coefficients&, bool add, float* g);
  void (*mirrored_gradient)(const MirroredGradient& block, const MirroredGradient& mirror, float factor,
                            float factor_low, int rows, int columns);
  // How many scale * dot exceed the thresholds, among the pairs that Weights does not exclude; counts are floats.
  void (*count_above)(const Weights&, float scale, const float* row_threshold, const float* column_threshold,
                      float* row_count, float* column_count);

  bool has_bf16x2() const { return round_to_bf16x2 != nullptr; }
};

}  // namespace softclip
