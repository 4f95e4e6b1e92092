// A reduced loss, from the statistics.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace softclip {

// The positives' logits, (count,) or null, and along which element of a direction each of them counts: null: its own.
struct PositiveLogits {
  const float* logit;
  const int64_t* along;
  int64_t count;
};

// The sum over a direction of weight * (mass * log-sum-exp - dot * positive's logit - sum_k mean_k * teacher's mean_k).
double sum_of_losses(const LinearForm& form, const PackedStatistics<const float>& statistics,
                     const PositiveLogits& positives);

}  // namespace softclip
