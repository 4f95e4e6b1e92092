#include "tensors.h"

#include <string>

namespace py = pybind11;

namespace softclip {
namespace {

// Strings that are made once: to make them again for every attribute would cost more than the attribute.
struct Names {
#define SOFTCLIP_NAME(name) PyObject* const name = PyUnicode_InternFromString(#name)
  SOFTCLIP_NAME(data_ptr);
  SOFTCLIP_NAME(dtype);
  SOFTCLIP_NAME(dim);
  SOFTCLIP_NAME(size);
  SOFTCLIP_NAME(stride);
  SOFTCLIP_NAME(is_neg);
  SOFTCLIP_NAME(is_contiguous);
  SOFTCLIP_NAME(detach);
  SOFTCLIP_NAME(to);
  SOFTCLIP_NAME(resolve_neg);
  SOFTCLIP_NAME(contiguous);
  // of Problem and TeacherOperand
  SOFTCLIP_NAME(x);
  SOFTCLIP_NAME(y);
  SOFTCLIP_NAME(scale);
  SOFTCLIP_NAME(positive_column);
  SOFTCLIP_NAME(row_segment);
  SOFTCLIP_NAME(column_segment);
  SOFTCLIP_NAME(row_threshold);
  SOFTCLIP_NAME(column_threshold);
  SOFTCLIP_NAME(teachers);
  SOFTCLIP_NAME(source);
  SOFTCLIP_NAME(row_bias);
  SOFTCLIP_NAME(column_bias);
  // of LinearForm
  SOFTCLIP_NAME(mass);
  SOFTCLIP_NAME(dots);
  SOFTCLIP_NAME(means);
  SOFTCLIP_NAME(weight);
  SOFTCLIP_NAME(seen);
#undef SOFTCLIP_NAME
};

// As long as the process lives: at its end there may be no Python left to give them back to.
const Names& names() {
  static const Names* const made = new Names;
  return *made;
}

struct Dtypes {
  const py::object float32, bfloat16, int32, int64;
  explicit Dtypes(const py::module_& torch)
      : float32(torch.attr("float32")),
        bfloat16(torch.attr("bfloat16")),
        int32(torch.attr("int32")),
        int64(torch.attr("int64")) {}
};

const Dtypes& dtypes() {
  static const Dtypes* const found = new Dtypes(py::module_::import("torch"));
  return *found;
}

template <class T>
py::handle dtype_of();
template <>
py::handle dtype_of<float>() {
  return dtypes().float32;
}
template <>
py::handle dtype_of<int32_t>() {
  return dtypes().int32;
}
template <>
py::handle dtype_of<int64_t>() {
  return dtypes().int64;
}

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object get(py::handle object, PyObject* name) { return owned(PyObject_GetAttr(object.ptr(), name)); }

template <class... Arguments>
py::object call(py::handle object, PyObject* method, Arguments... arguments) {
  return owned(PyObject_CallMethodObjArgs(object.ptr(), method, arguments..., nullptr));
}

int64_t integer(const py::object& value) {
  const int64_t result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

bool is(py::handle tensor, PyObject* question) { return call(tensor, question).ptr() == Py_True; }

bool has_dtype(py::handle tensor, py::handle dtype) { return get(tensor, names().dtype).is(dtype); }

int64_t stride(py::handle tensor, int dimension) {
  return integer(call(tensor, names().stride, py::int_(dimension).ptr()));
}

void expect(int64_t length, int64_t expected) {
  if (length == expected) return;
  const std::string message = std::to_string(length) + " elements, not " + std::to_string(expected);
  PyErr_SetString(PyExc_AssertionError, message.c_str());
  throw py::error_already_set();
}

// In whose memory the numbers are themselves: not those of which others are the negatives.
py::object resolved(py::handle tensor, py::handle dtype) {
  const py::object detached = call(tensor, names().detach);
  return call(call(detached, names().to, dtype.ptr()), names().resolve_neg);
}

}  // namespace

int64_t size(py::handle tensor, int dimension) {
  return integer(call(tensor, names().size, py::int_(dimension).ptr()));
}

template <class T>
T* elements(py::handle tensor) {
  if (tensor.is_none()) return nullptr;
  return reinterpret_cast<T*>(integer(call(tensor, names().data_ptr)));
}

Matrix Tensors::matrix(py::handle tensor) {
  const bool bfloat16 = has_dtype(tensor, dtypes().bfloat16);
  if (is(tensor, names().is_neg) || !(bfloat16 || has_dtype(tensor, dtypes().float32))) {
    copies_.push_back(resolved(tensor, bfloat16 ? dtypes().bfloat16 : dtypes().float32));
    tensor = copies_.back();
  }
  return {elements<const void>(tensor),
          size(tensor, 0),
          size(tensor, 1),
          stride(tensor, 0),
          stride(tensor, 1),
          bfloat16 ? Dtype::bfloat16 : Dtype::float32};
}

template <class T>
const T* Tensors::vector(py::handle tensor, int64_t length) {
  if (tensor.is_none()) return nullptr;
  expect(size(tensor, 0), length);
  const py::handle dtype = dtype_of<T>();
  if (!has_dtype(tensor, dtype) || is(tensor, names().is_neg) || !is(tensor, names().is_contiguous)) {
    copies_.push_back(call(resolved(tensor, dtype), names().contiguous));
    tensor = copies_.back();
  }
  return elements<const T>(tensor);
}

PackedStatistics<const float> Tensors::statistics(py::handle packed, int64_t teachers, int64_t length) {
  expect(size(packed, 1), length);
  return {vector<float>(packed, 1 + 2 * teachers), length};
}

Teacher Tensors::teacher(py::handle teacher, int64_t rows, int64_t columns) {
  Teacher result;
  result.source = static_cast<Source>(integer(get(teacher, names().source)));
  if (const py::object scale = get(teacher, names().scale); !scale.is_none()) {
    result.scale = coefficient(scale, 1).at(0);
  }
  if (result.source == Source::embeddings) {
    result.x = matrix(get(teacher, names().x));
    result.y = matrix(get(teacher, names().y));
    expect(result.x.rows, rows);
    expect(result.y.rows, columns);
  }
  if (result.source == Source::transposed) expect(columns, rows);
  result.row_bias = vector<float>(get(teacher, names().row_bias), rows);
  result.column_bias = vector<float>(get(teacher, names().column_bias), columns);
  return result;
}

Problem Tensors::problem(py::handle problem) {
  Problem result;
  result.x = matrix(get(problem, names().x));
  result.y = matrix(get(problem, names().y));
  expect(result.y.width, result.x.width);
  const int64_t rows = result.x.rows, columns = result.y.rows;
  result.scale = coefficient(get(problem, names().scale), 1).at(0);
  result.positive_column = vector<int64_t>(get(problem, names().positive_column), rows);
  result.row_segment = vector<int32_t>(get(problem, names().row_segment), rows);
  result.column_segment = vector<int32_t>(get(problem, names().column_segment), columns);
  result.row_threshold = vector<float>(get(problem, names().row_threshold), rows);
  result.column_threshold = vector<float>(get(problem, names().column_threshold), columns);
  for (const py::handle each : py::tuple(get(problem, names().teachers))) {
    result.teachers.push_back(teacher(each, rows, columns));
  }
  return result;
}

LinearForm Tensors::linear_form(py::handle form, double share, int64_t teachers, int64_t length) {
  const Coefficient zero{nullptr, 0, 0};
  if (form.is_none()) return {zero, zero, zero, std::vector<Coefficient>(teachers, zero), false};
  LinearForm result;
  result.mass = coefficient(get(form, names().mass), length);
  const py::tuple dots = get(form, names().dots), means = get(form, names().means);
  expect(static_cast<int64_t>(means.size()), teachers);
  result.dot = dots.empty() ? zero : coefficient(dots[0], length);
  for (const py::handle mean : means) result.means.push_back(coefficient(mean, length));
  result.weight = coefficient(get(form, names().weight), length, share);
  result.segmented = !get(form, names().seen).is_none();
  return result;
}

Coefficient Tensors::coefficient(py::handle value, int64_t length, double factor) {
  if (PyFloat_Check(value.ptr()) || PyObject_HasAttr(value.ptr(), names().data_ptr) == 0) {
    return {nullptr, 0, value.cast<double>() * factor};
  }
  const bool one = integer(call(value, names().dim)) == 0;
  if (!one) expect(size(value, 0), length);
  if (!has_dtype(value, dtypes().float32) || is(value, names().is_neg)) {
    copies_.push_back(resolved(value, dtypes().float32));
    value = copies_.back();
  }
  return {elements<const float>(value), one ? 0 : stride(value, 0), factor};
}

template const float* Tensors::vector<float>(py::handle, int64_t);
template const int32_t* Tensors::vector<int32_t>(py::handle, int64_t);
template const int64_t* Tensors::vector<int64_t>(py::handle, int64_t);
template float* elements<float>(py::handle);
template const float* elements<const float>(py::handle);
template int64_t* elements<int64_t>(py::handle);
template void* elements<void>(py::handle);

}  // namespace softclip
