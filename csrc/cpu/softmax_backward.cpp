#include <cmath>
#include <vector>

#include "operations.h"
#include "plan.h"
#include "traversal.h"
#include "workspace.h"

namespace softclip {
namespace {

// Along one direction: coefficient * 2^(w - reference) = gradient * e^(z - log-sum-exp), the reference a whole number.
// (length + kBlock,) each, for reads of whole vectors past the end.
struct Exponentials {
  Exponentials(const float* log_sum_exp, const float* gradient, int64_t length, int block)
      : reference(length + block, 0.0f), coefficient(length + block, 0.0f) {
    for (int64_t i = 0; i < length; ++i) {
      if (log_sum_exp[i] != -INFINITY) reference[i] = static_cast<float>(std::nearbyint(log_sum_exp[i] * kLog2E));
    }
    set(log_sum_exp, gradient, length);
  }

  // With another's references, for exponentials that have them.
  Exponentials(const Exponentials& other, const float* log_sum_exp, const float* gradient, int64_t length)
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
    const int block = plan.kernels.block;
    for (size_t q = 0; q < plan.distributions.size(); ++q) {
      const float* row_log_sum_exp = log_sum_exp(in.rows, q);
      const float* column_log_sum_exp = log_sum_exp(in.columns, q);
      const float* grad_rows = in.grad_rows + static_cast<int64_t>(q) * plan.rows;
      const float* grad_columns = in.grad_columns + static_cast<int64_t>(q) * plan.columns;
      if (q == plan.shares_student) {  // its exponentials along rows are the student's along columns
        const Exponentials rows(columns_[0], row_log_sum_exp, grad_rows, plan.rows);
        const Exponentials columns(rows_[0], column_log_sum_exp, grad_columns, plan.columns);
        rows_.push_back(rows);
        columns_.push_back(columns);
        continue;
      }
      rows_.emplace_back(row_log_sum_exp, grad_rows, plan.rows, block);
      columns_.emplace_back(column_log_sum_exp, grad_columns, plan.columns, block);
    }
  }

  void block(Workspace& workspace, int member, const Block& block) override {
    // Every side's G reads the dots of both, so all of G first.
    const bool shared = plan_.shares_student.has_value();
    if (shared) form_both(workspace, block, *plan_.shares_student);
    for (int side = 0; side < block.sides(); ++side) {
      for (size_t q = shared ? 1 : 0; q < plan_.distributions.size(); ++q) {
        if (q != plan_.shares_student) form_gradient(workspace, block, side, q);
      }
      // The caller adds the positives' entries in full precision.
      float* g = workspace.g(side);
      each_positive(plan_, block, side, [g](int64_t, int64_t at) { g[at] = 0; });
    }
    for (int side = 0; side < block.sides(); ++side) add_products(workspace, member, block, side);
  }

  void columns_done(Workspace& workspace, int64_t column, int columns) override {
    for (int side = 0; side < plan_.sides(); ++side) {
      Tiles& tiles = workspace.right_tiles(side);
      float* out = (side == kDirect ? in_.gy : in_.gx) + column * plan_.width;
      if (tiles.filled) plan_.kernels.add_tiles(tiles.data, columns, plan_.width, out);
      tiles.filled = false;
    }
  }

 private:
  static const float* log_sum_exp(const PackedStatistics<const float>& statistics, size_t q) {
    return q == 0 ? statistics.log_sum_exp() : statistics.teacher_log_sum_exp(q - 1);
  }

  Coefficients coefficients(const Block& block, int side, size_t q) const {
    const Exponentials& row = (side == kDirect ? rows_ : columns_)[q];
    const Exponentials& column = (side == kDirect ? columns_ : rows_)[q];
    return {row.reference.data() + block.row, row.coefficient.data() + block.row,
            column.reference.data() + block.column, column.coefficient.data() + block.column};
  }

  void form_gradient(const Workspace& workspace, const Block& block, int side, size_t q) const {
    const Weights w = weights(plan_, workspace, plan_.distributions[q], block, side);
    plan_.kernels.gradient(w, coefficients(block, side, q), q > 0, workspace.g(side));
  }

  // The student's part and that of the teacher that shares its exponentials, on both sides (on the diagonal, too, where
  // the mirror is the block itself, transposed).
  void form_both(const Workspace& workspace, const Block& block, size_t teacher) const {
    MirroredGradient sides[kSides];
    for (int side = 0; side < kSides; ++side) {
      sides[side] = {workspace.dots(0, side), coefficients(block, side, 0), coefficients(block, side, teacher),
                     workspace.g(side)};
    }
    const Distribution& student = plan_.distributions[0];
    plan_.kernels.mirrored_gradient(sides[kDirect], sides[kMirror], student.factor, student.factor_low, block.rows,
                                    block.columns);
  }

  void add_products(Workspace& workspace, int member, const Block& block, int side) const {
    const Product& student = plan_.products[0];
    const ProductKernels& kernels = plan_.product_kernels(student);
    const float* g = workspace.g(side);
    const float *along_columns = g, *along_rows = g;
    if (student.bf16x2) {
      plan_.kernels.round_to_bf16x2(g, block.rows, block.columns, workspace.g_along_columns(),
                                    workspace.g_along_rows());
      along_columns = workspace.g_along_columns();
      along_rows = workspace.g_along_rows();
    }
    if (plan_.wanted.left(side)) {
      float* out = (side == kDirect ? in_.gx : in_.gy) + block.row * plan_.width;
      kernels.add_product(along_columns, workspace.right_rows(side), block.rows, block.columns, plan_.width, out);
    }
    if (plan_.wanted.right(side)) {
      Tiles& out = workspace.right_tiles(side);
      kernels.add_transposed_product(along_rows, workspace.left_rows(side, member), block.rows, block.columns,
                                     plan_.width, out.filled, out.data);
      out.filled = true;
    }
  }

  const Plan& plan_;
  const Gradients& in_;
  std::vector<Exponentials> rows_, columns_;
};

}  // namespace

bool backward(const Kernels& kernels, const Problem& problem, const Gradients& in, int threads, const Poll& poll) {
  const Wanted wanted{in.gx != nullptr, in.gy != nullptr};
  if (!wanted.any()) return true;
  const Plan plan(kernels, problem, threads, wanted);
  Backward state(plan, in);
  return traverse(plan, poll, state);
}

}  // namespace softclip
