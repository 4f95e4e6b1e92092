// Packing of panels (kernels.h). Included by level.inl.

SOFTCLIP_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct FromFloat32 {
  using Stored = float;
  SOFTCLIP_INLINE uint32_t bits(float value) { return bits_of(value); }
};
struct FromBfloat16 {
  using Stored = uint16_t;
  SOFTCLIP_INLINE uint32_t bits(uint16_t value) { return static_cast<uint32_t>(value) << 16; }
};

#if defined(__clang__)
#define SOFTCLIP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SOFTCLIP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Quad{__VA_ARGS__})
#endif

typedef uint32_t Quad __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint16_t Half __attribute__((vector_size(8), aligned(2), may_alias));

// Four elements as they lie in memory, or four bf16 widened to floats.
template <bool kWiden>
SOFTCLIP_INLINE Quad load_quad(const char* from) {
  if (!kWiden) return *reinterpret_cast<const Quad*>(from);
  return __builtin_convertvector(*reinterpret_cast<const Half*>(from), Quad) << 16;
}

// Elements [k, k + 4) of four rows, across: out[(k + c) * width + r].
template <bool kWiden>
SOFTCLIP_INLINE void transpose_quad(const char* row, int64_t row_bytes, int width, uint32_t* out) {
  Quad in[4];
  for (int q = 0; q < 4; ++q) in[q] = load_quad<kWiden>(row + q * row_bytes);
  const Quad low01 = SOFTCLIP_SHUFFLE(in[0], in[1], 0, 4, 1, 5);
  const Quad high01 = SOFTCLIP_SHUFFLE(in[0], in[1], 2, 6, 3, 7);
  const Quad low23 = SOFTCLIP_SHUFFLE(in[2], in[3], 0, 4, 1, 5);
  const Quad high23 = SOFTCLIP_SHUFFLE(in[2], in[3], 2, 6, 3, 7);
  *reinterpret_cast<Quad*>(out) = SOFTCLIP_SHUFFLE(low01, low23, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(out + width) = SOFTCLIP_SHUFFLE(low01, low23, 2, 3, 6, 7);
  *reinterpret_cast<Quad*>(out + 2 * width) = SOFTCLIP_SHUFFLE(high01, high23, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(out + 3 * width) = SOFTCLIP_SHUFFLE(high01, high23, 2, 3, 6, 7);
}

// out[k * width + r] = rows[r][k] for width rows and elements of 4 bytes (kWiden: 2), count a multiple of 4. Where 4
// does not divide the width, the last group of rows overlaps the one before. A cache line of every row at a time, so
// that a line is read once and what is written stays in the first cache until its lines are full.
template <bool kWiden>
SOFTCLIP_INLINE void interleave_rows(const char* rows, int64_t row_bytes, int width, int64_t count, uint32_t* out) {
  constexpr int64_t kBytes = kWiden ? 2 : 4, kLine = 64 / kBytes;
  for (int64_t begin = 0; begin < count; begin += kLine) {
    const int64_t end = begin + kLine < count ? begin + kLine : count;
    for (int first = 0; first < width; first += 4) {
      const int r = first + 4 <= width ? first : width - 4;
      for (int64_t k = begin; k < end; k += 4) {
        transpose_quad<kWiden>(rows + r * row_bytes + k * kBytes, row_bytes, width, out + k * width + r);
      }
    }
  }
}

// kBf16x2: an element is bf16 values 2k and 2k + 1 of the row, otherwise the k-th value as a float.
template <class From, bool kBf16x2>
void pack_rows(const Matrix& m, int64_t begin, int count, int width, uint32_t* out) {
  using Stored = typename From::Stored;
  const int64_t summed = kBf16x2 ? (m.width + 1) / 2 : m.width, step = m.column_step;
  // Rows of adjacent elements: all but the last few elements of full panels go fast.
  constexpr bool kWiden = !kBf16x2 && sizeof(Stored) == 2;
  const bool adjacent = step == 1;
  const int64_t whole = (kBf16x2 ? m.width / 2 : m.width) / 4 * 4;
  for (int first = 0; first < count; first += width, out += summed * width) {
    const auto* rows = static_cast<const Stored*>(m.data) + (begin + first) * m.row_step;
    int64_t done = 0;
    if (adjacent && first + width <= count) {
      const int64_t row_bytes = m.row_step * int64_t{sizeof(Stored)};
      interleave_rows<kWiden>(reinterpret_cast<const char*>(rows), row_bytes, width, whole, out);
      done = whole;
    }
    for (int r = 0; r < width; ++r) {
      const auto* row = rows + r * m.row_step;
      const bool valid = first + r < count;
      for (int64_t k = done; k < summed; ++k) {
        uint32_t bits = 0;
        if (valid && !kBf16x2) bits = From::bits(row[k * step]);
        if (valid && kBf16x2) {
          bits = From::bits(row[2 * k * step]) >> 16;
          if (2 * k + 1 < m.width) bits |= From::bits(row[(2 * k + 1) * step]);
        }
        out[k * width + r] = bits;
      }
    }
  }
}

// kBf16x2: an element is the values of rows 2k and 2k + 1. kStep: the column step where it is known, else 0.
template <class From, bool kBf16x2, int kStep>
void pack_columns(const Matrix& m, int64_t begin, int count, uint32_t* out) {
  const auto* data = static_cast<const typename From::Stored*>(m.data) + begin * m.row_step;
  const int64_t step = kStep > 0 ? kStep : m.column_step;
  const int summed = kBf16x2 ? (count + 1) / 2 : count;
  // Row by row, as they lie in memory: every panel gets a whole line of the cache.
  for (int k = 0; k < summed; ++k, out += kTileColumns) {
    const auto* row = data + (kBf16x2 ? 2 * k : k) * m.row_step;
    const bool second = kBf16x2 && 2 * k + 1 < count;
    const auto* next = second ? row + m.row_step : row;
    const uint32_t keep = second ? ~uint32_t{0} : 0;
    uint32_t* to = out;
    for (int64_t d = 0; d < m.width; d += kTileColumns, to += int64_t{summed} * kTileColumns) {
      const int valid = m.width - d < kTileColumns ? static_cast<int>(m.width - d) : kTileColumns;
      for (int c = 0; c < valid; ++c) {
        const uint32_t bits = From::bits(row[(d + c) * step]);
        to[c] = kBf16x2 ? (bits >> 16) | (From::bits(next[(d + c) * step]) & keep) : bits;
      }
      for (int c = valid; c < kTileColumns; ++c) to[c] = 0;
    }
  }
}

template <class From, bool kBf16x2>
void pack_columns_by_step(const Matrix& m, int64_t begin, int count, uint32_t* out) {
  m.column_step == 1 ? pack_columns<From, kBf16x2, 1>(m, begin, count, out)
                     : pack_columns<From, kBf16x2, 0>(m, begin, count, out);
}

void pack(const Matrix& m, int64_t begin, int count, int width, bool bf16x2, void* panels) {
  auto* out = static_cast<uint32_t*>(panels);
  if (m.dtype == Dtype::float32) return pack_rows<FromFloat32, false>(m, begin, count, width, out);
  bf16x2 ? pack_rows<FromBfloat16, true>(m, begin, count, width, out)
         : pack_rows<FromBfloat16, false>(m, begin, count, width, out);
}

void pack_transposed(const Matrix& m, int64_t begin, int count, bool bf16x2, void* panels) {
  auto* out = static_cast<uint32_t*>(panels);
  if (m.dtype == Dtype::float32) return pack_columns_by_step<FromFloat32, false>(m, begin, count, out);
  bf16x2 ? pack_columns_by_step<FromBfloat16, true>(m, begin, count, out)
         : pack_columns_by_step<FromBfloat16, false>(m, begin, count, out);
}
