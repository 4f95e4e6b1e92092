// The two block operations of the library's Backend protocol (softclip_kernels/backends/__init__.py) on a CPU.
#pragma once

#include <cstdint>
#include <functional>

#include "../problem.h"
#include "kernels.h"

namespace softclip {

// Called on the calling thread about ten times a second during long calls; false cancels the call.
using Poll = std::function<bool()>;

// Both use at most `threads` threads and return false where they were cancelled.
// summed_twice: how many blocks and distributions were summed again, because a term had outgrown its reference.
bool forward(const Kernels&, const Problem&, const Statistics&, int threads, const Poll&, int64_t* summed_twice);
bool backward(const Kernels&, const Problem&, const Gradients&, int threads, const Poll&);

}  // namespace softclip
