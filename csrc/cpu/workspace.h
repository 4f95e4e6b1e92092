// The memory that each thread works in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "panels.h"
#include "plan.h"
#include "stopwatch.h"

namespace softclip {

// Scratch vectors of (kBlock,) each.
enum Line : int {
  // of weights()
  kColumnExponent,
  kColumnFactor,
  kColumnSegment,
  // of a forward's sums
  kRowReference,
  kColumnReference,
  kRowSum,
  kColumnSum,
  kRowDot,
  kColumnDot,
  kRowMaximum,
  kColumnMaximum,
  kLines,
  // of a forward's counts, which come when the block's sums are done
  kColumnThreshold = kColumnReference,
  kRowCount = kRowSum,
  kColumnCount = kColumnSum,
};

// The sum of one operand's gradient over the row blocks of a group, in the tiles of kernels.h. `filled`: it holds
// something.
struct Tiles {
  float* data = nullptr;
  bool filled = false;
};

// One thread's memory: panels of a group of row blocks and of one column block, unless panels are shared; dots, G, and
// scratch. What it holds at first is undefined.
class Workspace {
 public:
  Workspace(const Plan& plan, bool own_panels);
  size_t bytes() const { return floats_ * sizeof(float); }
  int group() const { return group_; }  // how many row blocks share one packed column block
  void attach(char* memory);

  Panels& left() { return left_; }
  Panels& right() { return right_; }
  Tiles& right_tiles(int side) { return right_tiles_[side]; }  // G^T . left rows, by side
  float* dots(size_t product, int side) const {
    return kept_ != nullptr ? kept_ + (static_cast<int64_t>(product) * sides_ + side) * kept_area_
                            : memory_ + dots_[product][side];
  }
  int64_t dots_step() const { return dots_step_; }  // floats from one row of dots to the next
  // From now on dots lie where this block has its place among those of a job.
  void use_kept(float* of_job, const KeptBlock& block) {
    kept_ = of_job + block.begin;
    kept_area_ = block.area;
    dots_step_ = block.step;
  }
  float* g(int side) const { return memory_ + g_[side]; }
  // G in bf16x2, for one side after the other.
  float* g_along_columns() const { return memory_ + rounded_g_; }
  float* g_along_rows() const { return g_along_columns() + area_ / 2; }
  float* line(Line line) const { return memory_ + lines_ + line * length_; }
  // Of the thread that works in it.
  Stopwatch& stopwatch() { return *stopwatch_; }
  void measure_by(Stopwatch& stopwatch) { stopwatch_ = &stopwatch; }

 private:
  struct Offsets {
    int64_t side[kSides];
    int64_t operator[](int index) const { return side[index]; }
  };
  int64_t reserve(int64_t floats);
  int64_t floats_ = 0, area_, length_, lines_ = 0, rounded_g_ = 0;
  int group_, sides_;
  Panels left_, right_;
  std::vector<Offsets> dots_;
  Offsets tiles_{}, g_{};
  Tiles right_tiles_[kSides];
  Stopwatch* stopwatch_ = nullptr;
  float* memory_ = nullptr;
  float* kept_ = nullptr;
  int64_t kept_area_ = 0, dots_step_;
};

// The distribution's weights on one side of a block; their columns' part lies in lines of the workspace.
Weights weights(const Plan&, const Workspace&, const Distribution&, const Block&, int side);

}  // namespace softclip
