"""The operators' host code on a fake runtime: what they leave behind when a launch fails, what they
do where clusters can't be had, and what the environment chooses."""

import sys
from pathlib import Path

import pytest
import torch
from budget import call, check, make_case
from targets import Target

sys.path.insert(0, str(Path(__file__).parent))  # the fake runtime is a folder beside this file

from fakecuda import driver
from fakecuda.build import NoCompiler
from fakecuda.driver import A100, GPU, H100, connect, running_on

ON_CPU = Target("cuda", "cpu")
OLDER = GPU(A100.device.scaled(name="an older one", arch=75), 0)
FRESH = GPU(H100.device.scaled(name="H100 on which nothing ran yet"))
SILENT = GPU(H100.device.scaled(name="H100, part of it"), None)
SMALL, LARGE = (2, 24, 8, 8), (2, 256, 96, 96)


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """The fake runtime's library, with nothing chosen by the environment."""
    try:
        library = connect().library
    except NoCompiler as why:
        pytest.skip(str(why))
    for name in ("SCSE_CUDA_KERNELS", "SCSE_CUDA_OVERLAP"):
        monkeypatch.delenv(name, raising=False)
    return library


def compute(shape=SMALL, variant="add", backward=True):
    case = make_case(shape, variant, torch.float16)
    x = case.x.requires_grad_()
    y = call(variant, x, *case.parameters, backend="cuda")
    return torch.autograd.grad(y, x, case.dy) if backward else y


def names(lab):
    return [name.split("<")[0].split("::")[-1] for name in lab.launched]


GENERAL = [
    "squeeze_planes",
    "excite",
    "apply",
    "reduce_planes",
    "excite_backward",
    "apply_backward",
]
ON_CHIP = ["forward_kernel", "backward_kernel"]


@pytest.mark.parametrize("gpu", (A100, H100), ids=("general", "on chip"))
def test_a_failed_launch_leaves_no_error_behind(runtime, monkeypatch, gpu):
    with running_on(gpu, dry=True) as lab:
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


def test_a_device_that_cannot_say_how_large_clusters_are(runtime, monkeypatch):
    monkeypatch.setenv("SCSE_CUDA_KERNELS", "auto")
    with running_on(SILENT) as lab:
        check(make_case(SMALL, "add", torch.float16), ON_CPU)
        assert names(lab) == GENERAL
        assert runtime.cudaPeekAtLastError() == 0
        monkeypatch.setenv("SCSE_CUDA_KERNELS", "on_chip")
        with pytest.raises(RuntimeError, match="=on_chip: the device offers no clusters"):
            compute()


def test_kernels_that_are_asked_for(monkeypatch):
    for wanted, expected in (
        ("general", GENERAL),
        ("on_chip", ON_CHIP),
        ("auto", [ON_CHIP[0], *GENERAL[3:]]),  # see choose.h
    ):
        monkeypatch.setenv("SCSE_CUDA_KERNELS", wanted)
        with running_on(H100, dry=True) as lab:
            compute()
        assert names(lab) == expected


@pytest.mark.parametrize(
    "gpu, shape, reason",
    [
        (A100, SMALL, "the device runs code for 8.0, and clusters need 9.0"),
        (H100, LARGE, "256 channels and 9216 positions does not fit a cluster of 16 blocks"),
    ],
    ids=("A100", "large"),
)
def test_on_chip_where_it_cannot_be_is_no_silent_fallback(monkeypatch, gpu, shape, reason):
    monkeypatch.setenv("SCSE_CUDA_KERNELS", "on_chip")
    with running_on(gpu, dry=True) as lab:
        with pytest.raises(RuntimeError, match=f"SCSE_CUDA_KERNELS=on_chip: .*{reason}"):
            compute(shape)
        assert lab.launched == []
        compute((0, *SMALL[1:]))  # an empty batch has nothing to keep there


def test_overlap_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("SCSE_CUDA_KERNELS", "general")
    overlapped = {}
    for wanted in (None, "1", "0"):
        monkeypatch.delenv("SCSE_CUDA_OVERLAP", raising=False)
        if wanted:
            monkeypatch.setenv("SCSE_CUDA_OVERLAP", wanted)
        with running_on(H100) as lab:
            check(make_case(SMALL, "add", torch.float16), ON_CPU)
        overlapped[wanted] = len(lab.overlapped)
    assert overlapped == {None: 4, "1": 4, "0": 0}


@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("SCSE_CUDA_KERNELS", "onchip", "auto, general or on_chip"),
        ("SCSE_CUDA_KERNELS", "", "auto, general or on_chip"),
        ("SCSE_CUDA_OVERLAP", "yes", "0 or 1"),
    ],
)
def test_unknown_choices(monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    with running_on(H100, dry=True) as lab, pytest.raises(RuntimeError) as raised:
        compute()
    assert f"{variable} must be {expected}, got '{value}'" in str(raised.value).splitlines()[0]
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
    monkeypatch.setenv("SCSE_CUDA_KERNELS", "general")  # what is put back is not running_on's
    with running_on(FRESH, dry=True):
        for family in ("general", "on_chip"):
            monkeypatch.setenv("SCSE_CUDA_KERNELS", family)
            for _ in range(3):
                compute((2, 64, 64, 64), "max")
    assert len(connect().attributes) > 4
