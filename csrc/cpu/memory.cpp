#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <new>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace softclip {

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

std::atomic<Pages*> kept_pages{nullptr};  // without a destructor: the process's end takes them

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

size_t whole_pages(size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

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

void give_back(char* begin, char* end) {
  char* first = begin + (page_bytes() - reinterpret_cast<uintptr_t>(begin) % page_bytes()) % page_bytes();
  char* last = end - reinterpret_cast<uintptr_t>(end) % page_bytes();
  if (first < last) madvise(first, last - first, MADV_DONTNEED);
}

Scratch::Scratch(size_t bytes, size_t most_kept)
    : pages_(kept_pages.exchange(nullptr)), bytes_(bytes), most_kept_(most_kept) {
  if (pages_ != nullptr && pages_->bytes() >= bytes) return;
  pages_.reset();  // before the larger ones are mapped
  pages_ = std::make_unique<Pages>(bytes);
}

Scratch::~Scratch() {
  if (!kept()) give_back(pages_->data() + most_kept_, pages_->data() + pages_->bytes());
  pages_.reset(kept_pages.exchange(pages_.release()));
}

}  // namespace softclip
