// What the two operations have in common: the matrix products of a block and the softmax distributions over them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "../problem.h"
#include "kernels.h"
#include "schedule.h"
#include "threads.h"

namespace softclip {

constexpr double kLn2 = 0.69314718055994530942, kLog2E = 1.4426950408889634074;

// A visit to block (I, J) sees, with a teacher on the transposed logits, its mirror as well: block (J, I), laid out
// transposed, so that its entry (j, i) lies where the block has (i, j). Seen from the mirror, rows and columns change
// places. An index `side` says which of the two is meant.
enum Side : int { kDirect = 0, kMirror = 1, kSides = 2 };

// `length` up to whole register tiles, as panels are packed and the products write.
int64_t whole_tiles(int64_t length, int tile);

constexpr int opposite(int side) { return kMirror - side; }

// dots = left[I] . right[J]^T; by side (x, y) and (y, x).
struct Product {
  Matrix left[kSides], right[kSides];
  bool bf16x2;     // in bf16 dot products
  int64_t summed;  // elements along the width, as packed
};

// A bias in powers of two, split into a whole exponent and a factor; (length + kBlock,) each, empty without a bias.
struct Bias {
  std::vector<float> exponent, factor;
};

// The student's softmax, or a teacher's.
struct Distribution {
  int product;
  bool transposed;           // its dots are those of the opposite side
  float factor, factor_low;  // scale / ln 2
  bool biased;
  Bias row_bias, column_bias;
};

// A visited block, and whether its mirror is visited with it. (On the diagonal a block is its own mirror, transposed.)
struct Block {
  int64_t row, column;
  int rows, columns;
  bool with_mirror;
  int sides() const { return with_mirror ? 2 : 1; }
};

// Which gradients a backward computes; none of them: a forward.
struct Wanted {
  bool x, y;
  bool any() const { return x || y; }
  // Of a side's left operand, x or on the mirror y, the product G . right; of its right operand G^T . left.
  bool left(int side) const { return side == kDirect ? x : y; }
  bool right(int side) const { return side == kDirect ? y : x; }
};

// Where the dots of small problems lie from the forward to the backward, of undefined contents until a forward has been
// there: the blocks of a job that are visited, side by side, in the order of the rounds and the threads. Of each block
// no more than the whole register tiles that cover it, in one such area for every product and side. The header says
// what the layout depends on; a backward takes these threads, and computes the dots again where the rest does not fit.
struct Kept {
  struct Header {
    int32_t threads, block, tile_rows, tile_columns;
    bool fits(const Kernels& kernels) const {
      return block == kernels.block && tile_rows == kernels.tile_rows && tile_columns == kernels.tile_columns;
    }
  };
  static constexpr int64_t kHeaderFloats = 16;  // a cache line

  float* data = nullptr;  // null: nothing is kept
  Header& header() const { return *reinterpret_cast<Header*>(data); }
};

// Where the dots of one block lie among those of its job, in floats: `area` of them for each product and side, `step`
// from one row to the next.
struct KeptBlock {
  int64_t begin, area, step;
};

struct Plan {
  Plan(const Kernels& kernels, const Problem& problem, const Threads& threads, Wanted wanted, Kept kept = {});

  const Kernels& kernels;
  const Problem& problem;
  const int64_t rows, columns, width;
  const Wanted wanted;
  const bool mirrored;  // blocks are visited with their mirrors
  const Threads threads;
  const Schedule schedule;
  std::vector<Product> products;            // the student's first
  std::vector<Distribution> distributions;  // the student's, then teacher k's at 1 + k
  // The first distribution of a teacher that is the student itself on the transposed logits: no bias, no segments, the
  // same scale. Its row softmax is the student's column softmax and the other way round, so it needs no exponentials of
  // its own.
  std::optional<size_t> shares_student;
  const Kept kept;

  int sides() const { return mirrored ? 2 : 1; }
  const ProductKernels& product_kernels(const Product& product) const {
    return product.bf16x2 ? kernels.bf16x2 : kernels.float32;
  }
  // Whether the visited blocks' dots are multiplied, and not those that a forward kept.
  bool multiplies() const { return kept.data == nullptr || !wanted.any(); }
  // The student's dots have no reader after the first, so that G may take their place.
  bool gradient_in_place() const { return kept.data == nullptr && distributions.size() == (shares_student ? 2u : 1u); }
  int64_t kept_areas() const { return sides() * static_cast<int64_t>(products.size()); }
  KeptBlock kept_block(const Job& job, const Block& block) const;
  // Floats of a job's blocks whose rows begin before `row`, all products and sides.
  int64_t kept_floats_above(const Job& job, int64_t row) const;
  // Where the blocks of every thread in every round begin, and last where all end; in floats.
  std::vector<int64_t> kept_offsets() const;
};

}  // namespace softclip
