"""Benchmarks, run from a checkout: `python -m bench ops`, `python -m bench mri`."""

import os

# Read when OpenMP starts, hence before any module here imports torch. Threads that spin while they
# wait for work steal the cores from the ones that have some: on small machines, tenfold times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The profiler, which measures memory on the CPU, reports each start and stop on stderr otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
