"""The CUDA backend without a device: who may use it, and its operators."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from budget import make_case
from torch._subclasses.fake_tensor import FakeTensorMode

import scse_kernels
from scse_kernels import _native, backends, ops

CUDA = torch.device("cuda")
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)

built = pytest.mark.skipif(
    _native.why_not("_C_cuda") is not None, reason="the CUDA extension is not built"
)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_an_extension_that_was_built_loads():
    files = list(Path(scse_kernels.__file__).parent.glob("_C_cuda*.so"))
    assert bool(files) == (_native.why_not("_C_cuda") is None), _native.why_not("_C_cuda")


@pytest.fixture
def machine(monkeypatch):
    """machine(built, capability, code, triton): what _native, torch, the extension and Triton say
    of it; capability None: no GPU; code 0: for another one; an error: it doesn't load."""

    def pretend(built=True, capability=None, code=90, triton=None):
        def architecture(index):
            if isinstance(code, Exception):
                raise code
            return code

        monkeypatch.setattr(backends, "_KNOWN", {})
        monkeypatch.setattr(torch.ops.scse_kernels, "cuda_architecture", architecture)
        reasons = {"_C": None, "_C_cuda": None if built else "built without scse_kernels._C_cuda"}
        monkeypatch.setattr(_native, "_WHY_NOT", reasons)
        monkeypatch.setattr(backends, "_warned", set())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        major, minor = divmod(capability or 0, 10)
        properties = SimpleNamespace(major=major, minor=minor, name="NVIDIA A100")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr("scse_kernels._triton.why_not", lambda device: triton)

    return pretend


def test_not_built(machine):
    machine(built=False, capability=90)
    assert backends.why_not("cuda", CUDA) == "built without scse_kernels._C_cuda"
    assert backends._fastest(CUDA, torch.float32) == "triton"


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_no_device(machine, device):
    machine(capability=None)
    assert backends.why_not("cuda", torch.device(device)).startswith("built, no device")


def test_cpu_tensors(machine):
    machine(capability=90)
    assert backends.why_not("cuda", torch.device("cpu")) == "it runs on cuda tensors, got cpu"
    assert backends._fastest(torch.device("cpu"), torch.float32) == "cpu"
    x, *parameters = make_case((2, 6, 5, 7)).x, *make_case((2, 6, 5, 7)).parameters
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: it runs on cuda"):
        scse_kernels.scse(x, *parameters, backend="cuda")


@pytest.mark.parametrize("capability, usable", [(75, False), (80, True), (90, True), (120, True)])
def test_capability(machine, capability, usable):
    machine(capability=capability)
    reason = backends.why_not("cuda", CUDA)
    assert (reason is None) == usable
    assert usable or "compute capability 8.0" in reason
    assert backends._fastest(CUDA, torch.float16) == ("cuda" if usable else "triton")
    if not usable:
        machine(capability=capability, triton="Triton can't be imported")
        with pytest.warns(RuntimeWarning, match=r"compute capability 8.0"):
            assert backends._fastest(CUDA, torch.float16) == "eager"


@pytest.mark.parametrize("device", (CUDA, torch.device("cuda", 1)), ids=str)
def test_built_for_other_devices(machine, device):
    """As one for 9.0 alone on an A100: "auto" goes on, who asks for "cuda" is told."""
    machine(capability=80, code=0)
    reason = backends.why_not("cuda", device, torch.float16)
    assert reason == "it was built without code for NVIDIA A100, of compute capability 8.0"
    assert backends._fastest(device, torch.float16) == "triton"


def test_a_driver_that_cannot_load_the_kernels(machine):
    machine(capability=90, code=RuntimeError("scse_kernels: excite: out of memory"))
    reason = backends.why_not("cuda", CUDA)
    assert reason.startswith("its kernels don't load on NVIDIA A100") and "out of memory" in reason


def test_what_a_device_can_run_is_looked_up_once(machine, monkeypatch):
    def never(*_):
        raise AssertionError("looked up again")

    first = torch.device("cuda", 0)
    machine(capability=90)
    assert backends.why_not("cuda", first, torch.float16) is None
    assert backends.why_not("cuda", CUDA, torch.float16) is None
    for name in ("is_available", "get_device_properties", "current_device"):
        monkeypatch.setattr(torch.cuda, name, never)
    assert backends.why_not("cuda", first, torch.float16) is None
    with pytest.raises(AssertionError, match="again"):  # another dtype; another device
        backends.why_not("cuda", first, torch.float64)
    with pytest.raises(AssertionError, match="again"):
        backends.why_not("cuda", torch.device("cuda", 1), torch.float16)
    with pytest.raises(AssertionError, match="again"):  # the current one may be another by now
        backends.why_not("cuda", CUDA, torch.float16)


def test_float64_goes_elsewhere(machine):
    machine(capability=90)
    assert "float64" in backends.why_not("cuda", CUDA, torch.float64)
    assert backends._fastest(CUDA, torch.float64) == "triton"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.why_not("cuda", CUDA, dtype) is None


def _fake_arguments(variant, memory_format, dtype):
    """x, the parameters and dy as tensors of a device that isn't there, without data."""
    case = make_case((3, 6, 5, 7), variant, dtype, parameter_dtype=torch.float32)
    with FakeTensorMode():
        x, dy, *parameters = (
            None if t is None else torch.empty(t.shape, dtype=t.dtype, device=CUDA)
            for t in (case.x, case.dy, *case.parameters)
        )
        return *(t.contiguous(memory_format=memory_format) for t in (x, dy)), parameters


@built
@pytest.mark.parametrize("variant", ("cse", "sse", *ops.COMBINE))
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_fake_tensors(variant, memory_format, dtype):
    """Shapes, dtypes, strides and device of what the operators return, under torch.compile say."""
    x, dy, parameters = _fake_arguments(variant, memory_format, dtype)
    combine = ops.COMBINE.get(variant, 0)
    y, *small = torch.ops.scse_kernels.cuda_forward(x, *parameters, combine)
    assert y.device.type == "cuda" and y.dtype == dtype and y.shape == dy.shape
    assert y.is_contiguous(memory_format=memory_format)
    assert all(t.dtype == torch.float32 for t in small)
    dx, *gradients = torch.ops.scse_kernels.cuda_backward(
        dy, x, *parameters, *small, combine, True, True, True
    )
    assert dx.shape == x.shape and dx.dtype == dtype and dx.stride() == x.stride()
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if parameter is not None:
            assert gradient.shape == parameter.shape and gradient.dtype == parameter.dtype


@built
def test_operators_are_for_cuda_tensors():
    for name in ("cuda_forward", "cuda_backward"):
        qualified = f"scse_kernels::{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
    case = make_case((2, 6, 5, 7))
    with pytest.raises(NotImplementedError, match="cuda_forward"):
        torch.ops.scse_kernels.cuda_forward(case.x, *case.parameters, 0)


def test_schemas_are_those_of_the_other_backends():
    for name in ("forward", "backward"):
        schemas = {
            str(getattr(torch.ops.scse_kernels, f"{backend}_{name}").default._schema).split("(", 1)[
                1
            ]
            for backend in ops.BACKENDS
        }
        assert len(schemas) == 1
