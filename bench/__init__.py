"""Benchmarks, run from a checkout: `python -m bench ops`, `... host`, `... mri`, `... model`,
and for a GPU `... tune`."""

import ctypes
import os
import platform

# Read when OpenMP starts, hence before any module here imports torch. Threads that spin while they
# wait for work steal the cores from the ones that have some: on small machines, tenfold times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The profiler, which measures memory on the CPU, reports each start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# glibc gives freed memory back to the system and takes it again page by page, at a cost that hangs
# on what was freed before. It keeps it here, for all providers alike; maps up to 32 MiB, its limit.
if platform.libc_ver()[0] == "glibc":
    _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 1 << 30)
