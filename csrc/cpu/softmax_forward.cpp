#include <atomic>
#include <cmath>
#include <vector>

#include "plan.h"

namespace softclip {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
// Of a block, above which it is summed again with higher references. Far from float32's end also when multiplied by a
// dot.
constexpr float kLargestSum = 1.152921504606846976e18f;  // 2^60

// Running sums along one direction: true sum = sum * 2^reference. The reference is a whole number, the ceiling of the
// largest exponent when it was last raised, so raising it rescales the sums exactly.
struct Sums {
  explicit Sums(int64_t length) : reference(length, kExcluded), sum(length, 0.0), dot(length, 0.0) {}
  std::vector<float> reference;
  std::vector<double> sum, dot;

  // The references in force; false where something has seen nothing yet and has none.
  bool current(int64_t begin, int count, float* out) const {
    bool all = true;
    for (int i = 0; i < count; ++i) {
      out[i] = reference[begin + i];
      all &= out[i] > kEmpty;
    }
    return all;
  }

  // Raises references to cover a block's maxima; `current` gets those in force, 0 where nothing was seen.
  void raise(int64_t begin, int count, const float* maximum, float* current) {
    for (int i = 0; i < count; ++i) {
      float& old = reference[begin + i];
      if (maximum[i] > old && maximum[i] > kEmpty) {
        const float raised = std::ceil(maximum[i]);
        const float shift = old - raised;
        const double factor = shift > -2000.0f ? std::ldexp(1.0, static_cast<int>(shift)) : 0.0;
        sum[begin + i] *= factor;
        dot[begin + i] *= factor;
        old = raised;
      }
      current[i] = old > kEmpty ? old : 0.0f;
    }
  }

  void add(int64_t begin, int count, const float* block_sum, const float* block_dot) {
    for (int i = 0; i < count; ++i) sum[begin + i] += block_sum[i];
    for (int i = 0; block_dot != nullptr && i < count; ++i) dot[begin + i] += block_dot[i];
  }

  void log_sum_exp(float* out) const {
    for (size_t i = 0; i < sum.size(); ++i) {
      out[i] = sum[i] == 0.0 ? -INFINITY : static_cast<float>(kLn2 * (reference[i] + std::log2(sum[i])));
    }
  }

  void mean(double scale, float* out) const {
    for (size_t i = 0; i < sum.size(); ++i) out[i] = sum[i] == 0.0 ? 0.0f : static_cast<float>(scale * dot[i] / sum[i]);
  }
};

bool moderate(const float* sums, int count) {
  bool all = true;
  for (int i = 0; i < count; ++i) all &= sums[i] <= kLargestSum;  // false for NaN
  return all;
}

class Forward final : public Visitor {
 public:
  Forward(const Plan& plan, const Statistics& out) : plan_(plan), out_(out) {
    rows_.assign(plan.distributions.size(), Sums(plan.rows));
    columns_.assign(plan.distributions.size(), Sums(plan.columns));
  }

  void block(Workspace& workspace, int, const Block& block) override {
    for (int side = 0; side < (block.both ? 2 : 1); ++side) {
      for (size_t q = 0; q < plan_.distributions.size(); ++q) {
        if (q == 0 || q != plan_.tied) accumulate(workspace, block, side, q);
      }
      take_positives(workspace, block, side);
      if (plan_.problem.row_threshold != nullptr) count(workspace, block, side);
    }
  }

  void finish() const {
    for (size_t q = 0; q < plan_.distributions.size(); ++q) {
      const bool tied = q > 0 && q == plan_.tied;
      const Sums &rows = tied ? columns_[0] : rows_[q], &columns = tied ? rows_[0] : columns_[q];
      const int64_t statistic = q == 0 ? 0 : 2 * static_cast<int64_t>(q) - 1;
      rows.log_sum_exp(out_.rows + statistic * plan_.rows);
      columns.log_sum_exp(out_.columns + statistic * plan_.columns);
      if (q == 0) continue;
      rows.mean(plan_.problem.scale, out_.rows + (statistic + 1) * plan_.rows);
      columns.mean(plan_.problem.scale, out_.columns + (statistic + 1) * plan_.columns);
    }
  }

  int64_t redone() const { return redone_; }

