// The avx512bf16 level. Its flags are in build_extension.py.
#include <immintrin.h>

#include "kernels.h"

#define SOFTCLIP_PAIRS 1
#define SOFTCLIP_INLINE static inline __attribute__((always_inline))
#define SOFTCLIP_MEMBER static inline __attribute__((always_inline))
#define SOFTCLIP_KEEP(value) asm volatile("" : "+v"(value))  // the compiler must not drop it
#define SOFTCLIP_UNROLL _Pragma("GCC unroll 16")

namespace softclip::avx512bf16 {
namespace {

#include "simd_avx512.h"
#include "products.inl"
#include "packing.inl"
#include "epilogues.inl"

}  // namespace

#include "table.inl"

}  // namespace softclip::avx512bf16
