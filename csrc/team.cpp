#include "team.h"

#include <sys/mman.h>

#include <chrono>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace softclip {

int Team::size() const { return threads_; }

bool Team::cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

void Team::wait() {
  if (threads_ == 1) return;
  std::unique_lock<std::mutex> lock(mutex_);
  const unsigned generation = generation_;
  if (++waiting_ == threads_) {
    waiting_ = 0;
    ++generation_;
    arrived_.notify_all();
  } else {
    arrived_.wait(lock, [&] { return generation_ != generation; });
  }
}

void Team::run(const std::function<void(int)>& work, bool long_call) {
  if (threads_ == 1 && !long_call) return work(0);
  std::vector<std::thread> workers;
  running_ = threads_;
  // The threads wait for `start`, so that if the system refuses one the others can still be sent home.
  int start = 0;  // 1: work, -1: do not
  const auto body = [&](int thread) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, [&] { return start != 0; });
      if (start < 0) return;
    }
    work(thread);
    std::lock_guard<std::mutex> lock(mutex_);
    --running_;
    finished_.notify_all();
  };
  const auto signal_start = [&](int value) {
    std::lock_guard<std::mutex> lock(mutex_);
    start = value;
    finished_.notify_all();
  };
  try {
    for (int thread = 0; thread < threads_; ++thread) workers.emplace_back(body, thread);
  } catch (const std::system_error&) {
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
}

#if defined(__SSE2__)
constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;

FlushDenormals::FlushDenormals() : previous_(_mm_getcsr()) { _mm_setcsr(previous_ | kFlushResults | kFlushOperands); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(previous_); }
#else
FlushDenormals::FlushDenormals() = default;
FlushDenormals::~FlushDenormals() = default;
#endif

Pages::Pages(size_t bytes) : bytes_(bytes) {
  if (bytes_ == 0) return;
  void* pages = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(pages);
#if defined(MADV_HUGEPAGE)
  madvise(pages, bytes_, MADV_HUGEPAGE);  // fewer address translations; only a hint
#endif
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace softclip
