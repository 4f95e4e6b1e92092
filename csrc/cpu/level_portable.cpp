#define SOFTCLIP_LEVEL portable
#define SOFTCLIP_SIMD "simd_portable.h"
#include "level.inl"