 private:
  void accumulate(const Workspace& workspace, const Block& block, int side, size_t q) {
    const Weights w = weights(plan_, workspace, plan_.distributions[q], block, side);
    Sums& rows = (side == 0 ? rows_ : columns_)[q];
    Sums& columns = (side == 0 ? columns_ : rows_)[q];
    // A teacher's means are those of the student's dots. The tied teacher's come from the student's own exponentials,
    // which are its on the other side.
    const bool dots = q > 0 || plan_.tied > 0;
    float *row_reference = workspace.line(3), *column_reference = workspace.line(4);
    const BlockSums sums{row_reference, column_reference, dots ? workspace.dots(0, q > 0 ? side : 1 - side) : nullptr,
                         workspace.line(5), workspace.line(6), workspace.line(7), workspace.line(8)};
    // Maxima cost a pass, and references seldom move: take those in force, and look at the sums.
    const bool known = rows.current(block.row, block.rows, row_reference) &
                       columns.current(block.column, block.columns, column_reference);
    if (known) plan_.kernels.accumulate(w, sums);
    if (!known || !moderate(sums.row_sum, block.rows) || !moderate(sums.column_sum, block.columns)) {
      redone_.fetch_add(known ? 1 : 0, std::memory_order_relaxed);
      float *row_maximum = workspace.line(9), *column_maximum = workspace.line(10);
      plan_.kernels.maxima(w, row_maximum, column_maximum);
      rows.raise(block.row, block.rows, row_maximum, row_reference);
      columns.raise(block.column, block.columns, column_maximum, column_reference);
      plan_.kernels.accumulate(w, sums);
    }
    rows.add(block.row, block.rows, sums.row_sum, dots ? sums.row_dot : nullptr);
    columns.add(block.column, block.columns, sums.column_sum, dots ? sums.column_dot : nullptr);
  }

  void take_positives(const Workspace& workspace, const Block& block, int side) const {
    const int64_t* positive = plan_.problem.positive;
    if (positive == nullptr) return;
    const float* dots = workspace.dots(0, side);
    const int64_t length = plan_.kernels.block, row = block.row, column = block.column;
    const auto logit = [&](int64_t at) { return static_cast<float>(plan_.problem.scale * dots[at]); };
    if (side == 0) {
      for (int64_t i = 0; i < block.rows; ++i) {
        const int64_t j = positive[row + i] - column;
        if (j >= 0 && j < block.columns) out_.positive[row + i] = logit(i * length + j);
      }
      return;
    }
    for (int64_t j = 0; j < block.columns; ++j) {
      const int64_t i = positive[column + j] - row;
      if (i >= 0 && i < block.rows) out_.positive[column + j] = logit(i * length + j);
    }
  }

  void count(const Workspace& workspace, const Block& block, int side) const {
    const Problem& problem = plan_.problem;
    const float* row_threshold = side == 0 ? problem.row_threshold : problem.column_threshold;
    const float* column_threshold = side == 0 ? problem.column_threshold : problem.row_threshold;
    int64_t* row_ranks = side == 0 ? out_.row_ranks : out_.column_ranks;
    int64_t* column_ranks = side == 0 ? out_.column_ranks : out_.row_ranks;
    float* threshold = workspace.line(3);
    for (int j = 0; j < block.columns; ++j) threshold[j] = column_threshold[block.column + j];
    const Weights w = weights(plan_, workspace, plan_.distributions[0], block, side);
    plan_.kernels.count_above(w, static_cast<float>(problem.scale), row_threshold + block.row, threshold,
                              workspace.line(4), workspace.line(5));
    const float *row_count = workspace.line(4), *column_count = workspace.line(5);
    for (int i = 0; i < block.rows; ++i) row_ranks[block.row + i] += static_cast<int64_t>(row_count[i]);
    for (int j = 0; j < block.columns; ++j) column_ranks[block.column + j] += static_cast<int64_t>(column_count[j]);
  }

  const Plan& plan_;
  const Statistics& out_;
  std::vector<Sums> rows_, columns_;
  std::atomic<int64_t> redone_{0};
};

}  // namespace

bool forward(const Kernels& kernels, const Problem& problem, const Statistics& out, int threads,
             const std::function<bool()>& poll, int64_t* redone) {
  const Plan plan(kernels, problem, threads, {false, false});
  Forward state(plan, out);
  if (!run(plan, poll, state)) return false;
  state.finish();
  *redone = state.redone();
  return true;
}

}  // namespace softclip
