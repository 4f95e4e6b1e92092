// AVX2 and FMA: 8 lanes. A tile of 6 x 16 takes 12 of the 16 registers. Included by level.inl.

constexpr int kLanes = 8;
constexpr int kTileRows = 6;
constexpr int kVectors = 2;
constexpr int kBlock = 240;  // a multiple of 6 and 16

using Vector = __m256;

SOFTCLIP_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
SOFTCLIP_INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
SOFTCLIP_INLINE Vector broadcast(float v) { return _mm256_set1_ps(v); }
SOFTCLIP_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
SOFTCLIP_INLINE Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm256_fmsub_ps(a, b, c); }
// Where one of the two is NaN: b.
SOFTCLIP_INLINE Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
SOFTCLIP_INLINE Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
SOFTCLIP_INLINE Vector nearest(Vector v) { return _mm256_round_ps(v, 8); }
// value * 2^exponent, exponent a whole number; 0 below the range. The bit pattern of exponent -127 is zero.
SOFTCLIP_INLINE Vector scale_by_power(Vector value, Vector exponent) {
  const Vector clamped = _mm256_min_ps(_mm256_max_ps(exponent, _mm256_set1_ps(-127)), _mm256_set1_ps(128));
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(clamped), _mm256_set1_epi32(127));
  return _mm256_mul_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
SOFTCLIP_INLINE Vector one_where_above(Vector a, Vector b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_set1_ps(1));
}
SOFTCLIP_INLINE Vector where_equal(const int32_t* ids, int32_t id, Vector v, Vector otherwise) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids));
  return _mm256_blendv_ps(otherwise, v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(all, _mm256_set1_epi32(id))));
}
SOFTCLIP_INLINE float sum(Vector v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
SOFTCLIP_INLINE float largest(Vector v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
