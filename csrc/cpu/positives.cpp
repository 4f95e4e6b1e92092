#include "positives.h"

#include <cmath>

namespace softclip {
namespace {

// softclip_kernels/positives.py is the reference.
double teacher_logit(const Plan& plan, const Workspace& workspace, size_t teacher, int side, int64_t at, double z) {
  const Distribution& distribution = plan.distributions[1 + teacher];
  const double scale = plan.problem.teachers[teacher].scale;
  switch (plan.problem.teachers[teacher].source) {
    case Source::embeddings:
      return scale * workspace.dots(distribution.product, side)[at];
    case Source::transposed: {
      // As a difference, so that a positive on the diagonal has bit for bit the student's logit.
      const double swapped = workspace.dots(0, opposite(side))[at], own = workspace.dots(0, side)[at];
      return scale * (z + plan.problem.scale * (swapped - own));
    }
    default:
      return scale * z;
  }
}

double probability(double logit, float log_sum_exp) { return logit == -INFINITY ? 0 : std::exp(logit - log_sum_exp); }

double with_bias(double logit, const float* bias, int64_t i) { return bias == nullptr ? logit : logit + bias[i]; }

}  // namespace

// In double precision, where p - 1 keeps the digits that p has in single.
double positive_gradient(const Plan& plan, const Gradients& in, const Workspace& workspace, int side, int64_t row,
                         int64_t at) {
  const Problem& problem = plan.problem;
  const int64_t column = problem.positive_column[row];
  double total = in.row_form.positive_gradient(row) + in.column_form.positive_gradient(column);
  if (problem.row_segment != nullptr && problem.row_segment[row] != problem.column_segment[column]) return total;
  const double z = in.positive_logit[row];
  total += in.row_form.gradient(0, row) * probability(z, in.rows.log_sum_exp()[row]);
  total += in.column_form.gradient(0, column) * probability(z, in.columns.log_sum_exp()[column]);
  for (size_t k = 0; k < problem.teachers.size(); ++k) {
    const Teacher& teacher = problem.teachers[k];
    const double t = teacher_logit(plan, workspace, k, side, at, z);
    const double along_row = with_bias(t, teacher.column_bias, column);
    const double along_column = with_bias(t, teacher.row_bias, row);
    total += in.row_form.gradient(1 + k, row) * probability(along_row, in.rows.teacher_log_sum_exp(k)[row]);
    total +=
        in.column_form.gradient(1 + k, column) * probability(along_column, in.columns.teacher_log_sum_exp(k)[column]);
  }
  return total;
}

}  // namespace softclip
