// Packed operands of a call's matrix products (kernels.h): where their panels lie and who packs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace softclip {

constexpr int kCacheLine = 16;  // floats

// Of a block's products: its rows are of the left one, its columns of the right one.
enum Operand : unsigned { kLeft = 1, kRight = 2 };

// Panels of a stretch of the left operand's rows, of the right one's, or (kLeft | kRight) of both, where they are the
// same rows; of every product and side. Blocks begin where the stretch does and every kBlock rows after, and lie one
// after the other in whole register tiles. The gradient's products take either operand in one format, which is packed
// once for both.
class Panels {
 public:
  Panels(const Plan& plan, unsigned operands, int64_t most_rows);
  int64_t floats() const { return floats_; }
  void attach(float* memory) { memory_ = memory; }
  void pack(const Range& rows);  // from now on they are of these; nothing is done where they are already

  // Of a block, by its first row in this operand; `side` as in plan.h.
  float* left(size_t product, int side, int64_t row) const { return at(area(product, side, kLeftPanels), row); }
  float* right(size_t product, int side, int64_t row) const {
    return at(area(product, opposite(side), kRightPanels), row);
  }
  // The same for the gradient's products.
  float* left_rows(int side, int64_t row) const { return at(area(0, side, kRowPanels), row); }
  float* right_rows(int side, int64_t row) const { return at(area(0, opposite(side), kRowPanels), row); }

 private:
  // kRowPanels: transposed, of the student.
  enum Format : int { kLeftPanels, kRightPanels, kRowPanels, kFormats };
  // All panels of one matrix in one format. `matrix`: null where nobody needs them.
  struct Area {
    const Matrix* matrix = nullptr;
    int64_t begin = 0, step = 0;  // floats; from one row, or one element of two rows, to the next
    int values = 1;               // rows in an element
    int tile = 0;                 // rows in a panel; kRowPanels: 0
    bool bf16x2 = false;
  };
  // A product's matrices are its left operands by side: x and y.
  const Area& area(size_t product, int matrix, Format format) const {
    return areas_[(product * kSides + matrix) * kFormats + format];
  }
  Area area_of(const Plan& plan, unsigned operands, size_t product, int matrix, Format format) const;
  float* at(const Area& area, int64_t row) const {
    return memory_ + area.begin + (row - rows_.begin) / area.values * area.step;
  }

  const Kernels* kernels_;
  std::vector<Area> areas_;
  int64_t floats_ = 0;
  float* memory_ = nullptr;
  Range rows_{0, 0};
};

// The panels of all groups of the schedule, packed once into memory that the threads share, where that is little:
// otherwise each thread would pack the same rows anew with every other group that it meets them with.
class SharedPanels {
 public:
  explicit SharedPanels(const Plan& plan);
  bool used() const { return !left_.empty(); }
  size_t bytes() const { return floats_ * sizeof(float); }
  void attach(char* memory);
  void pack(int thread);  // its own groups

  const Panels& left(int group) const { return left_[group]; }
  const Panels& right(int group) const { return right_.empty() ? left_[group] : right_[group]; }

 private:
  const Schedule& schedule_;
  int64_t floats_ = 0;
  std::vector<Panels> left_, right_;  // by group; of both operands in left_ where blocks are visited with their mirrors
};

}  // namespace softclip
