"""A CUDA device that is not there: csrc/cuda runs unchanged, and the emulator executes its kernels.

How a launch travels:

1. A test calls backend "cuda" on CPU tensors inside `with running_on(H100)` (driver.py).
2. build.py has compiled every .cu file with nvcc, host pass and device pass, and ops.cpp with the
   C++ compiler, and linked them into one library: the registration of kernels and the marshalling
   of arguments are nvcc's own.
3. ops.cpp and the launchers run as they are. What they ask of torch about tensors' devices and
   memory is answered by tensors.cpp: the tensors are on a CUDA device, new memory is full of a
   pattern that means "never written". Each pointer that ops.cpp asks for is noted with its tensor.
4. What they ask of the CUDA runtime is answered by runtime.cpp. It has the runtime's rules for
   errors, and hands everything else, launches above all, to Python.
5. driver.py refuses what a driver would refuse (sizes, shared memory, attributes that
   were not asked for, code for other devices, another device's stream), takes the kernel's PTX out
   of the fat binary in the library (images.py), reads the arguments by the sizes of the PTX's
   parameters, and makes of each pointer the memory that it was noted with.
6. gpulab executes the PTX on that memory, with its checks: bounds, alignment, races, memory that
   nobody wrote, deadlocks, what a launch may touch before it has waited for the one before.

Nothing here knows a kernel, its arguments or its tile sizes.
"""

from .build import NoCompiler
from .driver import Lab, connect, running_on

__all__ = [
    "Lab",
    "NoCompiler",
    "connect",
    "running_on",
]
