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
      if (log_sum_exp[i] == -INFINITY) continue;  // everything is excluded
      const double exponent = log_sum_exp[i] * kLog2E, whole = std::nearbyint(exponent);
      reference[i] = static_cast<float>(whole);
      coefficient[i] = static_cast<float>(gradient[i] * std::exp2(whole - exponent));
    }
  }
  std::vector<float> reference, coefficient;
};

class Backward {
 public:
  Backward(const Plan& plan, const Gradients& in) : plan_(plan), in_(in) {
    for (size_t q = 0; q < plan.distributions.size(); ++q) {
      const int64_t index = static_cast<int64_t>(q), statistic = q == 0 ? 0 : 2 * index - 1;
      rows_.emplace_back(in.rows + statistic * plan.rows, in.grad_rows + index * plan.rows, plan.rows,
                         plan.kernels.block);
      columns_.emplace_back(in.columns + statistic * plan.columns, in.grad_columns + index * plan.columns, plan.columns,
                            plan.kernels.block);
    }
  }

  void visit(const Workspace& workspace, int member, const Block& block) const {
    // Every side's G reads the dots of both, so all of G first.
    const int sides = block.both ? 2 : 1;
    for (int side = 0; side < sides; ++side) form_gradient(workspace, block, side);
    for (int side = 0; side < sides; ++side) add_products(workspace, member, block, side);
  }

 private:
  void form_gradient(const Workspace& workspace, const Block& block, int side) const {
    for (size_t q = 0; q < plan_.distributions.size(); ++q) {
      const Weights w = weights(plan_, workspace, plan_.distributions[q], block, side);
      const Line& row = (side == 0 ? rows_ : columns_)[q];
      const Line& column = (side == 0 ? columns_ : rows_)[q];
      const Coefficients coefficients{
          row.reference.data() + block.row, row.coefficient.data() + block.row,
          column.reference.data() + block.column, column.coefficient.data() + block.column};
      plan_.kernels.gradient(w, coefficients, q > 0, workspace.g(side));
    }
    clear_positives(workspace.g(side), block, side);
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

  void add_products(const Workspace& workspace, int member, const Block& block, int side) const {
    const Kernels& kernels = plan_.kernels;
    float* row_out = (side == 0 ? in_.gx : in_.gy) + block.row * plan_.width;
    float* column_out = (side == 0 ? in_.gy : in_.gx) + block.column * plan_.width;
    const float *right = workspace.right_rows(side), *left = workspace.left_rows(side, member);
    const float* g = workspace.g(side);
    if (!plan_.products[0].pairs) {
      kernels.add_product(g, right, block.rows, block.columns, plan_.width, row_out);
      kernels.add_transposed_product(g, left, block.rows, block.columns, plan_.width, column_out);
      return;
    }
    kernels.narrow(g, block.rows, block.columns, workspace.column_pairs(), workspace.row_pairs());
    kernels.add_product_pairs(workspace.column_pairs(), right, block.rows, block.columns, plan_.width, row_out);
    kernels.add_transposed_product_pairs(workspace.row_pairs(), left, block.rows, block.columns, plan_.width, column_out);
  }

  const Plan& plan_;
  const Gradients& in_;
  std::vector<Line> rows_, columns_;
};

}  // namespace

bool backward(const Kernels& kernels, const Problem& problem, const Gradients& in, int threads,
              const std::function<bool()>& poll) {
  const Plan plan(kernels, problem, threads);
  const Backward state(plan, in);
  const Visit visit = [&](const Workspace& workspace, int member, const Block& block) {
    state.visit(workspace, member, block);
  };
  return run(plan, true, poll, visit);
}

}  // namespace softclip
