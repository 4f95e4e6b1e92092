// The Python module softclip_kernels._cpu. softclip_kernels/backends/cpu.py, the only caller, has checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "levels.h"
#include "linear_form.h"
#include "openmp.h"
#include "operations.h"
#include "schedule.h"
#include "stopwatch.h"
#include "team.h"
#include "tensors.h"

namespace py = pybind11;
using namespace softclip;

namespace {

const Kernels& kernels_of(const std::string& name) {
  for (const Level& level : supported_levels()) {
    if (name == level.name) return *level.kernels;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not supported on this machine");
}

// A Problem with the memory that it lies in.
struct BoundProblem {
  explicit BoundProblem(py::object given) : object(std::move(given)), problem(tensors.problem(object)) {}
  const py::object object;
  Tensors tensors;
  const Problem problem;
};

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
  py::class_<BoundProblem>(module, "Problem", "A problem.Problem, with segments of int32, where it lies in memory.")
      .def(py::init<py::object>(), py::arg("problem"));

  module.def(
      "forward",
      [](const BoundProblem& bound, const std::string& level, std::pair<int, int> threads, py::handle rows,
         py::handle columns, py::handle positive_logit, py::handle row_ranks, py::handle column_ranks,
         py::handle kept) {
        const Kernels& kernels = kernels_of(level);
        const Problem& problem = bound.problem;
        const Statistics out{{elements<float>(rows), problem.x.rows},
                             {elements<float>(columns), problem.y.rows},
                             elements<float>(positive_logit),
                             elements<int64_t>(row_ranks),
                             elements<int64_t>(column_ranks)};
        float* const dots = elements<float>(kept);
        int64_t summed_twice = 0;
        interruptible([&](const Poll& poll) {
          return forward(kernels, problem, out, {threads.first, threads.second}, poll, &summed_twice, dots);
        });
        return summed_twice;
      },
      py::arg("problem"), py::arg("level"), py::arg("threads"), py::kw_only(), py::arg("rows"), py::arg("columns"),
      py::arg("positive_logit"), py::arg("row_ranks"), py::arg("column_ranks"), py::arg("kept"),
      "Fills the tensors of a Statistics; None or no elements: not wanted. threads: those of threads.h. How many "
      "blocks "
      "were summed twice, because a term had outgrown the reference of its row or column.");

  module.def(
      "reduced",
      [](py::handle rows, py::handle columns, py::handle positive_logit, py::handle positive_column,
         py::handle row_form, py::handle column_form, std::pair<double, double> shares) {
        Tensors tensors;
        const int64_t n = size(rows, 1), m = size(columns, 1), teachers = size(rows, 0) / 2;
        const int64_t* along = tensors.vector<int64_t>(positive_column, n);
        const float* logit = along == nullptr ? nullptr : tensors.vector<float>(positive_logit, n);
        double total = 0;
        if (!row_form.is_none()) {
          total += sum_of_losses(tensors.linear_form(row_form, shares.first, teachers, n),
                                 tensors.statistics(rows, teachers, n), {logit, nullptr, n});
        }
        if (!column_form.is_none()) {
          total += sum_of_losses(tensors.linear_form(column_form, shares.second, teachers, m),
                                 tensors.statistics(columns, teachers, m), {logit, along, n});
        }
        return total;
      },
      py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("positive_logit"), py::arg("positive_column"),
      py::arg("row_form"), py::arg("column_form"), py::arg("shares"),
      "The sum of both directions' losses times their shares. A form: a linear_form.LinearForm, or None: no losses.");

  module.def(
      "backward",
      [](const BoundProblem& bound, const std::string& level, std::pair<int, int> threads, py::handle rows,
         py::handle columns, py::handle positive_logit, py::handle row_form, py::handle column_form,
         std::pair<double, double> shares, py::handle dx, py::handle dy, py::handle dscale, bool rounded,
         py::handle kept) {
        const Kernels& kernels = kernels_of(level);
        const Problem& problem = bound.problem;
        const int64_t n = problem.x.rows, m = problem.y.rows;
        const auto teachers = static_cast<int64_t>(problem.teachers.size());
        Tensors tensors;
        const Gradients in{tensors.statistics(rows, teachers, n),
                           tensors.statistics(columns, teachers, m),
                           problem.positive_column ? tensors.vector<float>(positive_logit, n) : nullptr,
                           tensors.linear_form(row_form, shares.first, teachers, n),
                           tensors.linear_form(column_form, shares.second, teachers, m),
                           {elements<void>(dx), rounded ? problem.x.dtype : Dtype::float32},
                           {elements<void>(dy), rounded ? problem.y.dtype : Dtype::float32},
                           elements<float>(dscale)};
        float* const dots = elements<float>(kept);
        interruptible([&](const Poll& poll) {
          return backward(kernels, problem, in, {threads.first, threads.second}, poll, dots);
        });
      },
      py::arg("problem"), py::arg("level"), py::arg("threads"), py::kw_only(), py::arg("rows"), py::arg("columns"),
      py::arg("positive_logit"), py::arg("row_form"), py::arg("column_form"), py::arg("shares"), py::arg("dx"),
      py::arg("dy"), py::arg("dscale"), py::arg("rounded"), py::arg("kept"),
      "Of the sum of both forms' losses times their shares. `rounded`: dx and dy have the dtypes of x and y, else "
      "float32. None: not wanted.");

  module.def(
      "kept_floats",
      [](const BoundProblem& bound, const std::string& level, std::pair<int, int> threads) {
        return kept_floats(kernels_of(level), bound.problem, {threads.first, threads.second});
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

  module.def(
      "borrow_threads",
      [](bool allowed) {
        borrow_threads(allowed);
        return can_borrow_threads();
      },
      py::arg("allowed"),
      "Whether calls work on PyTorch's threads where these can be had, instead of new ones each time; and whether they "
      "can now.");

  module.def(
      "environment",
      [](py::args names) {
        py::tuple values(names.size());
        for (size_t i = 0; i < names.size(); ++i) {
          const char* value = std::getenv(names[i].cast<std::string>().c_str());
          values[i] = value == nullptr ? py::object(py::none()) : py::str(value);
        }
        return values;
      },
      "os.environ.get of every name, which takes ten times as long.");

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
        Team team({threads, threads}, [] { return true; });
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
