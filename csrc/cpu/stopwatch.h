// Where the time of a call goes, for the benchmark: off unless somebody asks, and then some clock reads a block.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

namespace softclip {

enum Part : int {
  kPacking,   // operands into panels
  kProducts,  // of matrices
  kSoftmax,   // exponentials, their sums, G, the positives
  kWaiting,   // for the other threads, also until a thread starts
  kPasses,    // gradients cleared before the first block, scaled and rounded after the last
  kParts
};

// One thread's. Every stretch between two laps counts for one part, so that the parts add up to the whole.
class Stopwatch {
 public:
  using Seconds = std::array<double, kParts>;
  struct Total {
    Seconds seconds{};
    int64_t threads = 0;  // that handed in; of several calls, each time
  };

  Stopwatch() : running_(asked()), last_(running_ ? Clock::now() : Clock::time_point{}) {}

  // What has passed since the last lap, or the beginning, was `part`.
  void lap(Part part) {
    if (!running_) return;
    const auto now = Clock::now();
    seconds_[part] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  void hand_in() const;  // to the process's total

  // From now on calls are measured, or not; the total of all threads and calls until now, which starts anew.
  static Total measure(bool on);

 private:
  using Clock = std::chrono::steady_clock;
  static bool asked();

  bool running_;
  Clock::time_point last_;
  Seconds seconds_{};
};

}  // namespace softclip
