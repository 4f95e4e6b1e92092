#include "plan.h"

#include <algorithm>
#include <cmath>

#include "team.h"

namespace softclip {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLongCall = 1e9;       // multiply-adds: about 20 ms of one core
// Of packed row blocks in a thread and in all: a share of the last-level cache, and the process does not grow with
// threads.
constexpr int64_t kGroupBytes = 10 << 20, kAllGroupsBytes = 20 << 20;
constexpr size_t kKeptBytes = 16 << 20;    // of workspaces, from one call to the next
constexpr int64_t kAlignment = 16;        // floats: a cache line

bool any_transposed(const Problem& problem) {
  return std::any_of(problem.teachers.begin(), problem.teachers.end(),
                     [](const Teacher& teacher) { return teacher.source == Source::transposed; });
}

double multiply_adds(const Problem& problem) {
  double width = static_cast<double>(problem.x.width);
  for (const auto& teacher : problem.teachers) width += static_cast<double>(teacher.x.width);
  return static_cast<double>(problem.x.rows) * static_cast<double>(problem.y.rows) * (width + 16);
}

// Every thread needs a row and a column of its own, or two where sides are paired.
int useful_threads(const Problem& problem, int threads, bool paired) {
  const int64_t most = std::max<int64_t>(1, std::min(problem.x.rows, problem.y.rows) / (paired ? 2 : 1));
  return static_cast<int>(std::min<int64_t>(threads, most));
}

Product product_of(const Kernels& kernels, const Matrix& x, const Matrix& y) {
  const bool pairs = kernels.bfloat16 && x.dtype == Dtype::bfloat16 && y.dtype == Dtype::bfloat16;
  return {{x, y}, {y, x}, pairs, pairs ? (x.width + 1) / 2 : x.width};
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

}  // namespace

Plan::Plan(const Kernels& kernels_in, const Problem& problem_in, int threads_in, Wanted wanted_in)
    : kernels(kernels_in), problem(problem_in), rows(problem.x.rows), columns(problem.y.rows), width(problem.x.width),
      wanted(wanted_in), paired(any_transposed(problem)), threads(useful_threads(problem, threads_in, paired)),
      schedule(rows, columns, threads, paired), long_call(multiply_adds(problem) > kLongCall) {
  const auto distribution = [](int product, bool swapped, double scale) {
    const double factor = scale * kLog2E;
    const float high = static_cast<float>(factor);
    return Distribution{product, swapped, high, static_cast<float>(factor - high), false, {}, {}};
  };
  products.push_back(product_of(kernels, problem.x, problem.y));
  distributions.push_back(distribution(0, false, problem.scale));
  for (const auto& teacher : problem.teachers) {
    const bool own = teacher.source == Source::embeddings;
    if (own) products.push_back(product_of(kernels, teacher.x, teacher.y));
    distributions.push_back(distribution(own ? static_cast<int>(products.size()) - 1 : 0,
                                         teacher.source == Source::transposed,
                                         own ? teacher.scale : teacher.scale * problem.scale));
    if (teacher.row_bias == nullptr && teacher.column_bias == nullptr) {
      const bool same = distributions.back().swapped && teacher.scale == 1 && problem.row_segment == nullptr;
      if (same && tied == 0) tied = distributions.size() - 1;
      continue;
    }
    distributions.back().biased = true;
    distributions.back().row_bias = bias_of(teacher.row_bias, rows, kernels.block);
    distributions.back().column_bias = bias_of(teacher.column_bias, columns, kernels.block);
  }
}

int64_t Workspace::reserve(int64_t floats) {
  const int64_t offset = floats_;
  floats_ += (floats + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

Workspace::Workspace(const Plan& plan) {
  const int block = plan.kernels.block, columns = plan.kernels.tile_columns, sides = plan.sides();
  const Wanted wanted = plan.wanted;
  area_ = int64_t{block} * block;
  line_ = block;
  const bool pairs = plan.products[0].pairs;
  rows_step_ = (plan.width + columns - 1) / columns * columns * (pairs ? block / 2 : block);
  int64_t member = 0;  // floats of one row block, all products
  for (const auto& product : plan.products) {
    step_.push_back(product.summed * block);
    member += step_.back() * sides;
  }
  for (int side = 0; side < sides; ++side) member += wanted.right(side) ? rows_step_ : 0;
  const int64_t blocks = std::max<int64_t>(1, (plan.rows + block - 1) / block);
  const int64_t budget = std::min(kGroupBytes, kAllGroupsBytes / plan.threads) / static_cast<int64_t>(sizeof(float));
  group_ = static_cast<int>(std::clamp<int64_t>(budget / std::max<int64_t>(member, 1), 1, blocks));
  const auto each_side = [&](int64_t floats) {
    Offsets offsets{};
    for (int side = 0; side < sides; ++side) offsets.side[side] = reserve(floats);
    return offsets;
  };
  for (size_t p = 0; p < plan.products.size(); ++p) {
    left_.push_back(each_side(step_[p] * group_));
    right_.push_back(each_side(step_[p]));
    dots_.push_back(each_side(area_));
  }
  lines_ = reserve(kLines * line_);
  if (!wanted.any()) return;
  for (int side = 0; side < sides; ++side) {
    left_rows_.side[side] = reserve(wanted.right(side) ? rows_step_ * group_ : 0);
    right_rows_.side[side] = reserve(wanted.left(side) ? rows_step_ : 0);
    tiles_.side[side] = reserve(wanted.right(side) ? (plan.width + columns - 1) / columns * columns * block : 0);
  }
  g_ = plan.gradient_in_place() ? dots_[0] : each_side(area_);
  if (pairs) pairs_ = reserve(area_);
}

void Workspace::attach(char* memory) {
  memory_ = reinterpret_cast<float*>(memory);
  for (int side = 0; side < kSides; ++side) right_tiles_[side].data = memory_ + tiles_[side];
}

Weights weights(const Plan& plan, const Workspace& workspace, const Distribution& distribution, const Block& block,
                int side) {
  const int length = plan.kernels.block;
  // Biases by the side's own rows and columns.
  const Bias& row_bias = side == 0 ? distribution.row_bias : distribution.column_bias;
  const Bias& column_bias = side == 0 ? distribution.column_bias : distribution.row_bias;
  Weights result{};
  result.dots = workspace.dots(distribution.product, distribution.swapped ? 1 - side : side);
  result.factor = distribution.factor;
  result.factor_low = distribution.factor_low;
  result.rows = block.rows;
  result.columns = block.columns;
  float* exponent = workspace.line(0);
  for (int j = 0; j < length; ++j) {
    exponent[j] = j >= block.columns ? kExcluded : distribution.biased ? column_bias.exponent[block.column + j] : 0.0f;
  }
  result.column_exponent = exponent;
  if (distribution.biased) {
    float* factor = workspace.line(1);
    std::copy_n(column_bias.factor.data() + block.column, block.columns, factor);
    std::fill(factor + block.columns, factor + length, 1.0f);  // multiplied by 0: it must be finite
    result.column_factor = factor;
    result.row_exponent = row_bias.exponent.data() + block.row;
    result.row_factor = row_bias.factor.data() + block.row;
  }
  if (plan.problem.row_segment != nullptr) {
    const int32_t* row_segment = side == 0 ? plan.problem.row_segment : plan.problem.column_segment;
    const int32_t* column_segment = side == 0 ? plan.problem.column_segment : plan.problem.row_segment;
    auto* segment = reinterpret_cast<int32_t*>(workspace.line(2));
    std::copy_n(column_segment + block.column, block.columns, segment);
    result.row_segment = row_segment + block.row;
    result.column_segment = segment;
  }
  return result;
}

namespace {

void transpose(const float* from, float* to, int length) {
  constexpr int kPatch = 16;  // square patches of whole cache lines
  for (int i = 0; i < length; i += kPatch) {
    for (int j = 0; j < length; j += kPatch) {
      for (int k = i; k < i + kPatch && k < length; ++k) {
        for (int m = j; m < j + kPatch && m < length; ++m) to[int64_t{k} * length + m] = from[int64_t{m} * length + k];
      }
    }
  }
}

class Runner {
 public:
  Runner(const Plan& plan, Workspace& workspace, Visitor& visitor, const Team& team)
      : plan_(plan), workspace_(workspace), visitor_(visitor), team_(team) {}

  void job(const Job& job) const {
    const int64_t block = plan_.kernels.block, group = block * workspace_.group();
    for (int64_t first = job.row_begin; first < job.row_end; first += group) {
      const int64_t last = std::min(first + group, job.row_end);
      for (int64_t row = first; row < last; row += block) pack_rows(row, size(row, last), member(row, first));
      for (int64_t column = job.triangle ? first : job.column_begin; column < job.column_end; column += block) {
        const int columns = size(column, job.column_end);
        pack_columns(column, columns);
        for (int64_t row = first; row < last && !(job.triangle && row > column); row += block) {
          if (team_.cancelled()) return;
          const bool diagonal = job.triangle && row == column;
          visit(member(row, first), {row, column, size(row, last), columns, plan_.paired && !diagonal});
        }
        visitor_.columns_done(workspace_, column, columns);
      }
    }
  }

 private:
  int size(int64_t begin, int64_t end) const {
    return static_cast<int>(std::min<int64_t>(plan_.kernels.block, end - begin));
  }
  int member(int64_t row, int64_t first) const { return static_cast<int>((row - first) / plan_.kernels.block); }

  void pack_rows(int64_t row, int rows, int member) const {
    const Kernels& kernels = plan_.kernels;
    for (int side = 0; side < plan_.sides(); ++side) {
      for (size_t p = 0; p < plan_.products.size(); ++p) {
        const Product& product = plan_.products[p];
        kernels.pack(product.left[side], row, rows, kernels.tile_rows, product.pairs, workspace_.left(p, side, member));
      }
      if (!plan_.wanted.right(side)) continue;
      const Product& student = plan_.products[0];
      kernels.pack_transposed(student.left[side], row, rows, student.pairs, workspace_.left_rows(side, member));
    }
  }

  void pack_columns(int64_t column, int columns) const {
    const Kernels& kernels = plan_.kernels;
    for (int side = 0; side < plan_.sides(); ++side) {
      for (size_t p = 0; p < plan_.products.size(); ++p) {
        const Product& product = plan_.products[p];
        kernels.pack(product.right[side], column, columns, kernels.tile_columns, product.pairs,
                     workspace_.right(p, side));
      }
      if (!plan_.wanted.left(side)) continue;
      const Product& student = plan_.products[0];
      kernels.pack_transposed(student.right[side], column, columns, student.pairs, workspace_.right_rows(side));
    }
  }

  void visit(int member, const Block& block) const {
    for (int side = 0; side < plan_.sides(); ++side) {
      for (size_t p = 0; p < plan_.products.size(); ++p) {
        const Product& product = plan_.products[p];
        if (side == 1 && !block.both) {  // on the diagonal the other side is this one, transposed
          transpose(workspace_.dots(p, 0), workspace_.dots(p, 1), plan_.kernels.block);
          continue;
        }
        plan_.kernels.multiply(workspace_.left(p, side, member), workspace_.right(p, side), product.summed, block.rows,
                               block.columns, product.pairs, workspace_.dots(p, side));
      }
    }
    visitor_.block(workspace_, member, block);
  }

  const Plan& plan_;
  Workspace& workspace_;
  Visitor& visitor_;
  const Team& team_;
};

}  // namespace

bool run(const Plan& plan, const std::function<bool()>& poll, Visitor& visitor) {
  std::vector<Workspace> workspaces(plan.threads, Workspace(plan));
  constexpr size_t kApart = 4096;  // no two threads' memory in one page
  const size_t each = (workspaces[0].bytes() + kApart - 1) / kApart * kApart;
  const Scratch scratch(each * workspaces.size(), kKeptBytes);
  char* memory = scratch.data();
  for (Workspace& workspace : workspaces) {
    workspace.attach(memory);
    memory += each;
  }
  Team team(plan.threads, poll);
  team.run(
      [&](int thread) {
        const FlushDenormals flush;
        const Runner runner(plan, workspaces[thread], visitor, team);
        for (int round = 0; round < plan.schedule.rounds(); ++round) {
          for (const Job& job : plan.schedule.jobs(round, thread)) runner.job(job);
          team.wait();
        }
      },
      plan.long_call);
  return !team.cancelled();
}

}  // namespace softclip
