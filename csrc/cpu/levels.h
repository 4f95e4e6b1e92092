// Which instruction-set levels there are.
#pragma once

#include <vector>

#include "kernels.h"

namespace softclip {

struct Level {
  const char* name;
  const Kernels* kernels;
};

// What the compiler knew when this was built and this machine can run, best first.
std::vector<Level> supported_levels();

}  // namespace softclip
