// AVX-512: 16 lanes. A tile of 14 x 32 accumulators takes 28 of the 32 registers, two hold the right operand, one the
// broadcast. Included by level.inl.

constexpr int kLanes = 16;
constexpr int kTileRows = 14;
constexpr int kVectors = 2;
constexpr int kBlock = 224;  // least common multiple of 14 and 32; 224 x 224 floats are a fifth of a 1 MiB cache

using Vector = __m512;

SOFTCLIP_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
SOFTCLIP_INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
SOFTCLIP_INLINE Vector broadcast(float v) { return _mm512_set1_ps(v); }
SOFTCLIP_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
SOFTCLIP_INLINE Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
// Where one of the two is NaN: b.
SOFTCLIP_INLINE Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
SOFTCLIP_INLINE Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
SOFTCLIP_INLINE Vector nearest(Vector v) { return _mm512_roundscale_ps(v, 8); }
// value * 2^exponent, exponent a whole number; 0 below the range
SOFTCLIP_INLINE Vector scale_by_power(Vector value, Vector exponent) { return _mm512_scalef_ps(value, exponent); }
SOFTCLIP_INLINE Vector one_where_above(Vector a, Vector b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), _mm512_set1_ps(1));
}
SOFTCLIP_INLINE Vector where_equal(const int32_t* ids, int32_t id, Vector v, Vector otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(ids), _mm512_set1_epi32(id)), v);
}
SOFTCLIP_INLINE float sum(Vector v) { return _mm512_reduce_add_ps(v); }
SOFTCLIP_INLINE float largest(Vector v) { return _mm512_reduce_max_ps(v); }
