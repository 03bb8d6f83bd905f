"""Fixtures: the usable backends on the devices that are here, and poisoned memory."""

import ctypes
import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow others
# Without it cuBLAS warns that it isn't deterministic, which `poisoned_memory` asks for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# malloc fills the memory that it gives with the byte 0xFE, which makes a large number or a NaN.
# That is for kernels that don't get their memory by torch.empty. Only glibc has this switch.
if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
    M_MMAP_THRESHOLD, M_PERTURB = -3, -6
    mallopt(M_MMAP_THRESHOLD, 1 << 25)  # fresh pages would be full of zeros
    mallopt(M_PERTURB, 0x01)

import pytest
import torch
from targets import Target

from scse_kernels import ops
from scse_kernels.backends import why_not

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def pytest_configure(config):
    if os.environ.get("SCSE_TEST_PURE_PYTHON"):  # without kernels this warning is right
        config.addinivalue_line(
            "filterwarnings", "ignore:scse_kernels has no kernels for cpu:RuntimeWarning"
        )


def pytest_collection_finish():
    """The garbage collector leaves alone what was imported, and runs less often: the emulator makes
    millions of objects that stay."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def _targets(backends):
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [
        pytest.param(Target(backend, device), id=f"{backend}-{device}")
        for device in devices
        for backend in backends
        if why_not(backend, torch.device(device)) is None
    ]


def _for_dtype(request):
    """The target of a test. The test is skipped where the target can't work in its dtype (its
    parameter `dtype`, or its module's DTYPE), or is none of its module's WITH_KERNELS."""
    target = request.param
    if target.backend not in getattr(request.module, "WITH_KERNELS", (target.backend,)):
        pytest.skip(f"{target.backend} has no kernels for this")
    dtype = request.node.callspec.params.get("dtype", getattr(request.module, "DTYPE", None))
    if reason := why_not(target.backend, torch.device(target.device), dtype):
        pytest.skip(f"{target.backend}: {reason}")
    return target


@pytest.fixture(params=_targets(("eager", *ops.BACKENDS)))
def target(request):
    """Every usable backend, `eager` among them."""
    return _for_dtype(request)


@pytest.fixture(params=_targets(ops.BACKENDS))
def fused(request):
    """Every usable backend with kernels of its own."""
    return _for_dtype(request)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill memory that torch.empty hands out with NaN, so that what no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_bfloat16_in_the_interpreter(request):
    parameters = getattr(request.node, "callspec", None)
    parameters = parameters.params.values() if parameters else ()
    if Target("triton", "cpu") in parameters and torch.bfloat16 in parameters:
        pytest.skip("Triton's interpreter truncates when it casts to bfloat16")


@pytest.fixture(params=INSTRUCTION_SETS)
def capability(request):
    """Every instruction set of the CPU kernels that this machine has."""
    best = torch.ops.scse_kernels.cpu_capability()
    if INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine has {best} at most")
    return request.param


@pytest.fixture
def threads():
    """torch.set_num_threads; the number is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
