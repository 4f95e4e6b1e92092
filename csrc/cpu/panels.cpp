#include "panels.h"

#include <algorithm>

namespace softclip {
namespace {

// Of all panels that threads share. With the logits that a small problem keeps (plan.h), and workspaces, that is less
// than the 32 MiB that the library promises.
constexpr int64_t kSharedBytes = 9 << 20;

}  // namespace

Panels::Panels(const Plan& plan, unsigned operands, int64_t most_rows) : kernels_(&plan.kernels) {
  for (size_t product = 0; product < plan.products.size(); ++product) {
    for (int matrix = 0; matrix < kSides; ++matrix) {
      for (const Format format : {kLeftPanels, kRightPanels, kRowPanels}) {
        Area area = area_of(plan, operands, product, matrix, format);
        area.begin = floats_;
        if (area.matrix != nullptr) {
          const int64_t elements = whole_tiles(most_rows, std::max(area.tile, area.values)) / area.values;
          floats_ += whole_tiles(elements * area.step, kCacheLine);
        }
        areas_.push_back(area);
      }
    }
  }
}

Panels::Area Panels::area_of(const Plan& plan, unsigned operands, size_t p, int matrix, Format format) const {
  const Product& product = plan.products[p];
  // Of which operand a side has this matrix.
  const bool left = (operands & kLeft) != 0 && matrix < plan.sides();
  const bool right = (operands & kRight) != 0 && opposite(matrix) < plan.sides();
  Area area;
  area.bf16x2 = product.bf16x2;
  if (format == kRowPanels) {
    area.step = whole_tiles(plan.width, plan.kernels.tile_columns);
    area.values = product.bf16x2 ? 2 : 1;
    // The gradient of one operand is a product with the other.
    if (p == 0 && (left || right) && plan.wanted.right(matrix)) area.matrix = &product.left[matrix];
    return area;
  }
  area.step = product.summed;
  area.tile = format == kLeftPanels ? plan.kernels.tile_rows : plan.kernels.tile_columns;
  if (plan.multiplies() && (format == kLeftPanels ? left : right)) area.matrix = &product.left[matrix];
  return area;
}

void Panels::pack(const Range& rows) {
  if (rows.begin == rows_.begin && rows.end == rows_.end) return;
  rows_ = rows;
  for (int64_t row = rows.begin; row < rows.end; row += kernels_->block) {
    const int count = static_cast<int>(std::min<int64_t>(kernels_->block, rows.end - row));
    for (const Area& area : areas_) {
      if (area.matrix == nullptr) continue;
      if (area.tile > 0) {
        kernels_->pack(*area.matrix, row, count, area.tile, area.bf16x2, at(area, row));
      } else {
        kernels_->pack_transposed(*area.matrix, row, count, area.bf16x2, at(area, row));
      }
    }
  }
}

SharedPanels::SharedPanels(const Plan& plan) : schedule_(plan.schedule) {
  const Panels left(plan, plan.mirrored ? kLeft | kRight : kLeft, schedule_.most_rows());
  const Panels right(plan, kRight, plan.mirrored ? 0 : schedule_.most_columns());
  const int64_t floats = schedule_.groups() * (left.floats() + right.floats());
  if (floats * static_cast<int64_t>(sizeof(float)) > kSharedBytes) return;
  floats_ = floats;
  left_.assign(schedule_.groups(), left);
  if (!plan.mirrored) right_.assign(schedule_.groups(), right);
}

void SharedPanels::attach(char* memory) {
  float* next = reinterpret_cast<float*>(memory);
  for (auto* panels : {&left_, &right_}) {
    for (Panels& of_group : *panels) {
      of_group.attach(next);
      next += of_group.floats();
    }
  }
}

void SharedPanels::pack(int thread) {
  if (!used()) return;
  const Range own = schedule_.own_groups(thread);
  for (int64_t group = own.begin; group < own.end; ++group) {
    left_[group].pack(schedule_.rows(static_cast<int>(group)));
    if (!right_.empty()) right_[group].pack(schedule_.columns(static_cast<int>(group)));
  }
}

}  // namespace softclip
