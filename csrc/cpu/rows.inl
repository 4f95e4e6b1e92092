// Rows of an operand, or of a gradient, as they lie in memory (kernels.h). Included by level.inl.

constexpr int kStretch = 512;  // elements of a row that are looked at together

template <class From>
SOFTCLIP_INLINE void widen(const Matrix& m, int64_t row, int64_t begin, int count, float* out) {
  const auto* from = static_cast<const typename From::Stored*>(m.data) + row * m.row_step + begin * m.column_step;
  const int64_t step = m.column_step;
  for (int c = 0; c < count; ++c) {
    const uint32_t bits = From::bits(from[c * step]);
    __builtin_memcpy(out + c, &bits, sizeof bits);
  }
}

// Elements [begin, begin + count) of a row as floats side by side: those of the matrix, or copies in the buffer.
SOFTCLIP_INLINE const float* stretch(const Matrix& m, int64_t row, int64_t begin, int count, float* buffer) {
  if (m.dtype == Dtype::float32 && m.column_step == 1) {
    return static_cast<const float*>(m.data) + row * m.row_step + begin;
  }
  m.dtype == Dtype::float32 ? widen<FromFloat32>(m, row, begin, count, buffer)
                            : widen<FromBfloat16>(m, row, begin, count, buffer);
  return buffer;
}

// To the nearest, ties to even; NaN stays NaN.
SOFTCLIP_INLINE uint16_t round_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

void add_row(const Matrix& m, int64_t row, float factor, float* out) {
  float buffer[kStretch];
  for (int64_t begin = 0; begin < m.width; begin += kStretch) {
    const int count = m.width - begin < kStretch ? static_cast<int>(m.width - begin) : kStretch;
    const float* from = stretch(m, row, begin, count, buffer);
    for (int c = 0; c < count; ++c) out[begin + c] += factor * from[c];
  }
}

double finish_rows(const Matrix& m, int64_t begin, int64_t end, const float* g, float factor, const Outgoing& out) {
  float buffer[kStretch];
  double total = 0;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < m.width; first += kStretch) {
      const int count = m.width - first < kStretch ? static_cast<int>(m.width - first) : kStretch;
      const float* operand = stretch(m, row, first, count, buffer);
      const int64_t at = (row - begin) * m.width + first;
      const float* from = g + at;
      Vector products = broadcast(0);
      int c = 0;
      for (; c + kLanes <= count; c += kLanes) products = multiply_add(load(operand + c), load(from + c), products);
      float some = sum(products);
      for (; c < count; ++c) some += operand[c] * from[c];
      total += some;
      if (out.data == nullptr) continue;
      if (out.dtype == Dtype::float32) {
        float* to = static_cast<float*>(out.data) + at;
        for (c = 0; c + kLanes <= count; c += kLanes) store(to + c, broadcast(factor) * load(from + c));
        for (; c < count; ++c) to[c] = factor * from[c];
      } else {
        auto* to = static_cast<uint16_t*>(out.data) + at;
        for (c = 0; c < count; ++c) to[c] = round_to_bfloat16(factor * from[c]);
      }
    }
  }
  return total;
}
