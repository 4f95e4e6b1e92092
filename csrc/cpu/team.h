// A team of threads for one call, with a barrier and a cancel flag. The calling thread is one of them; the others are
// PyTorch's (openmp.h), or where those cannot be had, new ones that end with the call.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <utility>

#include "threads.h"

namespace softclip {

class Team {
 public:
  // `poll` runs on the calling thread about ten times a second, and returns false to cancel.
  Team(const Threads& threads, std::function<bool()> poll)
      : shares_(threads.shares), own_(std::min(threads.own, threads.shares)), poll_(std::move(poll)) {}

  // Calls work(0) .. work(threads() - 1) concurrently, work(0) on the calling thread: a thread for each share, or of
  // our own as many as these are worth. What one of them throws cancels the others and is thrown again here.
  void run(const std::function<void(int)>& work);

  int threads() const { return threads_; }  // for work(thread)
  // For work(thread): whether to stop, asked between any two things that take long.
  bool stopped(int thread);
  void wait(int thread);  // until every thread of the team has come here
  bool cancelled() const;

 private:
  using Clock = std::chrono::steady_clock;

  void run_on_own_threads(const std::function<void(int)>& body);
  void cancel();
  void poll();
  void release();  // everyone from wait(); holding the mutex
  void leave(std::exception_ptr error);
  // Sleeps until `condition`, looking first; the calling thread polls meanwhile.
  template <class Condition>
  void until(std::condition_variable& changed, bool calling, const Condition& condition);

  const int shares_, own_;
  int threads_ = 1;
  const std::function<bool()> poll_;
  Clock::time_point polled_;  // last, or the start
  std::atomic<bool> cancelled_{false};
  std::mutex mutex_;
  std::condition_variable arrived_, finished_;
  int waiting_ = 0;
  std::atomic<int> running_{0};  // this and the next change while the mutex is held
  std::atomic<unsigned> generation_{0};
  std::exception_ptr error_;  // the first
};

}  // namespace softclip
