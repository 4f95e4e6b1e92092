#include "linear_form.h"

#include <cmath>

namespace softclip {

double sum_of_losses(const LinearForm& form, const PackedStatistics<const float>& statistics,
                     const PositiveLogits& positives) {
  double total = 0;
  for (int64_t i = 0; i < statistics.length; ++i) {
    const double log_sum_exp = statistics.log_sum_exp()[i];
    double loss = form.segmented && log_sum_exp == -INFINITY ? 0 : form.mass.at(i) * log_sum_exp;
    for (size_t k = 0; k < form.means.size(); ++k) loss -= form.means[k].at(i) * statistics.teacher_mean(k)[i];
    total += form.weight.at(i) * loss;
  }
  for (int64_t i = 0; positives.logit != nullptr && i < positives.count; ++i) {
    const int64_t at = positives.along == nullptr ? i : positives.along[i];
    total -= form.weight.at(at) * form.dot.at(at) * positives.logit[i];
  }
  return total;
}

}  // namespace softclip
