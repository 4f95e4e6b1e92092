// What the two operations have in common: the matrix products of a block, the softmax distributions over them, and the
// memory each thread works in.
#pragma once

#include <vector>

#include "engine.h"
#include "schedule.h"

namespace softclip {

// Two sides of one visit: side 0 is block (I, J). With a teacher on the transposed logits, side 1 is block (J, I), laid
// out transposed, so that its entry (j, i) lies where side 0 has (i, j). Seen from side 1, rows and columns change
// places.
constexpr int kSides = 2;

// dots = left[I] . right[J]^T; by side (x, y) and (y, x).
struct Product {
  Matrix left[kSides], right[kSides];
  bool pairs;      // in bf16 dot products
  int64_t summed;  // elements along the width, as packed
};

// A bias in powers of two, apart as a whole exponent and a factor; (length + kBlock,) each, empty without a bias.
struct Bias {
  std::vector<float> exponent, factor;
};

// The student's softmax, or a teacher's.
struct Distribution {
  int product;
  bool swapped;              // its dots are the other side's
  float factor, factor_low;  // scale / ln 2
  bool biased;
  Bias row_bias, column_bias;
};

// A visited block: I x J, and both sides of it or only the first.
struct Block {
  int64_t row, column;
  int rows, columns;
  bool both;
};

// Which gradients a backward computes; none of them: a forward.
struct Wanted {
  bool x, y;
  bool any() const { return x || y; }
  // Of a side's left operand: x, or y on the other side. Its product is G . right.
  bool left(int side) const { return side == 0 ? x : y; }
  bool right(int side) const { return side == 0 ? y : x; }
};

struct Plan {
  Plan(const Kernels& kernels, const Problem& problem, int threads, Wanted wanted);

  const Kernels& kernels;
  const Problem& problem;
  const int64_t rows, columns, width;
  const Wanted wanted;
  const bool paired;
  const int threads;
  const Schedule schedule;
  bool long_call;  // worth leaving the calling thread free to poll
  std::vector<Product> products;            // the student's first
  std::vector<Distribution> distributions;  // the student's, then every teacher's
  // The first teacher that is the student itself with the other side's logits: no bias, no segments, the same scale.
  // Its exponentials are the other side's student's, its sums along rows the student's along columns. 0: there is none.
  size_t tied = 0;

  int sides() const { return paired ? 2 : 1; }
  // The student's dots have no reader after the first, so that G may take their place.
  bool gradient_in_place() const { return distributions.size() == (tied ? 2u : 1u); }
};

// The sum of one operand's gradient over the row blocks of a group, in the tiles of kernels.h. `filled`: it holds
// something.
struct Tiles {
  float* data = nullptr;
  bool filled = false;
};

// One thread's memory: panels of a group of row blocks (`left`) and of one column block (`right`), dots, and scratch.
// What it holds at first is undefined.
class Workspace {
 public:
  explicit Workspace(const Plan& plan);
  size_t bytes() const { return floats_ * sizeof(float); }
  int group() const { return group_; }  // how many row blocks share one packed column block
  void attach(char* memory);

  float* left(int product, int side, int member) const {
    return memory_ + left_[product][side] + member * step_[product];
  }
  float* right(int product, int side) const { return memory_ + right_[product][side]; }
  // For the gradient's products: rows of the left matrix by member, of the right matrix.
  float* left_rows(int side, int member) const { return memory_ + left_rows_[side] + member * rows_step_; }
  float* right_rows(int side) const { return memory_ + right_rows_[side]; }
  Tiles& right_tiles(int side) { return right_tiles_[side]; }  // G^T . left rows, by side
  float* dots(int product, int side) const { return memory_ + dots_[product][side]; }
  float* g(int side) const { return memory_ + g_[side]; }
  float* column_pairs() const { return memory_ + pairs_; }
  float* row_pairs() const { return column_pairs() + area_ / 2; }
  float* line(int index) const { return memory_ + lines_ + index * line_; }  // (kBlock,)
  static constexpr int kLines = 12;

 private:
  struct Offsets {
    int64_t side[kSides];
    int64_t operator[](int index) const { return side[index]; }
  };
  int64_t reserve(int64_t floats);
  int64_t floats_ = 0, area_, line_, rows_step_ = 0, lines_ = 0, pairs_ = 0;
  int group_ = 1;
  std::vector<int64_t> step_;
  std::vector<Offsets> left_, right_, dots_;
  Offsets left_rows_{}, right_rows_{}, tiles_{}, g_{};
  Tiles right_tiles_[kSides];
  float* memory_ = nullptr;
};

// The distribution's weights on one side of a block; fills lines 0 to 2 of the workspace.
Weights weights(const Plan&, const Workspace&, const Distribution&, const Block&, int side);

// What an operation does with the blocks of a plan. All threads call it, each with its own workspace.
class Visitor {
 public:
  virtual ~Visitor() = default;
  virtual void block(Workspace&, int member, const Block&) = 0;  // its dots are computed
  virtual void columns_done(Workspace&, int64_t, int) {}         // column, columns: they have met all of a group's rows
};

// Takes the visitor to every block of the plan. False: cancelled.
bool run(const Plan&, const std::function<bool()>& poll, Visitor& visitor);

}  // namespace softclip
