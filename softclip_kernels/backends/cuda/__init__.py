"""What lies between the text of a CUDA C++ kernel (csrc/cuda) and its launch, in Python alone: nothing to build.

driver      NVIDIA's driver by ctypes: what is used of it, its errors by name
launch      modules, functions, and a launch that costs the host little
tensor_map  how the tensor memory accelerator (TMA) finds a matrix
nvrtc       the compiler that every CUDA build of torch brings
sources     the kernels' text: in the package, or in csrc/cuda of the source tree
cache       what was compiled, in a folder beside the tuner's choices
kernels     a kernel by file and name, compiled once a process and device; whether a device can run any

SOFTCLIP_CUDA says whether these kernels are used: unset or "" where they can be, "0" never, "1" wherever they are
offered, and an error where they cannot run.

Importing this package opens no library and imports none of these modules.
"""


class Unavailable(RuntimeError):
    """What the kernels need and this machine does not have: a driver, a compiler, their text. The message is the
    reason in a sentence."""
