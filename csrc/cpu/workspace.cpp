#include "workspace.h"

#include <algorithm>

namespace softclip {
namespace {

// Of packed row blocks in a thread and in all: a share of the last-level cache, and the process does not grow with
// threads.
constexpr int64_t kGroupBytes = 10 << 20, kAllGroupsBytes = 20 << 20;

// How many row blocks of a thread's share that is.
int group_of(const Plan& plan) {
  const int block = plan.kernels.block;
  const int64_t blocks = std::max<int64_t>(1, (plan.schedule.most_rows() + block - 1) / block);
  const int64_t budget =
      std::min(kGroupBytes, kAllGroupsBytes / plan.threads.shares) / static_cast<int64_t>(sizeof(float));
  const int64_t member = std::max<int64_t>(1, Panels(plan, kLeft, block).floats());
  return static_cast<int>(std::clamp<int64_t>(budget / member, 1, blocks));
}

}  // namespace

int64_t Workspace::reserve(int64_t floats) {
  const int64_t offset = floats_;
  floats_ += whole_tiles(floats, kCacheLine);
  return offset;
}

Workspace::Workspace(const Plan& plan, bool own_panels)
    : area_(int64_t{plan.kernels.block} * plan.kernels.block),
      length_(plan.kernels.block),
      group_(group_of(plan)),
      sides_(plan.sides()),
      left_(plan, kLeft, own_panels ? group_ * length_ : 0),
      right_(plan, kRight, own_panels ? length_ : 0),
      dots_step_(length_) {
  const Wanted wanted = plan.wanted;
  const auto each_side = [&](int64_t floats) {
    Offsets offsets{};
    for (int side = 0; side < sides_; ++side) offsets.side[side] = reserve(floats);
    return offsets;
  };
  reserve(left_.floats() + right_.floats());
  for (size_t p = 0; p < plan.products.size(); ++p) dots_.push_back(each_side(plan.kept.data == nullptr ? area_ : 0));
  lines_ = reserve(kLines * length_);
  if (!wanted.any()) return;
  const int64_t tiles = whole_tiles(plan.width, plan.kernels.tile_columns) * length_;
  for (int side = 0; side < sides_; ++side) tiles_.side[side] = reserve(wanted.right(side) ? tiles : 0);
  g_ = plan.gradient_in_place() ? dots_[0] : each_side(area_);
  if (plan.products[0].bf16x2) rounded_g_ = reserve(area_);
}

void Workspace::attach(char* memory) {
  memory_ = reinterpret_cast<float*>(memory);
  left_.attach(memory_);
  right_.attach(memory_ + left_.floats());
  for (int side = 0; side < kSides; ++side) right_tiles_[side].data = memory_ + tiles_[side];
}

Weights weights(const Plan& plan, const Workspace& workspace, const Distribution& distribution, const Block& block,
                int side) {
  const int length = plan.kernels.block;
  // By the side's own rows and columns.
  const bool direct = side == kDirect;
  const Bias& row_bias = direct ? distribution.row_bias : distribution.column_bias;
  const Bias& column_bias = direct ? distribution.column_bias : distribution.row_bias;
  Weights result{};
  result.dots = workspace.dots(distribution.product, distribution.transposed ? opposite(side) : side);
  result.dots_step = workspace.dots_step();
  result.factor = distribution.factor;
  result.factor_low = distribution.factor_low;
  result.rows = block.rows;
  result.columns = block.columns;
  float* exponent = workspace.line(kColumnExponent);
  for (int j = 0; j < length; ++j) {
    exponent[j] = j >= block.columns ? kExcluded : distribution.biased ? column_bias.exponent[block.column + j] : 0.0f;
  }
  result.column_exponent = exponent;
  if (distribution.biased) {
    float* factor = workspace.line(kColumnFactor);
    std::copy_n(column_bias.factor.data() + block.column, block.columns, factor);
    std::fill(factor + block.columns, factor + length, 1.0f);  // multiplied by 0: it must be finite
    result.column_factor = factor;
    result.row_exponent = row_bias.exponent.data() + block.row;
    result.row_factor = row_bias.factor.data() + block.row;
  }
  if (plan.problem.row_segment != nullptr) {
    const int32_t* row_segment = direct ? plan.problem.row_segment : plan.problem.column_segment;
    const int32_t* column_segment = direct ? plan.problem.column_segment : plan.problem.row_segment;
    auto* segment = reinterpret_cast<int32_t*>(workspace.line(kColumnSegment));
    std::copy_n(column_segment + block.column, block.columns, segment);
    result.row_segment = row_segment + block.row;
    result.column_segment = segment;
  }
  return result;
}

}  // namespace softclip
