// The matrix products of kernels.h, once for every kind of operand element that the instruction set multiplies.
// Included by level.inl.
//
// An Element says how its operands are read and multiplied:
//   Operand                       a vector of operands
//   kProducts                     products of one element: 1, or 2 for bf16x2
//   right(p), left(p)             a vector from p on; the element at p in every lane
//   add_product(a, b, sum)        sum + a * b, in floats
struct Float32 {
  using Operand = Vector;
  static constexpr int kProducts = 1;
  SOFTCLIP_INLINE Operand right(const float* p) { return load(p); }
  SOFTCLIP_INLINE Operand left(const float* p) { return broadcast(*p); }
  SOFTCLIP_INLINE Vector add_product(Operand a, Operand b, Vector sum) { return multiply_add(a, b, sum); }
};

// How many elements hold `count` values.
template <class Element>
SOFTCLIP_INLINE int64_t elements(int count) {
  return (count + Element::kProducts - 1) / Element::kProducts;
}

// The first kRows rows of a register tile: sum over k of left[k * step_k + r * step_row] times
// right[k * kTileColumns + c], stored or added to out.
template <class Element, int kRows, int kStepK, int kStepRow, bool kAdd>
SOFTCLIP_INLINE void tile(const float* left, const float* right, int64_t summed, float* out, int64_t out_step) {
  Vector total[kRows][kVectors];
  SOFTCLIP_UNROLL
  for (int r = 0; r < kRows; ++r) {
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
    for (int r = 0; r < kRows; ++r) {
      const typename Element::Operand a = Element::left(left + r * kStepRow);
      SOFTCLIP_UNROLL
      for (int v = 0; v < kVectors; ++v) total[r][v] = Element::add_product(a, b[v], total[r][v]);
    }
    left += kStepK;
    right += kTileColumns;
  }
  SOFTCLIP_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SOFTCLIP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* p = out + r * out_step + v * kLanes;
      store(p, kAdd ? load(p) + total[r][v] : total[r][v]);
    }
  }
}

// Of a tile in which a block ends, as many rows as are there, rounded up to one or two of these: in small problems such
// tiles are many. Fewer rows would not keep the multipliers busy.
constexpr int kEdgeRows = (kTileRows + 2) / 4;

template <class Element, int kStepK, int kStepRow, bool kAdd>
SOFTCLIP_INLINE void tile_of(int rows, const float* left, const float* right, int64_t summed, float* out,
                             int64_t out_step) {
  if (rows > 2 * kEdgeRows) {
    tile<Element, kTileRows, kStepK, kStepRow, kAdd>(left, right, summed, out, out_step);
  } else if (rows > kEdgeRows) {
    tile<Element, 2 * kEdgeRows, kStepK, kStepRow, kAdd>(left, right, summed, out, out_step);
  } else {
    tile<Element, kEdgeRows, kStepK, kStepRow, kAdd>(left, right, summed, out, out_step);
  }
}

// One right panel stays in the first cache while all left panels pass.
template <class Element>
void multiply(const void* left, const void* right, int64_t summed, int rows, int columns, float* dots,
              int64_t dots_step) {
  const auto *lefts = static_cast<const float*>(left), *rights = static_cast<const float*>(right);
  for (int j = 0; j < columns; j += kTileColumns) {
    for (int i = 0; i < rows; i += kTileRows) {
      tile_of<Element, kTileRows, 1, false>(rows - i, lefts + i * summed, rights + j * summed, summed,
                                            dots + i * dots_step + j, dots_step);
    }
  }
}

template <class Element>
void add_product(const void* g, const void* right, int rows, int columns, int64_t width, float* out) {
  constexpr int kRow = kBlock / Element::kProducts;  // elements from one row of G to the next
  const int64_t summed = elements<Element>(columns);
  for (int64_t d = 0; d < width; d += kTileColumns) {
    for (int i = 0; i < rows; i += kTileRows) {
      const float* left = static_cast<const float*>(g) + i * kRow;
      const float* panel = static_cast<const float*>(right) + d * summed;
      if (i + kTileRows <= rows && d + kTileColumns <= width) {
        tile<Element, kTileRows, 1, kRow, true>(left, panel, summed, out + i * width + d, width);
        continue;
      }
      float edge[kTileRows * kTileColumns];
      tile_of<Element, 1, kRow, false>(rows - i, left, panel, summed, edge, kTileColumns);
      const int some_rows = rows - i < kTileRows ? rows - i : kTileRows;
      const int some_columns = width - d < kTileColumns ? static_cast<int>(width - d) : kTileColumns;
      for (int r = 0; r < some_rows; ++r) {
        for (int c = 0; c < some_columns; ++c) out[(i + r) * width + d + c] += edge[r * kTileColumns + c];
      }
    }
  }
}

// Rows past the end come from whatever lies there; add_tiles leaves them out.
template <class Element, bool kAdd>
void transposed_product(const float* g, const float* right, int64_t summed, int columns, int64_t width, float* tiles) {
  for (int64_t d = 0; d < width; d += kTileColumns) {
    for (int j = 0; j < columns; j += kTileRows) {
      tile_of<Element, kBlock, 1, kAdd>(columns - j, g + j, right + d * summed, summed,
                                        tiles + d * kBlock + j * kTileColumns, kTileColumns);
    }
  }
}

template <class Element>
void add_transposed_product(const void* g, const void* right, int rows, int columns, int64_t width, bool add,
                            float* tiles) {
  const auto *left = static_cast<const float*>(g), *panels = static_cast<const float*>(right);
  const int64_t summed = elements<Element>(rows);
  add ? transposed_product<Element, true>(left, panels, summed, columns, width, tiles)
      : transposed_product<Element, false>(left, panels, summed, columns, width, tiles);
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

template <class Element>
double multiply_registers(int64_t repeats) {
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

template <class Element>
constexpr ProductKernels product_kernels() {
  return {multiply<Element>, add_product<Element>, add_transposed_product<Element>, multiply_registers<Element>};
}
