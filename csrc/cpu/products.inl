// Matrix products of kernels.h for one instruction set. Included inside the set's own namespace after its simd_*.h. No
// std:: functions here: an inline one could be emitted with these flags and then be linked into code for any machine.

constexpr int kTileColumns = kVectors * kLanes;
static_assert(kBlock % kTileRows == 0 && kBlock % kTileColumns == 0, "blocks hold whole tiles");

// Operand elements are 4 bytes: one float, or two consecutive bf16 of the summed dimension.
struct Single {
  using Operand = Vector;
  static constexpr int kProducts = 1;  // in an element
  SOFTCLIP_MEMBER Vector right(const float* p) { return load(p); }
  SOFTCLIP_MEMBER Vector left(const float* p) { return broadcast(*p); }
  SOFTCLIP_MEMBER Vector add_product(Vector a, Vector b, Vector sum) { return multiply_add(a, b, sum); }
};

// A register tile: sum over k of left[k * step_k + r * step_row] times right[k * kTileColumns + c], stored or added to
// out.
template <class Element, int kStepK, int kStepRow, bool kAdd>
SOFTCLIP_INLINE void tile(const float* left, const float* right, int64_t summed, float* out, int64_t out_step) {
  Vector total[kTileRows][kVectors];
  SOFTCLIP_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    SOFTCLIP_UNROLL
    for (int v = 0; v < kVectors; ++v) total[r][v] = broadcast(0);
    // To the second-level cache: where rows are a multiple of 4 KiB apart, these lines would push each other out of the
    // first.
    if (!kAdd) continue;
    __builtin_prefetch(out + r * out_step, 0, 2);
    __builtin_prefetch(out + r * out_step + kTileColumns - 1, 0, 2);
  }
  for (int64_t k = 0; k < summed; ++k) {
    typename Element::Operand b[kVectors];
    SOFTCLIP_UNROLL
    for (int v = 0; v < kVectors; ++v) b[v] = Element::right(right + v * kLanes);
    SOFTCLIP_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      const typename Element::Operand a = Element::left(left + r * kStepRow);
      SOFTCLIP_UNROLL
      for (int v = 0; v < kVectors; ++v) total[r][v] = Element::add_product(a, b[v], total[r][v]);
    }
    left += kStepK;
    right += kTileColumns;
  }
  SOFTCLIP_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    SOFTCLIP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* p = out + r * out_step + v * kLanes;
      store(p, kAdd ? load(p) + total[r][v] : total[r][v]);
    }
  }
}

// dots = left panels . right panels. One right panel stays in the first cache while all left panels pass.
template <class Element>
void multiply_panels(const float* left, const float* right, int64_t summed, int rows, int columns, float* dots) {
  for (int j = 0; j < columns; j += kTileColumns) {
    for (int i = 0; i < rows; i += kTileRows) {
      tile<Element, kTileRows, 1, false>(left + i * summed, right + j * summed, summed, dots + int64_t{i} * kBlock + j,
                                         kBlock);
    }
  }
}

// out (rows, width) += g . right, where a row of g is kRow elements.
template <class Element, int kRow>
void add_panels(const float* g, const float* right, int64_t summed, int rows, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kTileColumns) {
    for (int i = 0; i < rows; i += kTileRows) {
      const float* left = g + i * kRow;
      const float* panel = right + d * summed;
      if (i + kTileRows <= rows && d + kTileColumns <= width) {
        tile<Element, 1, kRow, true>(left, panel, summed, out + i * width + d, width);
        continue;
      }
      float edge[kTileRows * kTileColumns];
      tile<Element, 1, kRow, false>(left, panel, summed, edge, kTileColumns);
      const int some_rows = rows - i < kTileRows ? rows - i : kTileRows;
      const int some_columns = width - d < kTileColumns ? static_cast<int>(width - d) : kTileColumns;
      for (int r = 0; r < some_rows; ++r) {
        for (int c = 0; c < some_columns; ++c) out[(i + r) * width + d + c] += edge[r * kTileColumns + c];
      }
    }
  }
}

// Tiles of kernels.h = or += g^T . right. Rows past the end come from whatever lies there; add_tiles leaves them out.
template <class Element, bool kAdd>
void transposed_into_tiles(const float* g, const float* right, int64_t summed, int rows, int64_t width, float* tiles) {
  for (int64_t d = 0; d < width; d += kTileColumns) {
    for (int i = 0; i < rows; i += kTileRows) {
      tile<Element, kBlock, 1, kAdd>(g + i, right + d * summed, summed, tiles + d * kBlock + i * kTileColumns,
                                     kTileColumns);
    }
  }
}

