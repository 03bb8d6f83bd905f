"""The CUDA kernels are executed where an nvcc compiles them; elsewhere these tests are skipped."""

import fakecuda
import pytest
from gpu import proof


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """The library with the operators and their kernels; built if it must, which takes minutes."""
    try:
        return fakecuda.connect()
    except fakecuda.NoCompiler as reason:
        proof.unavailable(str(reason))
