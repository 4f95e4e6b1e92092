#include "team.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace softclip {

int Team::size() const { return threads_; }

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
  if (waiting_ > 0 && waiting_ == running_) release();  // those that wait for one that does not come
  finished_.notify_all();
}

void Team::run(const std::function<void(int)>& work, bool long_call) {
  if (threads_ == 1 && !long_call) return work(0);
  std::vector<std::thread> workers;
  workers.reserve(threads_);
  running_ = threads_;
  // The threads wait for `start`, so that if the system refuses one the others can still be sent home.
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

#if defined(__SSE2__)
constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;

FlushDenormals::FlushDenormals() : previous_(_mm_getcsr()) { _mm_setcsr(previous_ | kFlushResults | kFlushOperands); }
FlushDenormals::~FlushDenormals() { _mm_setcsr(previous_); }
#else
FlushDenormals::FlushDenormals() = default;
FlushDenormals::~FlushDenormals() = default;
#endif

namespace {

constexpr size_t kHuge = 2 << 20;

size_t whole_pages(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

Pages::Pages(size_t bytes) : bytes_(whole_pages(bytes)) {
  if (bytes_ == 0) return;
  // Whole huge pages from their own boundary on: map more, give the ends back.
  const size_t slack = bytes_ >= kHuge ? kHuge : 0;
  void* pages = mmap(nullptr, bytes_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<char*>(pages);
  if (slack > 0) {
    const size_t before = (kHuge - reinterpret_cast<uintptr_t>(data_) % kHuge) % kHuge, after = slack - before;
    if (before > 0) munmap(data_, before);
    data_ += before;
    if (after > 0) munmap(data_ + bytes_, after);
  }
#if defined(MADV_HUGEPAGE)
  madvise(data_, bytes_, MADV_HUGEPAGE);  // fewer address translations; only a hint
#endif
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

namespace {
std::atomic<Pages*> kept_pages{nullptr};  // without a destructor: the process's end takes them
}

Scratch::Scratch(size_t bytes, size_t most_kept)
    : pages_(kept_pages.exchange(nullptr)), most_kept_(most_kept) {
  if (pages_ != nullptr && pages_->bytes() >= bytes) return;
  pages_.reset();  // before the larger ones are mapped
  pages_ = std::make_unique<Pages>(bytes);
}

Scratch::~Scratch() {
  if (pages_->bytes() > most_kept_) return;
  pages_.reset(kept_pages.exchange(pages_.release()));
}

}  // namespace softclip
