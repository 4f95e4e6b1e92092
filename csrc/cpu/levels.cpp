// build_extension.py writes compiled_levels.def: those lines of levels.def that the compiler could compile.
#include "levels.h"

namespace softclip {

#define LEVEL(name, architecture, features) \
  namespace name {                          \
  extern const Kernels kernels;             \
  }
#include "compiled_levels.def"
#undef LEVEL

std::vector<Level> supported_levels() {
  std::vector<Level> levels;
#define HAS(feature) and __builtin_cpu_supports(#feature)
#define LEVEL(name, architecture, features) \
  if (true features) levels.push_back({#name, &name::kernels});
#include "compiled_levels.def"
#undef LEVEL
#undef HAS
  return levels;
}

}  // namespace softclip
