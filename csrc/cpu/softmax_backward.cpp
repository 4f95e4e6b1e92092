#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <vector>

#include "memory.h"
#include "operations.h"
#include "plan.h"
#include "positives.h"
#include "traversal.h"
#include "workspace.h"

namespace softclip {
namespace {

// Along one direction: coefficient * 2^(w - reference) = gradient * e^(z - log-sum-exp), the reference a whole number.
// (length + kBlock,) each, for reads of whole vectors past the end.
struct Exponentials {
  Exponentials(const float* log_sum_exp, const LinearForm& form, size_t distribution, int64_t length, int block)
      : reference(length + block, 0.0f), coefficient(length + block, 0.0f) {
    for (int64_t i = 0; i < length; ++i) {
      if (log_sum_exp[i] != -INFINITY) reference[i] = static_cast<float>(std::nearbyint(log_sum_exp[i] * kLog2E));
    }
    set(log_sum_exp, form, distribution, length);
  }

  // With another's references, for exponentials that have them.
  Exponentials(const Exponentials& other, const float* log_sum_exp, const LinearForm& form, size_t distribution,
               int64_t length)
      : reference(other.reference), coefficient(other.coefficient.size(), 0.0f) {
    set(log_sum_exp, form, distribution, length);
  }

  std::vector<float> reference, coefficient;

 private:
  void set(const float* log_sum_exp, const LinearForm& form, size_t distribution, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      if (log_sum_exp[i] == -INFINITY) continue;  // everything is excluded
      const double to_reference = std::exp2(reference[i] - log_sum_exp[i] * kLog2E);
      coefficient[i] = static_cast<float>(form.gradient(distribution, i) * to_reference);
    }
  }
};

// The sum G . y, which becomes the gradient of x, or G^T . x, that of y. In float32: in the outgoing gradient where
// that is float32, else in memory of its own.
class Sum {
 public:
  Sum(const Matrix& operand, const Outgoing& out, bool wanted) : operand_(operand), out_(out), wanted_(wanted) {
    if (in_place()) data_ = static_cast<float*>(out.data);
  }

  bool wanted() const { return wanted_; }
  size_t own_bytes() const {
    return wanted_ && !in_place() ? static_cast<size_t>(operand_.rows * operand_.width) * sizeof(float) : 0;
  }
  void attach(char* memory) {
    if (own_bytes() > 0) data_ = reinterpret_cast<float*>(memory);
  }
  float* row(int64_t row) const { return data_ + row * operand_.width; }

  void clear(const Range& rows) const {
    if (wanted_) std::fill(row(rows.begin), row(rows.end), 0.0f);
  }

  // Scales and rounds these rows, and returns the sum of operand * product over them. `passing`: memory of its own goes
  // back to the system as the gradient, which nobody has touched yet, takes its place.
  double finish(const Kernels& kernels, const Range& rows, double scale, bool passing) const {
    double total = 0;
    const int64_t step = std::max<int64_t>(1, kStretch / operand_.width);
    for (int64_t begin = rows.begin; wanted_ && begin < rows.end; begin += step) {
      const int64_t end = std::min(begin + step, rows.end);
      Outgoing out = out_;
      const int64_t size = out.dtype == Dtype::float32 ? 4 : 2;
      if (out.data != nullptr) out.data = static_cast<char*>(out.data) + begin * operand_.width * size;
      total += kernels.finish_rows(operand_, begin, end, row(begin), static_cast<float>(scale), out);
      if (passing && !in_place()) give_back(reinterpret_cast<char*>(row(begin)), reinterpret_cast<char*>(row(end)));
    }
    return total;
  }

 private:
  static constexpr int64_t kStretch = 1 << 18;  // floats between two returns of memory
  bool in_place() const { return out_.data != nullptr && out_.dtype == Dtype::float32; }

  const Matrix& operand_;
  const Outgoing out_;
  const bool wanted_;
  float* data_ = nullptr;
};

class Backward final : public Visitor {
 public:
  Backward(const Plan& plan, const Gradients& in)
      : plan_(plan),
        in_(in),
        gx_(plan.problem.x, in.dx, plan.wanted.x),
        gy_(plan.problem.y, in.dy, plan.wanted.y),
        positive_(plan.problem.positive_column == nullptr ? 0 : plan.rows),
        dscale_(plan.threads.shares) {
    const int block = plan.kernels.block;
    for (size_t q = 0; q < plan.distributions.size(); ++q) {
      const float* row_log_sum_exp = log_sum_exp(in.rows, q);
      const float* column_log_sum_exp = log_sum_exp(in.columns, q);
      if (q == plan.shares_student) {  // its exponentials along rows are the student's along columns
        const Exponentials rows(columns_[0], row_log_sum_exp, in.row_form, q, plan.rows);
        const Exponentials columns(rows_[0], column_log_sum_exp, in.column_form, q, plan.columns);
        rows_.push_back(rows);
        columns_.push_back(columns);
        continue;
      }
      rows_.emplace_back(row_log_sum_exp, in.row_form, q, plan.rows, block);
      columns_.emplace_back(column_log_sum_exp, in.column_form, q, plan.columns, block);
    }
  }

  size_t shared_bytes() const override { return gx_.own_bytes() + gy_.own_bytes(); }

  void attach(char* shared, bool passing) override {
    gx_.attach(shared);
    gy_.attach(shared + gx_.own_bytes());
    passing_ = passing;
  }

