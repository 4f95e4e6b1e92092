// What a block operation works on, and what comes out: plain memory that knows nothing of who computes on it. The
// fields are those of softclip_kernels/problem.py.
//
// Legend, here and in every file: N rows (images), M columns (texts), D embedding width, E a teacher's embedding width,
// K teachers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace softclip {

enum class Dtype : int { float32 = 0, bfloat16 = 1 };

// (rows, width), steps in elements.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, width = 0, row_step = 0, column_step = 0;
  Dtype dtype = Dtype::float32;
};

// Where a teacher's logits come from; the numbers are those of softclip_kernels/problem.py.
enum class Source : int { embeddings = 0, logits = 1, transposed = 2 };

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
  const int64_t* positive_column = nullptr;  // (N,) or null; outside [0, M): not in this block
  const int32_t* row_segment = nullptr;      // (N,) or null
  const int32_t* column_segment = nullptr;   // (M,)
  std::vector<Teacher> teachers;
  const float* row_threshold = nullptr;     // (N,) or null
  const float* column_threshold = nullptr;  // (M,)
};

// The softmax statistics along one direction, (1 + 2K, length) in one piece of memory. Float: float or const float.
template <class Float>
struct PackedStatistics {
  Float* data;
  int64_t length;

  Float* log_sum_exp() const { return data; }
  Float* teacher_log_sum_exp(size_t teacher) const { return data + (1 + 2 * static_cast<int64_t>(teacher)) * length; }
  Float* teacher_mean(size_t teacher) const { return data + (2 + 2 * static_cast<int64_t>(teacher)) * length; }
};

// What a forward returns.
struct Statistics {
  PackedStatistics<float> rows, columns;  // length N, length M
  float* positive_logit;                  // (N,), 0 where it is in another block; or null
  int64_t *row_ranks, *column_ranks;      // (N,), (M,), or null
};

// A number for every row or column: number * data[i * step], or one for all.
struct Coefficient {
  const float* data = nullptr;  // null: 1
  int64_t step = 0;
  double number = 1;

  double at(int64_t i) const { return data == nullptr ? number : number * data[i * step]; }
};

// One direction's losses, linear in its statistics, as softclip_kernels/linear_form.py has them:
// weight * (mass * log-sum-exp - dot * positive's logit - sum_k mean_k * teacher's mean_k). Of a backward it is that of
// which the loss is the sum, so that these are the gradients.
struct LinearForm {
  Coefficient mass, dot, weight;
  std::vector<Coefficient> means;  // K
  bool segmented = false;          // a row may see nothing: its log-sum-exp is -inf, and counts 0

  // With respect to the log-sum-exp and then each teacher's mean; to the positive's logit.
  double gradient(size_t distribution, int64_t i) const {
    return weight.at(i) * (distribution == 0 ? mass.at(i) : -means[distribution - 1].at(i));
  }
  double positive_gradient(int64_t i) const { return -weight.at(i) * dot.at(i); }
};

// A gradient that goes out, (rows, D) contiguous, of undefined contents before. Null: not wanted.
struct Outgoing {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
};

// What a backward reads, and writes.
struct Gradients {
  PackedStatistics<const float> rows, columns;  // of the forward
  const float* positive_logit;                  // (N,) of the forward, or null without positives
  LinearForm row_form, column_form;             // a row's positive counts along both, also along its column
  Outgoing dx, dy;
  float* dscale;  // one number, or null: not wanted
};

}  // namespace softclip
