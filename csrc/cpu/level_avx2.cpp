#define SOFTCLIP_LEVEL avx2
#define SOFTCLIP_SIMD "simd_avx2.h"
#include "level.inl"
