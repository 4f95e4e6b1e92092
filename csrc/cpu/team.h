// A team of threads for one call, with a barrier and a cancel flag. Threads live as long as the call: nothing survives
// into a forked child, and no runtime library has to agree with PyTorch's about fork or about thread counts.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace softclip {

class Team {
 public:
  // `poll` runs on the calling thread about ten times a second while others work, and returns false to cancel.
  Team(int threads, std::function<bool()> poll) : threads_(threads), poll_(std::move(poll)) {}

  int size() const;
  bool cancelled() const;
  void wait();  // until every thread of the team has come here
  // Calls work(0) .. work(size - 1) concurrently. `long_call`: leave the calling thread free to poll. What one of them
  // throws cancels the others and is thrown again here.
  void run(const std::function<void(int)>& work, bool long_call);

 private:
  void release();  // everyone from wait(); holding the mutex
  void leave(std::exception_ptr error);

  const int threads_;
  const std::function<bool()> poll_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable arrived_, finished_;
  int waiting_ = 0, running_ = 0;
  unsigned generation_ = 0;
  std::exception_ptr error_;  // the first
};

// Numbers below the normal range become 0 while this lives, on this thread: they would slow some machines down, and
// next to a sum that holds its largest term they mean nothing.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned previous_ = 0;
};

// Pages straight from the system, back to it at the end: what is not touched costs nothing.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  const size_t bytes_;
};

// Memory for one call, its contents undefined. Where it is small, the next call gets the same pages, since fresh ones
// cost a small call more than its arithmetic. One set is kept in the process, and taken out of its place while in use:
// calls at the same time get different ones, and a forked child whichever lay there, its own copy.
class Scratch {
 public:
  Scratch(size_t bytes, size_t most_kept);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return pages_->data(); }

 private:
  std::unique_ptr<Pages> pages_;
  const size_t most_kept_;
};

}  // namespace softclip
