// AVX-512 with dot products of bf16: the vectors and tiles of simd_avx512.h, and the element type bf16x2.
#include "simd_avx512.h"

#define SOFTCLIP_BF16X2

// Two bf16 an element; the instruction multiplies both and adds them to an fp32 sum.
struct Bf16x2 {
  using Operand = __m512bh;
  static constexpr int kProducts = 2;
  SOFTCLIP_INLINE Operand right(const float* p) { return reinterpret_cast<Operand>(_mm512_loadu_si512(p)); }
  SOFTCLIP_INLINE Operand left(const float* p) { return reinterpret_cast<Operand>(_mm512_set1_ps(*p)); }
  SOFTCLIP_INLINE Vector add_product(Operand a, Operand b, Vector sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

SOFTCLIP_INLINE __m256i to_bfloat16(Vector v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

void round_to_bf16x2(const float* g, int rows, int columns, void* along_columns, void* along_rows) {
  const int whole = columns / kLanes * kLanes;
  const __mmask16 some = static_cast<__mmask16>((1u << (columns - whole)) - 1);  // an odd last column pairs with zero
  const __m512i zero = _mm512_setzero_si512();
  for (int i = 0; i < rows; i += 2) {
    uint16_t* by_column = static_cast<uint16_t*>(along_columns) + int64_t{i} * kBlock;
    uint32_t* by_row = static_cast<uint32_t*>(along_rows) + int64_t{i / 2} * kBlock;
    const float* row = g + int64_t{i} * kBlock;
    const bool second = i + 1 < rows;
    for (int j = 0; j < columns; j += kLanes) {
      const __mmask16 valid = j < whole ? static_cast<__mmask16>(0xffff) : some;
      const __m256i low = to_bfloat16(_mm512_maskz_loadu_ps(valid, row + j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_column + j), low);
      __m512i high = zero;
      if (second) {
        const __m256i next = to_bfloat16(_mm512_maskz_loadu_ps(valid, row + kBlock + j));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(by_column + kBlock + j), next);
        high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16);
      }
      _mm512_storeu_si512(by_row + j, _mm512_or_si512(_mm512_cvtepu16_epi32(low), high));
    }
  }
}
