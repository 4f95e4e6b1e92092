#include "stopwatch.h"

#include <atomic>
#include <mutex>

namespace softclip {
namespace {

std::atomic<bool> asked_for{false};
std::mutex mutex;
Stopwatch::Seconds total{};  // holding the mutex

}  // namespace

bool Stopwatch::asked() { return asked_for.load(std::memory_order_relaxed); }

void Stopwatch::hand_in() const {
  if (!running_) return;
  std::lock_guard<std::mutex> lock(mutex);
  for (int part = 0; part < kParts; ++part) total[part] += seconds_[part];
}

Stopwatch::Seconds Stopwatch::measure(bool on) {
  std::lock_guard<std::mutex> lock(mutex);
  asked_for.store(on, std::memory_order_relaxed);
  const Seconds until_now = total;
  total.fill(0);
  return until_now;
}

}  // namespace softclip
