// PyTorch's tensors, and the library's own Python objects that hold some, read through their Python interface, so that
// one build serves every version of PyTorch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../problem.h"

namespace softclip {

// What the operands of one call are in memory, and whatever of it was made for the call. Needs the GIL. None is a null
// pointer. A length that does not fit raises AssertionError: C++ reads as many elements as it is told, whatever lies
// there.
class Tensors {
 public:
  // (N, D), of any strides. What is neither float32 nor bfloat16, a teacher's, is widened or rounded to float32.
  Matrix matrix(pybind11::handle tensor);
  // (length,) or (length, ...), contiguous, of element type T: float, int32_t or int64_t. What is not so is copied.
  template <class T>
  const T* vector(pybind11::handle tensor, int64_t length);
  // (1 + 2K, length)
  PackedStatistics<const float> statistics(pybind11::handle packed, int64_t teachers, int64_t length);
  // The fields of the same names of softclip_kernels/problem.py.
  Problem problem(pybind11::handle problem);
  // Of softclip_kernels/linear_form.py, its losses, of `length` rows or columns, times `share`; None: 0.
  LinearForm linear_form(pybind11::handle form, double share, int64_t teachers, int64_t length);

 private:
  Teacher teacher(pybind11::handle teacher, int64_t rows, int64_t columns);
  Coefficient coefficient(pybind11::handle value, int64_t length, double factor = 1);
  std::vector<pybind11::object> copies_;
};

int64_t size(pybind11::handle tensor, int dimension);

// Where a tensor's elements lie; null for None and for a tensor without elements.
template <class T>
T* elements(pybind11::handle tensor);

}  // namespace softclip
