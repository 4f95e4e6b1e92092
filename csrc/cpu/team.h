// A team of threads for one call, with a barrier and a cancel flag. Threads live as long as the call: nothing survives
// into a forked child, and no runtime library has to agree with PyTorch's about fork or about thread counts.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>

namespace softclip {

class Team {
 public:
  // `poll` runs on the calling thread about ten times a second while others work, and returns false to cancel.
  Team(int threads, std::function<bool()> poll) : threads_(threads), poll_(std::move(poll)) {}

  bool cancelled() const;
  void wait();  // until every thread of the team has come here
  // Calls work(0) .. work(threads - 1) concurrently, one of them on the calling thread, unless it is a `long_call`,
  // during which that is free to poll. What one of them throws cancels the others and is thrown again here.
  void run(const std::function<void(int)>& work, bool long_call);

 private:
  void release();  // everyone from wait(); holding the mutex
  void leave(std::exception_ptr error);

  const int threads_;
  const std::function<bool()> poll_;
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable arrived_, finished_;
  int waiting_ = 0;
  std::atomic<int> running_{0};  // this and the next change while the mutex is held
  std::atomic<unsigned> generation_{0};
  std::exception_ptr error_;  // the first
};

}  // namespace softclip
