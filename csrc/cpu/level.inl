// The level's table of kernels.h. Included after the level's functions.

const Kernels kernels = {
    kBlock,
    kTileRows,
    kTileColumns,
    SOFTCLIP_PAIRS != 0,
    pack,
    pack_transposed,
    multiply,
    add_product,
    add_transposed_product,
#if SOFTCLIP_PAIRS
    narrow,
    add_product_pairs,
    add_transposed_product_pairs,
#else
    nullptr,
    nullptr,
    nullptr,
#endif
    add_tiles,
    maxima,
    accumulate,
    gradient,
    paired_gradient,
    count_above,
    multiply_registers,
};