  void start(int thread) override {
    gx_.clear(plan_.schedule.own_rows(thread));
    gy_.clear(plan_.schedule.own_columns(thread));
  }

  void block(Workspace& workspace, const Packed& packed, const Block& block) override {
    for (int side = 0; side < block.sides(); ++side) take_positives(workspace, block, side);
    // Every side's G reads the dots of both, so all of G first.
    const bool shared = plan_.shares_student.has_value();
    if (shared) form_both(workspace, block, *plan_.shares_student);
    for (int side = 0; side < block.sides(); ++side) {
      for (size_t q = shared ? 1 : 0; q < plan_.distributions.size(); ++q) {
        if (q != plan_.shares_student) form_gradient(workspace, block, side, q);
      }
      float* g = workspace.g(side);
      each_positive(plan_, block, side, plan_.kernels.block, [g](int64_t, int64_t at) { g[at] = 0; });
    }
    workspace.stopwatch().lap(kSoftmax);
    for (int side = 0; side < block.sides(); ++side) {
      add_products(workspace, packed, block, side);
      workspace.stopwatch().lap(kProducts);
      add_positives(block, side);
      workspace.stopwatch().lap(kSoftmax);
    }
  }

  void columns_done(Workspace& workspace, int64_t column, int columns) override {
    for (int side = 0; side < plan_.sides(); ++side) {
      Tiles& tiles = workspace.right_tiles(side);
      if (tiles.filled) plan_.kernels.add_tiles(tiles.data, columns, plan_.width, right(side).row(column));
      tiles.filled = false;
    }
  }

  void finish(int thread) override {
    const double scale = plan_.problem.scale;
    const double of_x = gx_.finish(plan_.kernels, plan_.schedule.own_rows(thread), scale, passing_);
    const double of_y = gy_.finish(plan_.kernels, plan_.schedule.own_columns(thread), scale, passing_);
    dscale_[thread] = gx_.wanted() ? of_x : of_y;
  }

  double dscale() const { return std::accumulate(dscale_.begin(), dscale_.end(), 0.0); }

 private:
  static const float* log_sum_exp(const PackedStatistics<const float>& statistics, size_t q) {
    return q == 0 ? statistics.log_sum_exp() : statistics.teacher_log_sum_exp(q - 1);
  }

  // The sums that a side's left and right operands take part in (Wanted).
  const Sum& left(int side) const { return side == kDirect ? gx_ : gy_; }
  const Sum& right(int side) const { return side == kDirect ? gy_ : gx_; }

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
      sides[side] = {workspace.dots(0, side), workspace.dots_step(), coefficients(block, side, 0),
                     coefficients(block, side, teacher), workspace.g(side)};
    }
    const Distribution& student = plan_.distributions[0];
    plan_.kernels.mirrored_gradient(sides[kDirect], sides[kMirror], student.factor, student.factor_low, block.rows,
                                    block.columns);
  }

  void add_products(Workspace& workspace, const Packed& packed, const Block& block, int side) const {
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
      kernels.add_product(along_columns, packed.right.right_rows(side, block.column), block.rows, block.columns,
                          plan_.width, left(side).row(block.row));
    }
    if (plan_.wanted.right(side)) {
      Tiles& out = workspace.right_tiles(side);
      kernels.add_transposed_product(along_rows, packed.left.left_rows(side, block.row), block.rows, block.columns,
                                     plan_.width, out.filled, out.data);
      out.filled = true;
    }
  }

  // Before G takes the place of the dots.
  void take_positives(const Workspace& workspace, const Block& block, int side) {
    each_positive(plan_, block, side, workspace.dots_step(), [&](int64_t row, int64_t at) {
      positive_[row] = static_cast<float>(positive_gradient(plan_, in_, workspace, side, row, at));
    });
  }

  void add_positives(const Block& block, int side) const {
    const Problem& problem = plan_.problem;
    each_positive(plan_, block, side, plan_.kernels.block, [&](int64_t row, int64_t) {
      const int64_t column = problem.positive_column[row];
      if (gx_.wanted()) plan_.kernels.add_row(problem.y, column, positive_[row], gx_.row(row));
      if (gy_.wanted()) plan_.kernels.add_row(problem.x, row, positive_[row], gy_.row(column));
    });
  }

  const Plan& plan_;
  const Gradients& in_;
  Sum gx_, gy_;
  bool passing_ = false;
  std::vector<Exponentials> rows_, columns_;
  std::vector<float> positive_;  // of every row that was found
  std::vector<double> dscale_;   // of every thread
};

}  // namespace

bool backward(const Kernels& kernels, const Problem& problem, const Gradients& in, const Threads& threads,
              const Poll& poll, float* kept_data) {
  // The scale's gradient follows from either product.
  const Wanted wanted{in.dx.data != nullptr || (in.dscale != nullptr && in.dy.data == nullptr), in.dy.data != nullptr};
  if (!wanted.any()) return true;
  Kept kept{kept_data};
  if (kept_data != nullptr && !kept.header().fits(kernels)) kept = {};  // of another instruction set
  const int shares = kept.data != nullptr ? kept.header().threads : threads.shares;
  const Plan plan(kernels, problem, {shares, threads.own}, wanted, kept);
  Backward state(plan, in);
  if (!traverse(plan, poll, state)) return false;
  if (in.dscale != nullptr) *in.dscale = static_cast<float>(state.dscale());
  return true;
}

}  // namespace softclip
