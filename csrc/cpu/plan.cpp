#include "plan.h"

#include <algorithm>
#include <cmath>

namespace softclip {
namespace {

bool any_transposed(const Problem& problem) {
  return std::any_of(problem.teachers.begin(), problem.teachers.end(),
                     [](const Teacher& teacher) { return teacher.source == Source::transposed; });
}

// Every thread needs a row and a column of its own, or two where blocks are visited with their mirrors.
Threads useful_threads(const Problem& problem, const Threads& threads, bool mirrored) {
  const int64_t most = std::max<int64_t>(1, std::min(problem.x.rows, problem.y.rows) / (mirrored ? 2 : 1));
  return {static_cast<int>(std::min<int64_t>(threads.shares, most)), threads.own};
}

Product product_of(const Kernels& kernels, const Matrix& x, const Matrix& y) {
  const bool bf16x2 = kernels.has_bf16x2() && x.dtype == Dtype::bfloat16 && y.dtype == Dtype::bfloat16;
  return {{x, y}, {y, x}, bf16x2, bf16x2 ? (x.width + 1) / 2 : x.width};
}

Bias bias_of(const float* bias, int64_t length, int block) {
  Bias result{std::vector<float>(length + block, 0.0f), std::vector<float>(length + block, 1.0f)};
  for (int64_t i = 0; bias != nullptr && i < length; ++i) {
    const double exponent = bias[i] * kLog2E, whole = std::nearbyint(exponent);
    const bool excluded = exponent == -INFINITY;
    result.exponent[i] = excluded ? kExcluded : static_cast<float>(whole);
    result.factor[i] = excluded ? 1.0f : static_cast<float>(std::exp2(exponent - whole));
  }
  return result;
}

Distribution unbiased(int product, bool transposed, double scale) {
  const double factor = scale * kLog2E;
  const float high = static_cast<float>(factor);
  return {product, transposed, high, static_cast<float>(factor - high), false, {}, {}};
}

}  // namespace

int64_t whole_tiles(int64_t length, int tile) { return (length + tile - 1) / tile * tile; }

Plan::Plan(const Kernels& kernels_in, const Problem& problem_in, const Threads& threads_in, Wanted wanted_in,
           Kept kept_in)
    : kernels(kernels_in),
      problem(problem_in),
      rows(problem.x.rows),
      columns(problem.y.rows),
      width(problem.x.width),
      wanted(wanted_in),
      mirrored(any_transposed(problem)),
      threads(useful_threads(problem, threads_in, mirrored)),
      schedule(rows, columns, threads.shares, mirrored),
      kept(kept_in) {
  products.push_back(product_of(kernels, problem.x, problem.y));
  distributions.push_back(unbiased(0, false, problem.scale));
  for (const auto& teacher : problem.teachers) {
    const bool transposed = teacher.source == Source::transposed;
    if (teacher.source == Source::embeddings) {
      products.push_back(product_of(kernels, teacher.x, teacher.y));
      distributions.push_back(unbiased(static_cast<int>(products.size()) - 1, false, teacher.scale));
    } else {
      distributions.push_back(unbiased(0, transposed, teacher.scale * problem.scale));
    }
    if (teacher.row_bias == nullptr && teacher.column_bias == nullptr) {
      const bool same = transposed && teacher.scale == 1 && problem.row_segment == nullptr;
      if (same && !shares_student) shares_student = distributions.size() - 1;
      continue;
    }
    distributions.back().biased = true;
    distributions.back().row_bias = bias_of(teacher.row_bias, rows, kernels.block);
    distributions.back().column_bias = bias_of(teacher.column_bias, columns, kernels.block);
  }
}

// The mirror of a block, which is laid out transposed, has the same shape.
KeptBlock Plan::kept_block(const Job& job, const Block& block) const {
  const int64_t rows = whole_tiles(block.rows, kernels.tile_rows);
  const int64_t step = whole_tiles(block.columns, kernels.tile_columns);
  const int64_t before = block.column - job.first_column(block.row);  // whole blocks, and so whole tiles
  return {kept_floats_above(job, block.row) + rows * before * kept_areas(), rows * step, step};
}

int64_t Plan::kept_floats_above(const Job& job, int64_t row) const {
  int64_t floats = 0;
  for (int64_t above = job.row_begin; above < row; above += kernels.block) {
    const int64_t rows = std::min<int64_t>(kernels.block, job.row_end - above);
    const int64_t columns = job.column_end - job.first_column(above);
    floats += whole_tiles(rows, kernels.tile_rows) * whole_tiles(columns, kernels.tile_columns);
  }
  return floats * kept_areas();
}

std::vector<int64_t> Plan::kept_offsets() const {
  std::vector<int64_t> offsets{Kept::kHeaderFloats};
  for (int round = 0; round < schedule.rounds(); ++round) {
    for (int thread = 0; thread < threads.shares; ++thread) {
      int64_t end = offsets.back();
      for (const Job& job : schedule.jobs(round, thread)) end += kept_floats_above(job, job.row_end);
      offsets.push_back(end);
    }
  }
  return offsets;
}

}  // namespace softclip
