#include "team.h"

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

namespace softclip {

bool Team::cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

void Team::release() {
  waiting_ = 0;
  ++generation_;
  arrived_.notify_all();
}

void Team::wait() {
  if (threads_ == 1) return;
  std::unique_lock<std::mutex> lock(mutex_);
  const unsigned generation = generation_;
  if (++waiting_ == running_) return release();
  arrived_.wait(lock, [&] { return generation_ != generation; });
}

void Team::leave(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error != nullptr) {
    cancelled_.store(true, std::memory_order_relaxed);
    if (error_ == nullptr) error_ = std::move(error);
  }
  --running_;
  if (waiting_ > 0 && waiting_ == running_) release();  // threads that wait for one that exited
  finished_.notify_all();
}

void Team::run(const std::function<void(int)>& work, bool long_call) {
  if (threads_ == 1 && !long_call) return work(0);
  std::vector<std::thread> workers;
  workers.reserve(threads_);
  running_ = threads_;
  // The threads wait for `start`, so that if the system refuses one the others can still be joined.
  int start = 0;  // 1: work, -1: do not
  const auto body = [&](int thread) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, [&] { return start != 0; });
      if (start < 0) return;
    }
    std::exception_ptr error;
    try {
      work(thread);
    } catch (...) {
      error = std::current_exception();
    }
    leave(std::move(error));
  };
  const auto signal_start = [&](int value) {
    std::lock_guard<std::mutex> lock(mutex_);
    start = value;
    finished_.notify_all();
  };
  try {
    for (int thread = 0; thread < threads_; ++thread) workers.emplace_back(body, thread);
  } catch (...) {
    signal_start(-1);
    for (auto& worker : workers) worker.join();
    throw;
  }
  signal_start(1);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!finished_.wait_for(lock, std::chrono::milliseconds(100), [&] { return running_ == 0; })) {
    lock.unlock();
    if (!cancelled() && !poll_()) cancelled_.store(true, std::memory_order_relaxed);
    lock.lock();
  }
  lock.unlock();
  for (auto& worker : workers) worker.join();
  if (error_ != nullptr) std::rethrow_exception(error_);
}

}  // namespace softclip
