#define SOFTCLIP_LEVEL avx512bf16
#define SOFTCLIP_SIMD "simd_avx512bf16.h"
#include "level.inl"
