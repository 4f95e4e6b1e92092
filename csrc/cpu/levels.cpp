// SOFTCLIP_HAS_<LEVEL> is defined for every level that build_extension.py could compile.
#include "levels.h"

namespace softclip {
namespace {

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

}  // namespace

std::vector<Level> supported_levels() {
  std::vector<Level> levels;
#if defined(SOFTCLIP_HAS_AVX512BF16)
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) levels.push_back({"avx512bf16", &avx512bf16::kernels});
#endif
#if defined(SOFTCLIP_HAS_AVX512)
  if (has_avx512()) levels.push_back({"avx512", &avx512::kernels});
#endif
#if defined(SOFTCLIP_HAS_AVX2)
  if (has_avx2()) levels.push_back({"avx2", &avx2::kernels});
#endif
  levels.push_back({"portable", &portable::kernels});
  return levels;
}

}  // namespace softclip
