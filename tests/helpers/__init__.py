"""What tests share, imported as `from helpers.jobs import start`.

backends     the backends that tests run over, and their dtypes
beside       Triton's kernel with the tile of the CUDA kernels, compiled ahead of time
candidates   every tile shape that a Triton kernel may take
cuda_driver  a driver of CUDA without a GPU, which notes what it is handed
data         a tiny data set, and a configuration that trains on it in seconds
emulated     C++ that runs in the emulator of tests/cuda/, built and called
emulated_kernels  the kernels of csrc/cuda/ in it, against float64: any of them, under a seed or over all sizes
emulated_backward, emulated_forward, emulated_problem  their calls and truths, and what they are called with
engines      two tiny towers in a DeepSpeed engine, and the plain loop that training must equal
faults/      what breaks in a job's ranks on purpose
hosts/       what tests of other people's trainers share
hopper       the CUDA kernels' specialisations, and what the machine code of one says
interpreter  a function of the tests in an interpreter of its own
jobs         whole jobs of the trainer, started as users start them
kernel_mutants, pair_mutants  the CUDA kernels with one thing wrong, which the emulator must find
layouts      image-text pairs, laid out in every way that a source reads
libraries    tiny towers of other libraries
memory       a loss's peak of resident memory
mutants      results that are wrong on purpose
parity       training one model with different ways of computing one loss
planted      steps of distributed training, right ones and ones with a defect each
posed        tensors of the CPU that pose as a Hopper GPU's, with stand-ins for driver, compiler and launches
products     what PyTorch is asked for: matrix products, shapes, bytes between ranks
ranks        processes that are the ranks of a group
saved_runs   checkpoints without a job
sharding     a problem shared out over ranks, and put together again
signals      children that answer signals as they would in a terminal
sources      pairs in memory, and preprocessing that shows what it was given
towers       two small towers and their data on every rank
undriven     Triton kernels that are launched without a driver
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))  # of an interpreter that imports what tests do
