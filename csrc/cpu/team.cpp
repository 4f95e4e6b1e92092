#include "team.h"

#include <chrono>
#include <thread>
#include <utility>
#include <vector>

namespace softclip {
namespace {

// Looks before a thread sleeps: about 20 µs. To wake a sleeping thread costs more, and threads with equal work arrive
// together; longer waits leave the core to others.
constexpr int kLooks = 1000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
void look(const Condition& condition) {
  for (int looks = 0; looks < kLooks && !condition(); ++looks) pause();
}

}  // namespace

bool Team::cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

void Team::release() {
  waiting_ = 0;
  generation_.fetch_add(1, std::memory_order_release);
  arrived_.notify_all();
}

void Team::wait() {
  if (threads_ == 1) return;
  unsigned generation;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    generation = generation_.load(std::memory_order_relaxed);
    if (++waiting_ == running_.load(std::memory_order_relaxed)) return release();
  }
  const auto released = [&] { return generation_.load(std::memory_order_acquire) != generation; };
  look(released);
  if (released()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  arrived_.wait(lock, released);
}

void Team::leave(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error != nullptr) {
    cancelled_.store(true, std::memory_order_relaxed);
    if (error_ == nullptr) error_ = std::move(error);
  }
  const int running = running_.fetch_sub(1, std::memory_order_release) - 1;
  if (waiting_ > 0 && waiting_ == running) release();  // threads that wait for one that exited
  finished_.notify_all();
}

void Team::run(const std::function<void(int)>& work, bool long_call) {
  if (threads_ == 1 && !long_call) return work(0);
  const auto body = [&](int thread) {
    std::exception_ptr error;
    try {
      work(thread);
    } catch (...) {
      error = std::current_exception();
    }
    leave(std::move(error));
  };
  running_ = threads_;
  std::vector<std::thread> workers;
  workers.reserve(threads_);
  const int own = long_call ? 0 : 1;  // what the calling thread does itself
  try {
    for (int thread = own; thread < threads_; ++thread) workers.emplace_back(body, thread);
    if (own > 0) body(0);
  } catch (...) {  // the system refused a thread: those that started find the team cancelled
    for (int absent = static_cast<int>(workers.size()); absent < threads_; ++absent) leave(std::current_exception());
  }
  const auto finished = [&] { return running_.load(std::memory_order_acquire) == 0; };
  if (own > 0) look(finished);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!finished_.wait_for(lock, std::chrono::milliseconds(100), finished)) {
    lock.unlock();
    if (!cancelled() && !poll_()) cancelled_.store(true, std::memory_order_relaxed);
    lock.lock();
  }
  lock.unlock();
  for (auto& worker : workers) worker.join();
  if (error_ != nullptr) std::rethrow_exception(error_);
}

}  // namespace softclip
