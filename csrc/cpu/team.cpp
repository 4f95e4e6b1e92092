#include "team.h"

#include <thread>
#include <utility>
#include <vector>

#include "openmp.h"

namespace softclip {
namespace {

constexpr std::chrono::milliseconds kBetweenPolls{100};
// Looks before a thread sleeps: about 100 µs. To wake a sleeping thread costs as much, and threads with equal work
// arrive within less; longer waits leave the core to others.
constexpr int kLooks = 5000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

bool Team::cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

void Team::cancel() { cancelled_.store(true, std::memory_order_relaxed); }

void Team::poll() {
  if (cancelled()) return;
  const auto now = Clock::now();
  if (now - polled_ < kBetweenPolls) return;
  polled_ = now;
  if (!poll_()) cancel();
}

bool Team::stopped(int thread) {
  if (thread == 0) poll();
  return cancelled();
}

template <class Condition>
void Team::until(std::condition_variable& changed, bool calling, const Condition& condition) {
  for (int looks = 0; looks < kLooks; ++looks) {
    if (condition()) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  if (!calling) return changed.wait(lock, condition);
  while (!changed.wait_for(lock, kBetweenPolls, condition)) {
    lock.unlock();
    poll();
    lock.lock();
  }
}

void Team::release() {
  waiting_ = 0;
  generation_.fetch_add(1, std::memory_order_release);
  arrived_.notify_all();
}

void Team::wait(int thread) {
  if (threads_ == 1) return;
  unsigned generation;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    generation = generation_.load(std::memory_order_relaxed);
    if (++waiting_ == running_.load(std::memory_order_relaxed)) return release();
  }
  until(arrived_, thread == 0, [&] { return generation_.load(std::memory_order_acquire) != generation; });
}

void Team::leave(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (error != nullptr) {
    cancel();
    if (error_ == nullptr) error_ = std::move(error);
  }
  const int running = running_.fetch_sub(1, std::memory_order_release) - 1;
  if (waiting_ > 0 && waiting_ == running) release();  // threads that wait for one that exited
  finished_.notify_all();
}

void Team::run(const std::function<void(int)>& work) {
  polled_ = Clock::now();
  threads_ = shares_;
  if (threads_ == 1) return work(0);
  const std::function<void(int)> body = [&](int thread) {
    std::exception_ptr error;
    try {
      work(thread);
    } catch (...) {
      error = std::current_exception();
    }
    leave(std::move(error));
  };
  running_ = threads_;
  if (!run_on_borrowed_threads(threads_, body)) {
    threads_ = own_;
    if (threads_ == 1) return work(0);
    running_ = threads_;
    run_on_own_threads(body);
  }
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void Team::run_on_own_threads(const std::function<void(int)>& body) {
  std::vector<std::thread> workers;
  workers.reserve(threads_ - 1);
  try {
    for (int thread = 1; thread < threads_; ++thread) workers.emplace_back(body, thread);
  } catch (...) {  // the system refused a thread: those that started find the team cancelled
    for (int absent = static_cast<int>(workers.size()) + 1; absent < threads_; ++absent) {
      leave(std::current_exception());
    }
  }
  body(0);
  until(finished_, true, [&] { return running_.load(std::memory_order_acquire) == 0; });
  for (auto& worker : workers) worker.join();
}

}  // namespace softclip
