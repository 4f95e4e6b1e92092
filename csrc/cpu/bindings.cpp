// The Python module softclip_kernels._cpu. Tensors arrive as addresses, sizes and strides, so that one build serves
// every version of PyTorch. softclip_kernels/backends/cpu.py, the only caller, has checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "levels.h"
#include "linear_form.h"
#include "openmp.h"
#include "operations.h"
#include "schedule.h"
#include "stopwatch.h"
#include "team.h"

namespace py = pybind11;
using namespace softclip;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& kernels_of(const std::string& name) {
  for (const Level& level : supported_levels()) {
    if (name == level.name) return *level.kernels;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not supported on this machine");
}

// (address or 0, step, number)
using PyCoefficient = std::tuple<Address, int64_t, double>;

Coefficient coefficient(const PyCoefficient& given) {
  return {pointer<const float>(std::get<0>(given)), std::get<1>(given), std::get<2>(given)};
}

std::vector<Coefficient> coefficients(const std::vector<PyCoefficient>& given) {
  std::vector<Coefficient> result;
  for (const PyCoefficient& each : given) result.push_back(coefficient(each));
  return result;
}

// Runs an operation without the GIL, looking for Ctrl-C now and then.
template <class Operation>
void interruptible(const Operation& operation) {
  bool finished;
  {
    const py::gil_scoped_release release;
    finished = operation([] {
      const py::gil_scoped_acquire acquire;
      return PyErr_CheckSignals() == 0;
    });
  }
  if (!finished) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  py::class_<Matrix>(module, "Matrix")
      .def(
          py::init([](Address data, int64_t rows, int64_t width, int64_t row_step, int64_t column_step, bool bfloat16) {
            return Matrix{pointer<const void>(data),
                          rows,
                          width,
                          row_step,
                          column_step,
                          bfloat16 ? Dtype::bfloat16 : Dtype::float32};
          }),
          py::arg("data"), py::arg("rows"), py::arg("width"), py::arg("row_step"), py::arg("column_step"),
          py::arg("bfloat16"));

  py::class_<Teacher>(module, "Teacher")
      .def(py::init(
               [](int source, Address scale, const Matrix* x, const Matrix* y, Address row_bias, Address column_bias) {
                 return Teacher{static_cast<Source>(source),
                                scale ? *pointer<const float>(scale) : 1.0,
                                x ? *x : Matrix{},
                                y ? *y : Matrix{},
                                pointer<const float>(row_bias),
                                pointer<const float>(column_bias)};
               }),
           py::arg("source"), py::arg("scale"), py::arg("x").none(true), py::arg("y").none(true), py::arg("row_bias"),
           py::arg("column_bias"));

  py::class_<Problem>(module, "Problem")
      .def(py::init([](const Matrix& x, const Matrix& y, Address scale, std::vector<Teacher> teachers,
                       Address positive_column, Address row_segment, Address column_segment, Address row_threshold,
                       Address column_threshold) {
             return Problem{x,
                            y,
                            *pointer<const float>(scale),
                            pointer<const int64_t>(positive_column),
                            pointer<const int32_t>(row_segment),
                            pointer<const int32_t>(column_segment),
                            std::move(teachers),
                            pointer<const float>(row_threshold),
                            pointer<const float>(column_threshold)};
           }),
           py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("teachers"), py::kw_only(), py::arg("positive_column"),
           py::arg("row_segment"), py::arg("column_segment"), py::arg("row_threshold"), py::arg("column_threshold"));

  py::class_<LinearForm>(module, "LinearForm")
      .def(py::init([](const PyCoefficient& mass, const PyCoefficient& dot, const PyCoefficient& weight,
                       const std::vector<PyCoefficient>& means, bool segmented) {
             return LinearForm{coefficient(mass), coefficient(dot), coefficient(weight), coefficients(means),
                               segmented};
           }),
           py::arg("mass"), py::arg("dot"), py::arg("weight"), py::arg("means"), py::arg("segmented"));

  module.def(
      "forward",
      [](const Problem& problem, const std::string& level, int threads, Address rows, Address columns,
         Address positive_logit, Address row_ranks, Address column_ranks, Address kept) {
        const Kernels& kernels = kernels_of(level);
        const Statistics out{{pointer<float>(rows), problem.x.rows},
                             {pointer<float>(columns), problem.y.rows},
                             pointer<float>(positive_logit),
                             pointer<int64_t>(row_ranks),
                             pointer<int64_t>(column_ranks)};
        int64_t summed_twice = 0;
        interruptible([&](const Poll& poll) {
          return forward(kernels, problem, out, threads, poll, &summed_twice, pointer<float>(kept));
        });
        return summed_twice;
      },
      py::arg("problem"), py::arg("level"), py::arg("threads"), py::kw_only(), py::arg("rows"), py::arg("columns"),
      py::arg("positive_logit"), py::arg("row_ranks"), py::arg("column_ranks"), py::arg("kept"),
      "How many blocks were summed twice, because a term had outgrown the reference of its row or column.");

  module.def(
      "backward",
      [](const Problem& problem, const std::string& level, int threads, Address rows, Address columns,
         Address positive_logit, const LinearForm& row_form, const LinearForm& column_form, Address dx, Address dy,
         Address dscale, bool rounded, Address kept) {
        const Kernels& kernels = kernels_of(level);
        const Gradients in{{pointer<const float>(rows), problem.x.rows},
                           {pointer<const float>(columns), problem.y.rows},
                           pointer<const float>(positive_logit),
                           row_form,
                           column_form,
                           {pointer<void>(dx), rounded ? problem.x.dtype : Dtype::float32},
                           {pointer<void>(dy), rounded ? problem.y.dtype : Dtype::float32},
                           pointer<float>(dscale)};
        interruptible(
            [&](const Poll& poll) { return backward(kernels, problem, in, threads, poll, pointer<float>(kept)); });
      },
      py::arg("problem"), py::arg("level"), py::arg("threads"), py::kw_only(), py::arg("rows"), py::arg("columns"),
      py::arg("positive_logit"), py::arg("row_form"), py::arg("column_form"), py::arg("dx"), py::arg("dy"),
      py::arg("dscale"), py::arg("rounded"), py::arg("kept"),
      "`rounded`: dx and dy have the dtypes of x and y, else float32. An address of 0: not wanted.");

  module.def(
      "sum_of_losses",
      [](const LinearForm& form, Address statistics, int64_t length, Address positive_logit, Address along,
         int64_t positives) {
        return sum_of_losses(form, {pointer<const float>(statistics), length},
                             {pointer<const float>(positive_logit), pointer<const int64_t>(along), positives});
      },
      py::arg("form"), py::arg("statistics"), py::arg("length"), py::arg("positive_logit"), py::arg("along"),
      py::arg("positives"));

  module.def(
      "kept_floats",
      [](const Problem& problem, const std::string& level, int threads) {
        return kept_floats(kernels_of(level), problem, threads);
      },
      py::arg("problem"), py::arg("level"), py::arg("threads"),
      "How many floats a forward takes as `kept`, for a backward that need not multiply again.");

  module.def(
      "schedule",
      [](int64_t rows, int64_t columns, int threads, bool mirrored) {
        const Schedule schedule(rows, columns, threads, mirrored);
        std::vector<std::vector<std::vector<py::tuple>>> rounds(schedule.rounds());
        for (int round = 0; round < schedule.rounds(); ++round) {
          for (int thread = 0; thread < threads; ++thread) {
            auto& jobs = rounds[round].emplace_back();
            for (const Job& job : schedule.jobs(round, thread)) {
              jobs.push_back(
                  py::make_tuple(job.row_begin, job.row_end, job.column_begin, job.column_end, job.triangle));
            }
          }
        }
        return rounds;
      },
      py::arg("rows"), py::arg("columns"), py::arg("threads"), py::arg("mirrored"),
      "By round, by thread: its jobs (row begin, row end, column begin, column end, triangle). For tests.");

  module.def("borrow_threads", &borrow_threads, py::arg("allowed"),
             "Whether calls work on PyTorch's threads where they can be had, instead of new ones each time.");

  module.def("can_borrow_threads", &can_borrow_threads);

  module.def(
      "environment",
      [](const std::string& name) -> py::object {
        const char* value = std::getenv(name.c_str());
        return value == nullptr ? py::object(py::none()) : py::str(value);
      },
      py::arg("name"), "os.environ.get(name), which takes ten times as long.");

  module.def(
      "stopwatch",
      [](bool on) {
        const Stopwatch::Total total = Stopwatch::measure(on);
        return py::make_tuple(total.seconds, total.threads);
      },
      py::arg("on"),
      "Seconds that threads spent in packing, products, softmax, waiting and passes, and how many threads, since "
      "the last time that this was called. on: whether the next calls are measured.");

  module.def(
      "peak",
      [](const std::string& level, int threads, bool bfloat16, int64_t repeats) {
        const Kernels& kernels = kernels_of(level);
        const bool bf16x2 = bfloat16 && kernels.has_bf16x2();
        const auto multiply_registers = (bf16x2 ? kernels.bf16x2 : kernels.float32).multiply_registers;
        const py::gil_scoped_release release;
        Team team(threads, [] { return true; });
        std::vector<double> operations(threads);
        const auto start = std::chrono::steady_clock::now();
        team.run([&](int thread) { operations[thread] = multiply_registers(repeats); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        return std::accumulate(operations.begin(), operations.end(), 0.0) / seconds.count();
      },
      py::arg("level"), py::arg("threads"), py::arg("bfloat16"), py::arg("repeats"),
      "Floating-point operations a second of multiply-adds on registers alone: the yardstick of the benchmark.");

  module.def(
      "levels",
      [] {
        std::vector<std::string> names;
        for (const Level& level : supported_levels()) names.push_back(level.name);
        return names;
      },
      "The instruction-set levels that this machine can run, best first.");
}
