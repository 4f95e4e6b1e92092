// What a call asks of the machine: pages of memory, and a mode of its floating-point unit.
#pragma once

#include <cstddef>
#include <memory>

namespace softclip {

// While this lives, numbers below the normal range become 0 on this thread: they slow some machines down, and mean
// nothing beside a sum that holds its largest term.
class FlushDenormals {
 public:
  FlushDenormals();
  ~FlushDenormals();
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned previous_ = 0;
};

// Pages straight from the system, and back to it at the end. Pages that nobody touches cost nothing.
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

// The whole pages between two addresses go back to the system; what they held is lost, and they read as zeros.
void give_back(char* begin, char* end);

// Memory for one call, its contents undefined. The next call gets the same pages, because fresh ones cost a small call
// more than its arithmetic, and a large one some percent; but only so many bytes stay in memory in between. The process
// keeps one set, which is taken out of its place while in use: simultaneous calls get different sets, and a forked
// child gets its own copy of what lay there.
class Scratch {
 public:
  Scratch(size_t bytes, size_t most_kept);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return pages_->data(); }
  // Whether all of it stays in memory for the next call.
  bool kept() const { return bytes_ <= most_kept_; }

 private:
  std::unique_ptr<Pages> pages_;
  const size_t bytes_, most_kept_;
};

}  // namespace softclip