template <class Element>
void add_transposed(const void* g, const void* right, int64_t summed, int rows, int64_t width, bool add, float* tiles) {
  const auto *left = static_cast<const float*>(g), *panels = static_cast<const float*>(right);
  add ? transposed_into_tiles<Element, true>(left, panels, summed, rows, width, tiles)
      : transposed_into_tiles<Element, false>(left, panels, summed, rows, width, tiles);
}

template <class Element>
double multiply_registers_of(int64_t repeats) {
  const float zero = 0;
  const typename Element::Operand a = Element::left(&zero);
  Vector total[kTileRows][kVectors];
  SOFTCLIP_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    SOFTCLIP_UNROLL
    for (int v = 0; v < kVectors; ++v) total[r][v] = broadcast(0);
  }
  for (int64_t k = 0; k < repeats; ++k) {
    SOFTCLIP_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      SOFTCLIP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        total[r][v] = Element::add_product(a, a, total[r][v]);
        SOFTCLIP_KEEP(total[r][v]);
      }
    }
  }
  return 2.0 * Element::kProducts * kLanes * kTileRows * kVectors * static_cast<double>(repeats);
}

// ---- The table's product functions ----

void multiply_single(const void* left, const void* right, int64_t summed, int rows, int columns, float* dots) {
  multiply_panels<Single>(static_cast<const float*>(left), static_cast<const float*>(right), summed, rows, columns,
                          dots);
}

void add_product(const float* g, const void* right, int rows, int columns, int64_t width, float* out) {
  add_panels<Single, kBlock>(g, static_cast<const float*>(right), columns, rows, width, out);
}

void add_transposed_product(const float* g, const void* right, int rows, int columns, int64_t width, bool add,
                            float* tiles) {
  add_transposed<Single>(g, right, rows, columns, width, add, tiles);
}

void add_tiles(const float* tiles, int rows, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kTileColumns, tiles += kBlock * kTileColumns) {
    const int valid = width - d < kTileColumns ? static_cast<int>(width - d) : kTileColumns;
    for (int i = 0; i < rows; ++i) {
      const float* from = tiles + i * kTileColumns;
      float* to = out + i * width + d;
      for (int c = 0; c < valid; ++c) to[c] += from[c];
    }
  }
}

#if SOFTCLIP_PAIRS

// Two bf16 an element; the instruction multiplies both and adds them to an fp32 sum.
struct Pair {
  using Operand = __m512bh;
  static constexpr int kProducts = 2;
  SOFTCLIP_MEMBER Operand right(const float* p) { return reinterpret_cast<Operand>(_mm512_loadu_si512(p)); }
  SOFTCLIP_MEMBER Operand left(const float* p) { return reinterpret_cast<Operand>(_mm512_set1_ps(*p)); }
  SOFTCLIP_MEMBER Vector add_product(Operand a, Operand b, Vector sum) { return _mm512_dpbf16_ps(sum, a, b); }
};

void multiply_pairs(const void* left, const void* right, int64_t summed, int rows, int columns, float* dots) {
  multiply_panels<Pair>(static_cast<const float*>(left), static_cast<const float*>(right), summed, rows, columns, dots);
}

void add_product_pairs(const void* column_pairs, const void* right, int rows, int columns, int64_t width, float* out) {
  add_panels<Pair, kBlock / 2>(static_cast<const float*>(column_pairs), static_cast<const float*>(right),
                               (columns + 1) / 2, rows, width, out);
}

void add_transposed_product_pairs(const void* row_pairs, const void* right, int rows, int columns, int64_t width,
                                  bool add, float* tiles) {
  add_transposed<Pair>(row_pairs, right, (rows + 1) / 2, columns, width, add, tiles);
}

SOFTCLIP_INLINE __m256i to_bfloat16(Vector v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

void narrow(const float* g, int rows, int columns, void* column_pairs, void* row_pairs) {
  const int whole = columns / kLanes * kLanes;
  const __mmask16 some = static_cast<__mmask16>((1u << (columns - whole)) - 1);  // an odd last column pairs with zero
  const __m512i zero = _mm512_setzero_si512();
  for (int i = 0; i < rows; i += 2) {
    uint16_t* by_column = static_cast<uint16_t*>(column_pairs) + int64_t{i} * kBlock;
    uint32_t* by_row = static_cast<uint32_t*>(row_pairs) + int64_t{i / 2} * kBlock;
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

#endif

void multiply(const void* left, const void* right, int64_t summed, int rows, int columns, bool pairs, float* dots) {
#if SOFTCLIP_PAIRS
  if (pairs) return multiply_pairs(left, right, summed, rows, columns, dots);
#else
  (void)pairs;
#endif
  multiply_single(left, right, summed, rows, columns, dots);
}

double multiply_registers(int64_t repeats, bool pairs) {
#if SOFTCLIP_PAIRS
  if (pairs) return multiply_registers_of<Pair>(repeats);
#else
  (void)pairs;
#endif
  return multiply_registers_of<Single>(repeats);
}
