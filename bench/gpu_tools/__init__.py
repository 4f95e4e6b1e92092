"""Tools for tuning the Triton kernels on a GPU. Each is one function that takes plain parameters and returns rows, a
table's worth (breakdown: one row), in three minutes at most on an H100:

    probe.probe             what the device itself gives: bandwidths and matrix products of our shapes
    kernels.kernels         every kernel with every candidate tile shape
    breakdown.breakdown     where the time of a forward and backward pass goes
    ab.ab                   two settings or source trees in turns
    external.ncu, .sanitize NVIDIA's profiler and its sanitizer, where they are installed
"""
