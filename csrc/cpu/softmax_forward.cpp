#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "operations.h"
#include "plan.h"
#include "positives.h"
#include "traversal.h"
#include "workspace.h"

namespace softclip {
namespace {

// Above this a sum of a block is taken again with higher references. Far from float32's end also when multiplied by a
// dot.
constexpr float kLargestSum = 1.152921504606846976e18f;  // 2^60

// Running sums along one direction: true sum = sum * 2^reference. The reference is a whole number, the ceiling of the
// largest exponent when it was last raised, so raising it rescales the sums exactly.
struct Sums {
  explicit Sums(int64_t length) : reference(length, kExcluded), sum(length, 0.0), dot(length, 0.0) {}
  std::vector<float> reference;
  std::vector<double> sum, dot;

  // The references in force; false if one of these rows or columns has seen nothing yet and has none.
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
    if (out.positive_logit != nullptr) std::fill_n(out.positive_logit, plan.rows, 0.0f);
    if (out.row_ranks != nullptr) std::fill_n(out.row_ranks, plan.rows, 0);
    if (out.column_ranks != nullptr) std::fill_n(out.column_ranks, plan.columns, 0);
  }

  void block(Workspace& workspace, const Packed& /*packed*/, const Block& block) override {
    for (int side = 0; side < block.sides(); ++side) {
      for (size_t q = 0; q < plan_.distributions.size(); ++q) {
        if (q != plan_.shares_student) accumulate(workspace, block, side, q);
      }
      take_positives(workspace, block, side);
      if (plan_.problem.row_threshold != nullptr) count(workspace, block, side);
    }
    workspace.stopwatch().lap(kSoftmax);
  }

  void finish() const {
    for (size_t q = 0; q < plan_.distributions.size(); ++q) {
      // The transposed student's rows are the student's columns.
      const bool shared = q == plan_.shares_student;
      write(shared ? columns_[0] : rows_[q], q, out_.rows);
      write(shared ? rows_[0] : columns_[q], q, out_.columns);
    }
  }

  int64_t summed_twice() const { return summed_twice_; }

 private:
  void write(const Sums& sums, size_t q, const PackedStatistics<float>& out) const {
    if (q == 0) return sums.log_sum_exp(out.log_sum_exp());
    sums.log_sum_exp(out.teacher_log_sum_exp(q - 1));
    sums.mean(plan_.problem.scale, out.teacher_mean(q - 1));
  }

  // What a distribution's exponentials are multiplied by before they are summed: for a teacher's mean logits the
  // student's dots. A transposed teacher of the student's scale has the student's column softmax as its row softmax, so
  // its sums are those of the student's exponentials times the opposite side's dots. Null: nobody needs such sums.
  const float* averaged_dots(const Workspace& workspace, int side, size_t q) const {
    if (q > 0) return workspace.dots(0, side);
    return plan_.shares_student ? workspace.dots(0, opposite(side)) : nullptr;
  }

  void accumulate(const Workspace& workspace, const Block& block, int side, size_t q) {
    const Weights w = weights(plan_, workspace, plan_.distributions[q], block, side);
    Sums& rows = (side == kDirect ? rows_ : columns_)[q];
    Sums& columns = (side == kDirect ? columns_ : rows_)[q];
    float *row_reference = workspace.line(kRowReference), *column_reference = workspace.line(kColumnReference);
    const BlockSums sums{row_reference,
                         column_reference,
                         averaged_dots(workspace, side, q),
                         workspace.line(kRowSum),
                         workspace.line(kColumnSum),
                         workspace.line(kRowDot),
                         workspace.line(kColumnDot)};
    // Maxima cost a pass, and references seldom move: take those in force, and look at the sums.
    const bool known = rows.current(block.row, block.rows, row_reference) &
                       columns.current(block.column, block.columns, column_reference);
    if (known) plan_.kernels.accumulate(w, sums);
    if (!known || !moderate(sums.row_sum, block.rows) || !moderate(sums.column_sum, block.columns)) {
      summed_twice_.fetch_add(known ? 1 : 0, std::memory_order_relaxed);
      float *row_maximum = workspace.line(kRowMaximum), *column_maximum = workspace.line(kColumnMaximum);
      plan_.kernels.maxima(w, row_maximum, column_maximum);
      rows.raise(block.row, block.rows, row_maximum, row_reference);
      columns.raise(block.column, block.columns, column_maximum, column_reference);
      plan_.kernels.accumulate(w, sums);
    }
    const bool dots = sums.other != nullptr;
    rows.add(block.row, block.rows, sums.row_sum, dots ? sums.row_dot : nullptr);
    columns.add(block.column, block.columns, sums.column_sum, dots ? sums.column_dot : nullptr);
  }

  void take_positives(const Workspace& workspace, const Block& block, int side) const {
    const float* dots = workspace.dots(0, side);
    each_positive(plan_, block, side, workspace.dots_step(), [&](int64_t row, int64_t at) {
      out_.positive_logit[row] = static_cast<float>(plan_.problem.scale * dots[at]);
    });
  }

  void count(const Workspace& workspace, const Block& block, int side) const {
    const Problem& problem = plan_.problem;
    const float* row_threshold = side == kDirect ? problem.row_threshold : problem.column_threshold;
    const float* column_threshold = side == kDirect ? problem.column_threshold : problem.row_threshold;
    int64_t* row_ranks = side == kDirect ? out_.row_ranks : out_.column_ranks;
    int64_t* column_ranks = side == kDirect ? out_.column_ranks : out_.row_ranks;
    float* threshold = workspace.line(kColumnThreshold);
    float *row_count = workspace.line(kRowCount), *column_count = workspace.line(kColumnCount);
    for (int j = 0; j < block.columns; ++j) threshold[j] = column_threshold[block.column + j];
    const Weights w = weights(plan_, workspace, plan_.distributions[0], block, side);
    plan_.kernels.count_above(w, static_cast<float>(problem.scale), row_threshold + block.row, threshold, row_count,
                              column_count);
    for (int i = 0; i < block.rows; ++i) row_ranks[block.row + i] += static_cast<int64_t>(row_count[i]);
    for (int j = 0; j < block.columns; ++j) column_ranks[block.column + j] += static_cast<int64_t>(column_count[j]);
  }

  const Plan& plan_;
  const Statistics& out_;
  std::vector<Sums> rows_, columns_;
  std::atomic<int64_t> summed_twice_{0};
};

}  // namespace

bool forward(const Kernels& kernels, const Problem& problem, const Statistics& out, const Threads& threads,
             const Poll& poll, int64_t* summed_twice, float* kept) {
  const Plan plan(kernels, problem, threads, {false, false}, {kept});
  if (kept != nullptr)
    plan.kept.header() = {plan.threads.shares, kernels.block, kernels.tile_rows, kernels.tile_columns};
  Forward state(plan, out);
  if (!traverse(plan, poll, state)) return false;
  state.finish();
  *summed_twice = state.summed_twice();
  return true;
}

int64_t kept_floats(const Kernels& kernels, const Problem& problem, const Threads& threads) {
  return Plan(kernels, problem, threads, {false, false}).kept_offsets().back();
}

}  // namespace softclip
