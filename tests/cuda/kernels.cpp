// The kernels of csrc/cuda/ for Python: compiled with the macros that a specialization defines, and FORWARD or
// BACKWARD.
#include "emulator.h"
// After it, because it takes the place of ptx.cuh.
#if defined(BACKWARD)
#include "softmax_backward.cu"
#elif PAIR
#include "softmax_forward_pair.cu"
#else
#include "softmax_forward.cu"
#endif

namespace {

struct Matrix {
  const void* base;
  ptx::u64 columns, rows, row_bytes;

  ptx::TensorMap in_boxes(int box_columns, int box_rows) const {
    return emulator::tensor_map(base, columns, rows, row_bytes, box_columns, box_rows);
  }
};

}  // namespace

#if defined(BACKWARD)
using Kernel = Entries;
#elif PAIR
using Kernel = PairSums;
#else
using Kernel = Sums;
#endif
constexpr int kBytes = Barriers<Kernel::kBytes>::kOffset + Barriers<Kernel::kBytes>::kBytes;

extern "C" int shared_bytes() { return kBytes; }

#if defined(BACKWARD)
extern "C" int backward(ptx::u64 seed, int blocks, const Matrix& x, const Matrix& y, const Matrix& g,
                        const Matrix& mirror_g, const long long* positive_column, const float* scalars,
                        const float* row_coefficient, const float* row_exponent, const signed char* row_in_range,
                        const float* column_coefficient, const float* column_exponent,
                        const signed char* column_in_range, const float* mirror_row_coefficient,
                        const float* mirror_row_exponent, const float* mirror_column_coefficient,
                        const float* mirror_column_exponent, int put, int mirror_put, const int* range, char* message,
                        ptx::u64 size) {
  return emulator::guarded(message, size, [&] {
    const ptx::TensorMap of_x = x.in_boxes(kDepth, kStageRows), of_y = y.in_boxes(kDepth, kColumns);
    const ptx::TensorMap of_g = g.in_boxes(Entries::kBoxColumns, kStageRows);
    const ptx::TensorMap of_mirror = mirror_g.in_boxes(Entries::kBoxColumns, kStageRows);
    emulator::launch(blocks, kBytes, kThreads, seed, [&] {
      softmax_backward(of_x, of_y, of_g, of_mirror, positive_column, scalars, row_coefficient, row_exponent,
                       row_in_range, column_coefficient, column_exponent, column_in_range, mirror_row_coefficient,
                       mirror_row_exponent, mirror_column_coefficient, mirror_column_exponent, put, mirror_put,
                       range[0], range[1], range[2], range[3]);
    });
  });
}
#elif PAIR
extern "C" int forward_pair(ptx::u64 seed, int blocks, const Matrix& x, const Matrix& y, const Matrix& teacher_x,
                            const Matrix& teacher_y, const long long* positive_column, const float* scalars,
                            float* row_sums, float* column_sums, float* mirror_row_sums, float* mirror_column_sums,
                            float* positive_logit, const int* range, int edge, char* message, ptx::u64 size) {
  return emulator::guarded(message, size, [&] {
    const ptx::TensorMap of_x = x.in_boxes(kDepth, kStageRows), of_y = y.in_boxes(kDepth, kColumns);
    const ptx::TensorMap of_teacher_x = teacher_x.in_boxes(kDepth, kStageRows);
    const ptx::TensorMap of_teacher_y = teacher_y.in_boxes(kDepth, kColumns);
    emulator::launch(blocks, kBytes, kThreads, seed, [&] {
      softmax_forward_pair(of_x, of_y, of_teacher_x, of_teacher_y, positive_column, scalars, row_sums, column_sums,
                           mirror_row_sums, mirror_column_sums, positive_logit, range[0], range[1], range[2], range[3],
                           edge);
    });
  });
}
#else
extern "C" int forward(ptx::u64 seed, int blocks, const Matrix& x, const Matrix& y, const long long* positive_column,
                       const float* scalars, float* row_sums, float* column_sums, float* positive_logit,
                       const int* range, int edge, char* message, ptx::u64 size) {
  return emulator::guarded(message, size, [&] {
    const ptx::TensorMap of_x = x.in_boxes(kDepth, kStageRows), of_y = y.in_boxes(kDepth, kColumns);
    emulator::launch(blocks, kBytes, kThreads, seed, [&] {
      softmax_forward(of_x, of_y, positive_column, scalars, row_sums, column_sums, positive_logit, range[0], range[1],
                      range[2], range[3], edge);
    });
  });
}
#endif
