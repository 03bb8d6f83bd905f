"""What only a device shows: other devices and streams, graphs, errors, the allocator's reuse."""

import subprocess
import sys

import device_checks as checks
import pytest
import torch

from scse_kernels import selfcheck
from scse_kernels.backends import why_not

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA device here"
)

DEVICES = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
FAMILIES = [
    pytest.param(family, id=family.name)
    for device in DEVICES[:1]
    for backend in ("cuda", "triton")
    if not why_not(backend, device)
    for family in selfcheck.families(backend, device)
] or [pytest.param(None, marks=pytest.mark.skip(reason="neither backend for GPUs is usable here"))]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def no_poison():
    """Undoes conftest.py's `poisoned_memory`. Filling what torch.empty gives takes launches, and
    hides whose memory was whose."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.mark.skipif(len(DEVICES) < 2, reason="there is one device")
def test_another_device_than_the_current_one(family):
    checks.check_another_device(family, DEVICES[1])


def test_side_stream(family):
    checks.check_side_stream(family, DEVICES[0])


def test_graph_capture_and_replays(family):
    checks.check_graph(family, DEVICES[0])


def test_scratch_memory_that_others_take(family):
    checks.check_allocator(family, DEVICES[0])


def test_refused_calls_leave_nothing_behind(family):
    checks.check_refusals(family, DEVICES[0])


def test_an_error_that_somebody_else_left_is_theirs(family):
    """We don't raise it. The next operator of torch finds it, as it would without us."""
    if family.environment.get("SCSE_TRITON_LAUNCHES") == "1":
        pytest.skip("torch's own fill, which comes first, raises it")
    given = checks.inputs("add", checks.SHAPES[0], DEVICES[0])
    with checks.environment(family):
        expected = given.results(family.backend)
        torch.cuda.synchronize()
        assert (
            torch.cuda.cudart().cudaHostRegister(0, 0, 0) != torch.cuda.cudart().cudaError.success
        )
        got = [checks.call("add", *given.leaves, backend=family.backend)]
    with pytest.raises(RuntimeError, match="invalid argument"):
        torch.ones(3, device=DEVICES[0])
    checks.assert_same(got, expected[:1])


FAILED_LAUNCH = """
import torch, device_checks as checks
from scse_kernels import selfcheck
given = checks.inputs("add", checks.SHAPES[0], "cuda:0")
family = selfcheck.Family("", *{family!r})
caught = None
with checks.environment(family):
    given.results(family.backend)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            try:
                torch.cuda.synchronize()  # which no capture survives
            except RuntimeError:
                pass
            try:
                given.results(family.backend)
            except RuntimeError as error:
                caught = str(error)
    except RuntimeError:
        pass
    print("caught:", caught)
    print((torch.ones(3, device="cuda:0") + 1).sum().item(), given.results(family.backend)[0].shape)
"""


def test_a_failed_launch_that_was_caught(family):
    """In a capture that is already lost the driver refuses our launch. Afterwards torch's own next
    launch works. This runs in a process of its own, which may be lost."""
    if family.backend != "cuda":
        pytest.skip("Triton's launches don't go through the runtime, which keeps the last error")
    script = FAILED_LAUNCH.format(family=(family.backend, family.environment))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "caught: scse_kernels" not in done.stdout:
        pytest.skip(f"torch was refused first: {done.stdout}")
    assert "6.0" in done.stdout
