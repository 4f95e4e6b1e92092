"""Triton kernels of the two block operations.

tiles        what the kernels share: tile order, the streamed matrix product, masks
statistics   forward: one pass over tiles, one exponential per entry for rows and columns
exact        forward: the two-maximum path for the rows (columns) whose centred sums left the range of fp32
gradient     backward: a block of G with its epilogue fused, for two matrix products
operands     from a problem to the kernels' arguments, one launch for each teacher
launch       the host's side: super-blocks, scratch, reductions in fixed order
calls        one kernel for many super-blocks, at little cost to the host
configs      candidate tile shapes by architecture and problem
tuning       which candidate a GPU runs: timed once, remembered in a file
aot          compiles every variant for every architecture without a GPU and counts what came out

Nothing here is imported before the first problem reaches the Triton backend.
"""
