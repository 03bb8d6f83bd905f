"""The operators' host code on a fake runtime: what they leave behind when a launch fails, and what
the environment chooses."""

import sys
from pathlib import Path

import pytest
import torch
from budget import call, check, make_case
from targets import Target

sys.path.insert(0, str(Path(__file__).parent))  # the fake runtime is a folder beside this file

from fakecuda import driver
from fakecuda.build import NoCompiler
from fakecuda.driver import connect, running_on
from gpulab import A100, H100

ON_CPU = Target("cuda", "cpu")
OLDER = A100.scaled(name="an older one", arch=75)
FRESH = H100.scaled(name="H100 on which nothing ran yet")
SMALL = (2, 24, 8, 8)


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """The fake runtime's library, with nothing chosen by the environment."""
    try:
        library = connect().library
    except NoCompiler as why:
        pytest.skip(str(why))
    monkeypatch.delenv("SCSE_CUDA_OVERLAP", raising=False)
    return library


def compute(shape=SMALL, variant="add", backward=True):
    case = make_case(shape, variant, torch.float16)
    x = case.x.requires_grad_()
    y = call(variant, x, *case.parameters, backend="cuda")
    return torch.autograd.grad(y, x, case.dy) if backward else y


def test_a_failed_launch_leaves_no_error_behind(runtime, monkeypatch):
    with running_on(H100, dry=True) as lab:
        monkeypatch.setattr(driver, "stream_of", lambda device: -1)  # so that it is another's
        with pytest.raises(RuntimeError, match=r"scse_kernels: \w+: invalid resource handle"):
            compute(backward=False)
        assert len(lab.refused) == 1
        assert runtime.cudaPeekAtLastError() == 0


def test_an_error_that_somebody_else_left_stays_theirs(runtime):
    with running_on(A100):
        assert runtime.cudaSetDevice(10**6) != 0
        left = runtime.cudaPeekAtLastError()
        assert left != 0
        check(make_case(SMALL, "max"), ON_CPU)
        assert runtime.cudaPeekAtLastError() == left
        assert runtime.cudaGetLastError() == left  # else it would be this test that leaves it


def test_overlap_can_be_switched_off(monkeypatch):
    overlapped = {}
    for wanted in (None, "1", "0"):
        monkeypatch.delenv("SCSE_CUDA_OVERLAP", raising=False)
        if wanted:
            monkeypatch.setenv("SCSE_CUDA_OVERLAP", wanted)
        with running_on(H100) as lab:
            check(make_case(SMALL, "add", torch.float16), ON_CPU)
        overlapped[wanted] = len(lab.overlapped)
    assert overlapped == {None: 4, "1": 4, "0": 0}


@pytest.mark.parametrize("value", ("yes", ""))
def test_unknown_choices(monkeypatch, value):
    monkeypatch.setenv("SCSE_CUDA_OVERLAP", value)
    with running_on(H100, dry=True) as lab, pytest.raises(RuntimeError) as raised:
        compute()
    expected = f"SCSE_CUDA_OVERLAP must be 0 or 1, got '{value}'"
    assert expected in str(raised.value).splitlines()[0]
    assert lab.launched == []


@pytest.mark.parametrize("gpu, code", ((A100, 80), (H100, 90), (OLDER, 0)), ids=("8.0", "9.0", "-"))
def test_what_code_a_device_has(runtime, gpu, code):
    with running_on(gpu, dry=True) as lab:
        number = next(n for n, known in connect().gpus.items() if known is lab.gpu)
        assert torch.ops.scse_kernels_emulated.cuda_architecture(number) == code
        assert runtime.cudaPeekAtLastError() == 0
        if not code:
            with pytest.raises(RuntimeError, match="'cuda' has no code for device"):
                compute()


def test_attributes_are_set_once(monkeypatch):
    class Noting(dict):
        def __setitem__(self, key, value):
            assert key not in self, f"set again: {key}"
            super().__setitem__(key, value)

    monkeypatch.setattr(connect(), "attributes", Noting())
    with running_on(FRESH, dry=True):
        for _ in range(3):
            compute((1, 2056, 1, 16), "max")
    assert len(connect().attributes) == 1
