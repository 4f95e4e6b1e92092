// The two block operations of the library's Backend protocol (softclip_kernels/backends/__init__.py) on a CPU.
#pragma once

#include <cstdint>
#include <functional>

#include "../problem.h"
#include "kernels.h"
#include "threads.h"

namespace softclip {

// Called on the calling thread about ten times a second during long calls; false cancels the call.
using Poll = std::function<bool()>;

// Both return false where they were cancelled. `kept`: null, or kept_floats of memory
// that a forward fills and a backward of the same problem reads.
// summed_twice: how many blocks and distributions were summed again, because a term had outgrown its reference.
bool forward(const Kernels&, const Problem&, const Statistics&, const Threads&, const Poll&, int64_t* summed_twice,
             float* kept);
bool backward(const Kernels&, const Problem&, const Gradients&, const Threads&, const Poll&, float* kept);
int64_t kept_floats(const Kernels&, const Problem&, const Threads&);

}  // namespace softclip
