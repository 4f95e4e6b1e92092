// What a call asks of the machine: pages of memory, and a mode of its floating-point unit.
#pragma once

#include <cstddef>
#include <memory>

namespace softclip {

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
