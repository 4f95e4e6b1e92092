// The portable level. Its flags are in build_extension.py.
#include "kernels.h"

#define SOFTCLIP_PAIRS 0
#define SOFTCLIP_INLINE static inline __attribute__((always_inline))
#define SOFTCLIP_MEMBER static inline __attribute__((always_inline))
#if defined(__x86_64__)
#define SOFTCLIP_KEEP(value) asm volatile("" : "+x"(value))  // the compiler must not drop it
#elif defined(__aarch64__)
#define SOFTCLIP_KEEP(value) asm volatile("" : "+w"(value))
#else
#define SOFTCLIP_KEEP(value) asm volatile("" : "+m"(value))
#endif
#define SOFTCLIP_UNROLL _Pragma("GCC unroll 16")

namespace softclip::portable {
namespace {

#include "simd_portable.h"
#include "products.inl"
#include "packing.inl"
#include "epilogues.inl"

}  // namespace

#include "table.inl"

}  // namespace softclip::portable
