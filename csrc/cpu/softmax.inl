// What becomes of a block of dots: maxima, sums of exponentials, the gradient G, counts (kernels.h). Included by
// level.inl.

struct Power {
  Vector fraction;  // 2^f, f in [-1/2, 1/2]
  Vector exponent;  // a whole number
};

// 2^(factor * dot). The fraction of the exponent comes out of one fused multiply-subtract, so a large exponent costs no
// digits. A polynomial of degree 6, relative error 2e-9 before rounding, exact at 0. Exponents above 2^24 have no
// fraction but the rounding of the product, which above 2^47 would leave the polynomial's range: it is cut off, NaN is
// not.
SOFTCLIP_INLINE Power power_of_two(Vector dot, Vector factor, Vector factor_low) {
  const Vector n = nearest(dot * factor);
  const Vector exact = multiply_add(dot, factor_low, multiply_subtract(dot, factor, n));
  const Vector f = minimum(broadcast(1), maximum(broadcast(-1), exact));
  Vector p = multiply_add(broadcast(1.5353362e-4f), f, broadcast(1.33988745e-3f));
  p = multiply_add(p, f, broadcast(9.61843736e-3f));
  p = multiply_add(p, f, broadcast(5.55033247e-2f));
  p = multiply_add(p, f, broadcast(2.40226479e-1f));
  p = multiply_add(p, f, broadcast(6.93147203e-1f));
  return {multiply_add(p, f, broadcast(1)), n};
}

template <bool kBias, bool kMask>
void maxima_of(const Weights& w, float* row_maximum, float* column_maximum) {
  const Vector factor = broadcast(w.factor), excluded = broadcast(kExcluded);
  for (int j = 0; j < w.columns; j += kLanes) store(column_maximum + j, excluded);
  for (int i = 0; i < w.rows; ++i) {
    const float* dots = w.dots + i * w.dots_step;
    const Vector row_exponent = broadcast(kBias ? w.row_exponent[i] : 0);
    Vector row = excluded;
    for (int j = 0; j < w.columns; j += kLanes) {
      Vector exponent = load(dots + j) * factor;
      if (kMask) exponent = where_equal(w.column_segment + j, w.row_segment[i], exponent, excluded);
      row = maximum(row, exponent + load(w.column_exponent + j));
      store(column_maximum + j, maximum(load(column_maximum + j), kBias ? exponent + row_exponent : exponent));
    }
    row_maximum[i] = largest(row);
  }
}

template <bool kBias, bool kMask, bool kDots>
void accumulate_of(const Weights& w, const BlockSums& s) {
  const Vector factor = broadcast(w.factor), factor_low = broadcast(w.factor_low), excluded = broadcast(kExcluded);
  for (int j = 0; j < w.columns; j += kLanes) {
    store(s.column_sum + j, broadcast(0));
    if (kDots) store(s.column_dot + j, broadcast(0));
  }
  for (int i = 0; i < w.rows; ++i) {
    const int64_t at = i * w.dots_step;
    const Vector row_reference = broadcast(s.row_reference[i]);
    const Vector row_exponent = broadcast(kBias ? w.row_exponent[i] : 0);
    const Vector row_factor = broadcast(kBias ? w.row_factor[i] : 1);
    Vector row_sum = broadcast(0), row_dot = broadcast(0);
    for (int j = 0; j < w.columns; j += kLanes) {
      Power power = power_of_two(load(w.dots + at + j), factor, factor_low);
      if (kMask) power.exponent = where_equal(w.column_segment + j, w.row_segment[i], power.exponent, excluded);
      Vector along_row = scale_by_power(power.fraction, power.exponent + load(w.column_exponent + j) - row_reference);
      const Vector column_exponent = kBias ? power.exponent + row_exponent : power.exponent;
      Vector along_column = scale_by_power(power.fraction, column_exponent - load(s.column_reference + j));
      if (kBias) along_row = along_row * load(w.column_factor + j), along_column = along_column * row_factor;
      row_sum = row_sum + along_row;
      store(s.column_sum + j, load(s.column_sum + j) + along_column);
      if (kDots) {
        const Vector other = load(s.other + at + j);
        row_dot = multiply_add(along_row, other, row_dot);
        store(s.column_dot + j, multiply_add(along_column, other, load(s.column_dot + j)));
      }
    }
    s.row_sum[i] = sum(row_sum);
    if (kDots) s.row_dot[i] = sum(row_dot);
  }
}

template <bool kBias, bool kMask, bool kAdd>
void gradient_of(const Weights& w, const Coefficients& c, float* g) {
  const Vector factor = broadcast(w.factor), factor_low = broadcast(w.factor_low), excluded = broadcast(kExcluded);
  for (int i = 0; i < w.rows; ++i) {
    const float* dots = w.dots + i * w.dots_step;
    float* g_row = g + int64_t{i} * kBlock;
    const Vector row_reference = broadcast(c.row_reference[i]), row = broadcast(c.row[i]);
    const Vector row_exponent = broadcast(kBias ? w.row_exponent[i] : 0);
    const Vector row_factor = broadcast(kBias ? w.row_factor[i] : 1);
    for (int j = 0; j < w.columns; j += kLanes) {
      Power power = power_of_two(load(dots + j), factor, factor_low);
      if (kMask) power.exponent = where_equal(w.column_segment + j, w.row_segment[i], power.exponent, excluded);
      Vector along_row = scale_by_power(power.fraction, power.exponent + load(w.column_exponent + j) - row_reference);
      const Vector column_exponent = kBias ? power.exponent + row_exponent : power.exponent;
      Vector along_column = scale_by_power(power.fraction, column_exponent - load(c.column_reference + j));
      if (kBias) along_row = along_row * load(w.column_factor + j), along_column = along_column * row_factor;
      Vector result = along_column * load(c.column + j);
      if (kAdd) result = result + load(g_row + j);
      store(g_row + j, multiply_add(along_row, row, result));
    }
  }
}

