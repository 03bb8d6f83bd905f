"""Benchmarks, run from a checkout: `python -m bench ops`, `... host`, `... mri`, `... model`,
and for a GPU `... tune`."""

import ctypes
import os
import platform

# OpenMP reads this when it starts, so it is set before any module here imports torch. Threads that
# spin while they wait take the cores from threads that work: on small machines times rise tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The profiler, which measures memory on the CPU, reports each start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# glibc gives freed memory back to the system and takes it again page by page. What that costs
# depends on what was freed before. Here it keeps the memory, for all providers alike; of maps up to
# 32 MiB, its limit.
if platform.libc_ver()[0] == "glibc":
    _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 1 << 30)
