// Four lanes in the compilers' own vector type: SSE2 or NEON or scalar code, whatever the target has. Included by
// level.inl.

constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kTileRows = 8;  // 16 of 32 registers
#else
constexpr int kTileRows = 4;  // 8 of 16 registers
#endif
constexpr int kVectors = 2;
constexpr int kBlock = 224;

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));

SOFTCLIP_INLINE Vector load(const float* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SOFTCLIP_INLINE void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }
SOFTCLIP_INLINE Vector broadcast(float v) { return Vector{v, v, v, v}; }
SOFTCLIP_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
// a * b - c with one rounding, as the other levels have it: the fraction of a large exponent must not lose its digits.
SOFTCLIP_INLINE Vector multiply_subtract(Vector a, Vector b, Vector c) {
  Vector result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = static_cast<float>(static_cast<double>(a[lane]) * b[lane] - c[lane]);
  }
  return result;
}
// Where one of the two is NaN: b.
SOFTCLIP_INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
SOFTCLIP_INLINE Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
SOFTCLIP_INLINE Vector nearest(Vector v) {
  // Adding 1.5 * 2^23 rounds to a whole number; from 2^22 on v is whole, as good as (or NaN).
  const Vector shift = broadcast(12582912.0f), large = broadcast(4194304.0f);
  const Vector rounded = (v + shift) - shift;
  const Vector magnitude = v < broadcast(0) ? -v : v;
  return magnitude < large ? rounded : v;
}
// value * 2^exponent, exponent a whole number; 0 below the range. The bit pattern of exponent -127 is zero.
SOFTCLIP_INLINE Vector scale_by_power(Vector value, Vector exponent) {
  const Vector low = broadcast(-127), high = broadcast(128);
  const Vector above = exponent > low ? exponent : low;  // NaN becomes -127: the value is NaN then
  const Integers biased = __builtin_convertvector(above < high ? above : high, Integers) + 127;
  Vector power;
  const Integers bits = biased << 23;
  __builtin_memcpy(&power, &bits, sizeof power);
  return value * power;
}
SOFTCLIP_INLINE Vector one_where_above(Vector a, Vector b) { return a > b ? broadcast(1) : broadcast(0); }
SOFTCLIP_INLINE Vector where_equal(const int32_t* ids, int32_t id, Vector v, Vector otherwise) {
  Integers all;
  __builtin_memcpy(&all, ids, sizeof all);
  return all == Integers{id, id, id, id} ? v : otherwise;
}
SOFTCLIP_INLINE float sum(Vector v) { return (v[0] + v[2]) + (v[1] + v[3]); }
SOFTCLIP_INLINE float largest(Vector v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