// One exponential for each of the two dots serves four probabilities, and those the G of block and mirror.
void mirrored_gradient(const MirroredGradient& block, const MirroredGradient& mirror, float factor_high,
                       float factor_rest, int rows, int columns) {
  const Vector factor = broadcast(factor_high), factor_low = broadcast(factor_rest);
  for (int i = 0; i < rows; ++i) {
    const float *dots = block.dots + i * block.dots_step, *mirror_dots = mirror.dots + i * mirror.dots_step;
    const int64_t at = int64_t{i} * kBlock;
    const Vector row_reference = broadcast(block.student.row_reference[i]), row = broadcast(block.student.row[i]);
    const Vector teacher_row = broadcast(block.teacher.row[i]);
    const Vector mirror_row_reference = broadcast(mirror.student.row_reference[i]);
    const Vector mirror_row = broadcast(mirror.student.row[i]);
    const Vector mirror_teacher_row = broadcast(mirror.teacher.row[i]);
    for (int j = 0; j < columns; j += kLanes) {
      const Power power = power_of_two(load(dots + j), factor, factor_low);
      const Power mirror_power = power_of_two(load(mirror_dots + j), factor, factor_low);
      // The probabilities along the row (p) and along the column (q).
      const Vector p = scale_by_power(power.fraction, power.exponent - row_reference);
      const Vector q = scale_by_power(power.fraction, power.exponent - load(block.student.column_reference + j));
      const Vector mirror_p = scale_by_power(mirror_power.fraction, mirror_power.exponent - mirror_row_reference);
      const Vector mirror_q =
          scale_by_power(mirror_power.fraction, mirror_power.exponent - load(mirror.student.column_reference + j));
      Vector g = q * load(block.student.column + j), mirror_g = mirror_q * load(mirror.student.column + j);
      g = multiply_add(mirror_q, load(block.teacher.column + j), multiply_add(p, row, g));
      mirror_g = multiply_add(q, load(mirror.teacher.column + j), multiply_add(mirror_p, mirror_row, mirror_g));
      store(block.g + at + j, multiply_add(mirror_p, teacher_row, g));
      store(mirror.g + at + j, multiply_add(p, mirror_teacher_row, mirror_g));
    }
  }
}

void maxima(const Weights& w, float* row_maximum, float* column_maximum) {
  const bool bias = w.column_factor != nullptr, mask = w.row_segment != nullptr;
  if (bias) {
    return mask ? maxima_of<true, true>(w, row_maximum, column_maximum)
                : maxima_of<true, false>(w, row_maximum, column_maximum);
  }
  mask ? maxima_of<false, true>(w, row_maximum, column_maximum)
       : maxima_of<false, false>(w, row_maximum, column_maximum);
}

template <bool kBias, bool kMask>
void accumulate_dots(const Weights& w, const BlockSums& s) {
  s.other != nullptr ? accumulate_of<kBias, kMask, true>(w, s) : accumulate_of<kBias, kMask, false>(w, s);
}

void accumulate(const Weights& w, const BlockSums& s) {
  const bool bias = w.column_factor != nullptr, mask = w.row_segment != nullptr;
  if (bias) return mask ? accumulate_dots<true, true>(w, s) : accumulate_dots<true, false>(w, s);
  mask ? accumulate_dots<false, true>(w, s) : accumulate_dots<false, false>(w, s);
}

template <bool kBias, bool kMask>
void gradient_add(const Weights& w, const Coefficients& c, bool add, float* g) {
  add ? gradient_of<kBias, kMask, true>(w, c, g) : gradient_of<kBias, kMask, false>(w, c, g);
}

void gradient(const Weights& w, const Coefficients& c, bool add, float* g) {
  const bool bias = w.column_factor != nullptr, mask = w.row_segment != nullptr;
  if (bias) return mask ? gradient_add<true, true>(w, c, add, g) : gradient_add<true, false>(w, c, add, g);
  mask ? gradient_add<false, true>(w, c, add, g) : gradient_add<false, false>(w, c, add, g);
}

void count_above(const Weights& w, float scale, const float* row_threshold, const float* column_threshold,
                 float* row_count, float* column_count) {
  const Vector empty = broadcast(kEmpty);
  for (int j = 0; j < w.columns; j += kLanes) store(column_count + j, broadcast(0));
  for (int i = 0; i < w.rows; ++i) {
    const float* dots = w.dots + i * w.dots_step;
    const Vector threshold = maximum(broadcast(row_threshold[i]), empty);  // excluded pairs lie below -inf, too
    Vector count = broadcast(0);
    for (int j = 0; j < w.columns; j += kLanes) {
      // Columns past the block's end have an exponent of kExcluded: below every threshold.
      Vector z = load(dots + j) * broadcast(scale) + load(w.column_exponent + j);
      if (w.row_segment != nullptr) z = where_equal(w.column_segment + j, w.row_segment[i], z, broadcast(kExcluded));
      count = count + one_where_above(z, threshold);
      store(column_count + j, load(column_count + j) + one_where_above(z, maximum(load(column_threshold + j), empty)));
    }
    row_count[i] = sum(count);
  }
}
