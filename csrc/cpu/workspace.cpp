#include "workspace.h"

#include <algorithm>

namespace softclip {
namespace {

// Of packed row blocks in a thread and in all: a share of the last-level cache, and the process does not grow with
// threads.
constexpr int64_t kGroupBytes = 10 << 20, kAllGroupsBytes = 20 << 20;
constexpr int64_t kAlignment = 16;  // floats: a cache line

}  // namespace

int64_t Workspace::reserve(int64_t floats) {
  const int64_t offset = floats_;
  floats_ += (floats + kAlignment - 1) / kAlignment * kAlignment;
  return offset;
}

Workspace::Workspace(const Plan& plan) {
  const int block = plan.kernels.block, columns = plan.kernels.tile_columns, sides = plan.sides();
  const Wanted wanted = plan.wanted;
  sides_ = sides;
  area_ = int64_t{block} * block;
  length_ = block;
  dots_step_ = block;
  const bool bf16x2 = plan.products[0].bf16x2;
  rows_step_ = (plan.width + columns - 1) / columns * columns * (bf16x2 ? block / 2 : block);
  int64_t member = 0;  // floats of one row block, all products
  for (const auto& product : plan.products) {
    step_.push_back(plan.multiplies() ? product.summed * block : 0);
    member += step_.back() * sides;
  }
  for (int side = 0; side < sides; ++side) member += wanted.right(side) ? rows_step_ : 0;
  const int64_t rows = plan.schedule.most_rows();
  const int64_t blocks = std::max<int64_t>(1, (rows + block - 1) / block);
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
    dots_.push_back(each_side(plan.kept.data == nullptr ? area_ : 0));
  }
  lines_ = reserve(kLines * length_);
  if (!wanted.any()) return;
  for (int side = 0; side < sides; ++side) {
    left_rows_.side[side] = reserve(wanted.right(side) ? rows_step_ * group_ : 0);
    right_rows_.side[side] = reserve(wanted.left(side) ? rows_step_ : 0);
    tiles_.side[side] = reserve(wanted.right(side) ? (plan.width + columns - 1) / columns * columns * block : 0);
  }
  g_ = plan.gradient_in_place() ? dots_[0] : each_side(area_);
  if (bf16x2) rounded_g_ = reserve(area_);
}

void Workspace::attach(char* memory) {
  memory_ = reinterpret_cast<float*>(memory);
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
