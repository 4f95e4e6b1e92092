#include <cmath>
#include <vector>

#include "plan.h"

namespace softclip {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

// Along one direction: coefficient * 2^(w - reference) = gradient * e^(z - log-sum-exp), the reference a whole number.
// (length + kBlock,) each, for reads of whole vectors past the end.
struct Line {
  Line(const float* log_sum_exp, const float* gradient, int64_t length, int block)
      : reference(length + block, 0.0f), coefficient(length + block, 0.0f) {
    for (int64_t i = 0; i < length; ++i) {
      if (log_sum_exp[i] != -INFINITY) reference[i] = static_cast<float>(std::nearbyint(log_sum_exp[i] * kLog2E));
    }
    set(log_sum_exp, gradient, length);
  }

  // With another's references, for exponentials that have them.
  Line(const Line& other, const float* log_sum_exp, const float* gradient, int64_t length)
      : reference(other.reference), coefficient(other.coefficient.size(), 0.0f) {
    set(log_sum_exp, gradient, length);
  }

  std::vector<float> reference, coefficient;

 private:
  void set(const float* log_sum_exp, const float* gradient, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      if (log_sum_exp[i] == -INFINITY) continue;  // everything is excluded
      coefficient[i] = static_cast<float>(gradient[i] * std::exp2(reference[i] - log_sum_exp[i] * kLog2E));
    }
  }
};

class Backward final : public Visitor {
 public:
  Backward(const Plan& plan, const Gradients& in) : plan_(plan), in_(in) {
    for (size_t q = 0; q < plan.distributions.size(); ++q) {
      const int64_t index = static_cast<int64_t>(q), statistic = q == 0 ? 0 : 2 * index - 1;
      const float *rows = in.rows + statistic * plan.rows, *grad_rows = in.grad_rows + index * plan.rows;
      const float* columns = in.columns + statistic * plan.columns;
      const float* grad_columns = in.grad_columns + index * plan.columns;
      if (q > 0 && q == plan.tied) {
        const Line row(columns_[0], rows, grad_rows, plan.rows), column(rows_[0], columns, grad_columns, plan.columns);
        rows_.push_back(row);
        columns_.push_back(column);
        continue;
      }
      rows_.emplace_back(rows, grad_rows, plan.rows, plan.kernels.block);
      columns_.emplace_back(columns, grad_columns, plan.columns, plan.kernels.block);
    }
  }

  void block(Workspace& workspace, int member, const Block& block) override {
    // Every side's G reads the dots of both, so all of G first.
    const int sides = block.both ? 2 : 1;
    if (plan_.tied > 0) form_both(workspace, block);
    for (int side = 0; side < sides; ++side) {
      for (size_t q = plan_.tied > 0 ? 1 : 0; q < plan_.distributions.size(); ++q) {
        if (q == 0 || q != plan_.tied) form_gradient(workspace, block, side, q);
      }
      clear_positives(workspace.g(side), block, side);
    }
    for (int side = 0; side < sides; ++side) add_products(workspace, member, block, side);
  }

  void columns_done(Workspace& workspace, int64_t column, int columns) override {
    for (int side = 0; side < plan_.sides(); ++side) {
      Tiles& tiles = workspace.right_tiles(side);
      float* out = (side == 0 ? in_.gy : in_.gx) + column * plan_.width;
      if (tiles.filled) plan_.kernels.add_tiles(tiles.data, columns, plan_.width, out);
      tiles.filled = false;
    }
  }

 private:
  Coefficients coefficients(const Block& block, int side, size_t q) const {
    const Line& row = (side == 0 ? rows_ : columns_)[q];
    const Line& column = (side == 0 ? columns_ : rows_)[q];
    return {row.reference.data() + block.row, row.coefficient.data() + block.row,
            column.reference.data() + block.column, column.coefficient.data() + block.column};
  }

  void form_gradient(const Workspace& workspace, const Block& block, int side, size_t q) const {
    const Weights w = weights(plan_, workspace, plan_.distributions[q], block, side);
    plan_.kernels.gradient(w, coefficients(block, side, q), q > 0, workspace.g(side));
  }

  // The student's and the tied teacher's part on both sides. (On the diagonal the second side is the first,
  // transposed.)
  void form_both(const Workspace& workspace, const Block& block) const {
    PairedGradient sides[kSides];
    for (int side = 0; side < kSides; ++side) {
      sides[side] = {workspace.dots(0, side), coefficients(block, side, 0), coefficients(block, side, plan_.tied),
                     workspace.g(side)};
    }
    const Distribution& student = plan_.distributions[0];
    plan_.kernels.paired_gradient(sides[0], sides[1], student.factor, student.factor_low, block.rows, block.columns);
  }

  // The caller adds the positives' entries in full precision.
  void clear_positives(float* g, const Block& block, int side) const {
    const int64_t* positive = plan_.problem.positive;
    if (positive == nullptr) return;
    const int64_t length = plan_.kernels.block;
    if (side == 0) {
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t j = positive[block.row + i] - block.column;
        if (j >= 0 && j < block.columns) g[i * length + j] = 0;
      }
      return;
    }
    for (int64_t j = 0; j < block.columns; ++j) {
      const int64_t i = positive[block.column + j] - block.row;
      if (i >= 0 && i < block.rows) g[i * length + j] = 0;
    }
  }

  void add_products(Workspace& workspace, int member, const Block& block, int side) const {
    const Kernels& kernels = plan_.kernels;
    const bool pairs = plan_.products[0].pairs;
    const float* g = workspace.g(side);
    if (pairs) kernels.narrow(g, block.rows, block.columns, workspace.column_pairs(), workspace.row_pairs());
    if (plan_.wanted.left(side)) {
      const float* right = workspace.right_rows(side);
      float* out = (side == 0 ? in_.gx : in_.gy) + block.row * plan_.width;
      pairs ? kernels.add_product_pairs(workspace.column_pairs(), right, block.rows, block.columns, plan_.width, out)
            : kernels.add_product(g, right, block.rows, block.columns, plan_.width, out);
    }
    if (plan_.wanted.right(side)) {
      const float* left = workspace.left_rows(side, member);
      Tiles& out = workspace.right_tiles(side);
      pairs ? kernels.add_transposed_product_pairs(workspace.row_pairs(), left, block.rows, block.columns, plan_.width,
                                                   out.filled, out.data)
            : kernels.add_transposed_product(g, left, block.rows, block.columns, plan_.width, out.filled, out.data);
      out.filled = true;
    }
  }

  const Plan& plan_;
  const Gradients& in_;
  std::vector<Line> rows_, columns_;
};

}  // namespace

bool backward(const Kernels& kernels, const Problem& problem, const Gradients& in, int threads,
              const std::function<bool()>& poll) {
  const Wanted wanted{in.gx != nullptr, in.gy != nullptr};
  if (!wanted.any()) return true;
  const Plan plan(kernels, problem, threads, wanted);
  Backward state(plan, in);
  return run(plan, poll, state);
}

}  // namespace softclip
