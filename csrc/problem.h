// The two block operations of the library's Backend protocol (softclip_kernels/backends/__init__.py) over plain memory.
#pragma once

#include <functional>
#include <vector>

#include "kernels.h"

namespace softclip {

enum class Source : int { embeddings = 0, logits = 1, transposed = 2 };  // as in softclip_kernels/problem.py

struct Teacher {
  Source source = Source::logits;
  double scale = 1;
  Matrix x, y;                         // (N, E) and (M, E), only with Source::embeddings
  const float* row_bias = nullptr;     // (N,) or null: zero
  const float* column_bias = nullptr;  // (M,)
};

struct Problem {
  Matrix x, y;  // (N, D), (M, D)
  double scale = 1;
  const int64_t* positive = nullptr;        // (N,) or null; outside [0, M): not in this block
  const int32_t* row_segment = nullptr;     // (N,) or null
  const int32_t* column_segment = nullptr;  // (M,)
  std::vector<Teacher> teachers;
  const float* row_threshold = nullptr;     // (N,) or null
  const float* column_threshold = nullptr;  // (M,)
};

struct Statistics {
  float *rows, *columns;            // (1 + 2K, N), (1 + 2K, M)
  float* positive;                  // (N,) zero on entry, or null
  int64_t *row_ranks, *column_ranks;  // (N,), (M,) zero on entry, or null
};

struct Gradients {
  const float *rows, *columns;            // Statistics of the forward
  const float *grad_rows, *grad_columns;  // (1 + K, N), (1 + K, M)
  float *gx, *gy;                         // (N, D), (M, D) contiguous, zero on entry; null: not wanted
};

// At most `threads` threads. `poll` is called on the calling thread during long calls; false cancels, and so does the
// return value. `redone`: how many blocks and distributions were summed twice, because a term had outgrown its
// reference.
bool forward(const Kernels&, const Problem&, const Statistics&, int threads, const std::function<bool()>& poll,
             int64_t* redone);
bool backward(const Kernels&, const Problem&, const Gradients&, int threads, const std::function<bool()>& poll);

}  // namespace softclip
