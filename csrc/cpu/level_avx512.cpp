#define SOFTCLIP_LEVEL avx512
#define SOFTCLIP_SIMD "simd_avx512.h"
#include "level.inl"
