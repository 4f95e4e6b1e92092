// A block's shared memory as bytes, seen by threads and by the asynchronous proxy (the copy engine and wgmma).
#pragma once

#include <cstring>
#include <vector>

#include "fibres.h"

namespace emulator {

constexpr u32 kSharedBase = 1024;              // of the window, where a block's own memory begins
constexpr u32 kSharedBytes = 227 * 1024;       // at most
constexpr u16 kFenced = 0, kBarrier = 0xFFFF;  // in place of a writer

// Where a 128-byte swizzle puts the byte of this address: by bits of the address, whatever lies there.
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

class SharedMemory {
 public:
  explicit SharedMemory(u32 bytes)
      : bytes_(bytes), generic_(bytes, 0xFF), async_(bytes, 0xFF), writer_((bytes + 3) / 4, kFenced) {}

  u32 bytes() const { return bytes_; }

  void check(const char* what, u32 address, u32 bytes, u32 alignment) const {
    if (address < kSharedBase || address - kSharedBase > bytes_ || bytes > bytes_ - (address - kSharedBase)) {
      fail("%s: bytes %d to %d are outside of the %u bytes of shared memory", what,
           static_cast<int>(address - kSharedBase), static_cast<int>(address - kSharedBase + bytes), bytes_);
    }
    if (address % alignment != 0) fail("%s: +%u is no multiple of %u", what, address - kSharedBase, alignment);
  }

  void read(const char* what, u32 address, void* to, u32 bytes) const {
    check(what, address, bytes, bytes);
    const u32 at = address - kSharedBase;
    for (u32 word = at / 4; word < (at + bytes) / 4; ++word) {
      if (writer_[word] == kBarrier) fail("%s: +%u is a barrier", what, word * 4);
    }
    std::memcpy(to, &generic_[at], bytes);
  }

  // By a thread, 1 and up. The asynchronous proxy sees it after the thread's fence, or at once if it leaks.
  void write(const char* what, u32 address, const void* from, u32 bytes, u16 thread, std::vector<u32>& unfenced,
             bool leaks) {
    check(what, address, bytes, bytes);
    const u32 at = address - kSharedBase;
    for (u32 word = at / 4; word < (at + bytes) / 4; ++word) {
      if (writer_[word] == kBarrier) fail("%s: +%u is a barrier", what, word * 4);
      writer_[word] = thread;
      unfenced.push_back(word);
    }
    std::memcpy(&generic_[at], from, bytes);
    if (leaks) std::memcpy(&async_[at], from, bytes);
  }
  void fence(u16 thread, std::vector<u32>& unfenced) {
    for (u32 word : unfenced) {
      if (writer_[word] != thread) continue;  // overwritten by another, whose fence it takes
      writer_[word] = kFenced;
      std::memcpy(&async_[word * 4], &generic_[word * 4], 4);
    }
    unfenced.clear();
  }

  // By the asynchronous proxy, of 16 bytes, or poison.
  const u8* async(u32 address) const { return &async_[address - kSharedBase]; }
  void async_write(u32 address, const u8* from) {
    const u32 at = address - kSharedBase;
    std::memcpy(&generic_[at], from, 16);
    std::memcpy(&async_[at], from, 16);
  }
  void poison(const char* what, u32 address, u32 bytes) {
    const u32 at = address - kSharedBase;
    for (u32 word = at / 4; word < (at + bytes) / 4; ++word) {
      if (writer_[word] == kFenced) continue;
      if (writer_[word] == kBarrier) fail("%s: overwrites the barrier at +%u", what, word * 4);
      fail("%s: overwrites +%u, which thread %d wrote without fence_proxy_async", what, word * 4, writer_[word] - 1);
    }
    std::memset(&generic_[at], 0xFF, bytes);
    std::memset(&async_[at], 0xFF, bytes);
  }

  void reserve_for_barrier(u32 address) {
    check("mbarrier_init", address, 8, 8);
    writer_[(address - kSharedBase) / 4] = writer_[(address - kSharedBase) / 4 + 1] = kBarrier;
  }

 private:
  const u32 bytes_;
  std::vector<u8> generic_, async_;
  std::vector<u16> writer_;  // of every word, until its fence
};

inline float bits_to_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline u32 float_to_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bfloat16(u16 value) { return bits_to_float(static_cast<u32>(value) << 16); }
inline u16 to_bfloat16(float value) {  // to nearest, ties to even
  const u32 bits = float_to_bits(value);
  if (value != value) return 0x7FFF;
  return static_cast<u16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(u16 value) {
  const u32 sign = static_cast<u32>(value & 0x8000) << 16, exponent = value >> 10 & 31, fraction = value & 0x3FF;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000 | fraction << 13);
  if (exponent != 0) return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -tiny : tiny;
}
inline u16 to_float16(float value) {  // to nearest, ties to even
  const u32 bits = float_to_bits(value);
  const u16 sign = bits >> 16 & 0x8000;
  if (value != value) return 0x7FFF;
  const float size = bits_to_float(bits & 0x7FFFFFFF);
  if (size >= 65520.0f) return sign | 0x7C00;
  // Adding a number whose last digit is the result's last digit rounds as wanted.
  if (size < 0x1p-14f) return sign | static_cast<u16>(float_to_bits(size + 0.5f) - float_to_bits(0.5f));
  const u32 rounded = (bits & 0x7FFFFFFF) + 0xFFF + (bits >> 13 & 1);
  return sign | static_cast<u16>((rounded >> 13) - (112 << 10));
}

#ifndef HALF
inline float from_operand(u16 value) { return from_bfloat16(value); }
inline u16 to_operand(float value) { return to_bfloat16(value); }
#else
inline float from_operand(u16 value) { return from_float16(value); }
inline u16 to_operand(float value) { return to_float16(value); }
#endif

}  // namespace emulator
