// One instruction-set level: everything of kernels.h, compiled with the level's own flags. Included by
// level_<name>.cpp, which defines
//   SOFTCLIP_LEVEL  the level's name, here its namespace
//   SOFTCLIP_SIMD   the header of its vector operations; one that has bf16 dot products defines SOFTCLIP_BF16X2
// Its functions are in an anonymous namespace and call none of std::, because the linker keeps one copy of an inline
// function, and could take the one that these flags compiled for code that every machine runs.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define SOFTCLIP_INLINE static inline __attribute__((always_inline))
#define SOFTCLIP_UNROLL _Pragma("GCC unroll 16")

// The compiler must not drop the value, which lies in a vector register.
#if defined(__AVX512F__)
#define SOFTCLIP_KEEP(value) asm volatile("" : "+v"(value))
#elif defined(__x86_64__)
#define SOFTCLIP_KEEP(value) asm volatile("" : "+x"(value))
#elif defined(__aarch64__)
#define SOFTCLIP_KEEP(value) asm volatile("" : "+w"(value))
#else
#define SOFTCLIP_KEEP(value) asm volatile("" : "+m"(value))
#endif

namespace softclip::SOFTCLIP_LEVEL {
namespace {

#include SOFTCLIP_SIMD

constexpr int kTileColumns = kVectors * kLanes;
static_assert(kBlock % kTileRows == 0 && kBlock % kTileColumns == 0, "blocks hold whole tiles");

#include "packing.inl"
#include "products.inl"
#include "rows.inl"
#include "softmax.inl"

#if defined(SOFTCLIP_BF16X2)
constexpr ProductKernels bf16x2 = product_kernels<Bf16x2>();
#else
constexpr ProductKernels bf16x2{};
constexpr decltype(Kernels::round_to_bf16x2) round_to_bf16x2 = nullptr;
#endif

}  // namespace

extern const Kernels kernels;  // seen from levels.cpp

// clang-format off: in the order and the groups of kernels.h
const Kernels kernels = {
    kBlock, kTileRows, kTileColumns,
    pack, pack_transposed,
    product_kernels<Float32>(), bf16x2, round_to_bf16x2, add_tiles,
    add_row, finish_rows,
    maxima, accumulate, gradient, mirrored_gradient, count_above,
};
// clang-format on

}  // namespace softclip::SOFTCLIP_LEVEL
