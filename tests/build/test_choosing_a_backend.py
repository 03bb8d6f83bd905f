"""SCSE_BACKEND, set_backend and use_backend: who computes where a call names no backend."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from budget import make_case
from peers import Smp
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import scse_kernels
from scse_kernels import _native, backends, set_backend, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
kernels = pytest.mark.skipif(_native.why_not("_C") is not None, reason="the CPU kernels are needed")


class _Operators(TorchDispatchMode):
    """Notes which operators of this package run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "scse_kernels":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def _operators(function, *args):
    with _Operators() as operators:
        function(*args)
    return operators.names


@pytest.fixture(autouse=True)
def _as_it_was():
    before = backends._chosen, backends._chosen_by
    yield
    backends._chosen, backends._chosen_by = before


def _callers():
    """x, and what computes without naming a backend: function, layer, converted block."""
    case = make_case((2, 6, 5, 7))
    converted = Smp(6, 2)
    scse_kernels.convert(converted)
    function = torch.no_grad()(lambda x: scse_kernels.scse(x, *case.parameters))
    return case.x, (function, scse_kernels.ChannelSpatialSELayer(6), converted)


@kernels
def test_functions_layers_and_converted_blocks_take_the_choice():
    x, callers = _callers()
    for caller in callers:
        assert _operators(caller, x) == ["cpu_forward"]
    set_backend("eager")
    for caller in callers:
        assert _operators(caller, x) == []
    with use_backend("cpu"):
        for caller in callers:
            assert _operators(caller, x) == ["cpu_forward"]
        with use_backend("auto"):
            assert _operators(callers[0], x) == ["cpu_forward"]
    for caller in callers:
        assert _operators(caller, x) == []
    set_backend("auto")
    assert _operators(callers[0], x) == ["cpu_forward"]


@kernels
def test_an_argument_goes_before_the_choice():
    case = make_case((2, 6, 5, 7))
    with use_backend("eager"):
        assert _operators(
            lambda: scse_kernels.scse(case.x, *case.parameters, backend="cpu")
        ) == ["cpu_forward"]  # fmt: skip


def test_a_choice_that_cannot_be_used_raises_and_says_where_it_is_from():
    x, callers = _callers()
    set_backend("cuda")
    for caller in callers:
        with pytest.raises(RuntimeError, match=r"'cuda' \(from set_backend\(\)\) is not available"):
            caller(x)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' \(from use_backend"):
        callers[0](x)
    with pytest.raises(RuntimeError, match=r"vmap|torch.func.*got backend 'cuda' \(from set_back"):
        torch.func.vmap(callers[0])(x[None])


def test_unknown_names():
    for choose in (set_backend, lambda name: use_backend(name).__enter__()):
        with pytest.raises(ValueError, match=r"backend must be one of 'auto',.*got 'gpu'"):
            choose("gpu")
    assert backends.chosen() is None


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert backends.chosen() is None


def test_it_holds_for_all_threads():
    """Recomputation in a backward pass and replicas of a module run in threads of their own."""
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends.chosen()))
        thread.start()
        thread.join()
    assert seen == ["'eager' (from use_backend())"]


@kernels
def test_convert_does_not_depend_on_the_choice():
    for name in ("triton", "cuda", "eager"):
        with use_backend(name):
            assert scse_kernels.convert(Smp(6, 2)).converted
            assert backends._chosen == name


@kernels
@pytest.mark.filterwarnings("default")
def test_a_compiled_function_takes_a_new_choice():
    x, (_, layer, _) = _callers()
    torch.compiler.reset()
    counter = CompileCounter()
    graphs = []

    def backend(graph, inputs):
        graphs.append(any("scse_kernels" in str(node.target) for node in graph.graph.nodes))
        return counter(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(x)
        set_backend("eager")
        compiled(x)
        with use_backend("cpu"):
            compiled(x)
        assert graphs == [True, False, True]
        set_backend("eager")
        compiled(x)
        assert counter.frame_count == 3  # it is remembered for each choice
        with use_backend("triton"), pytest.raises(Exception, match=r"'triton'.*is not available"):
            compiled(x)


@kernels
@pytest.mark.filterwarnings("default")
def test_use_backend_inside_a_compiled_function():
    x, (_, layer, _) = _callers()
    graphs = []

    def backend(graph, inputs):
        graphs.append(any("scse_kernels" in str(node.target) for node in graph.graph.nodes))
        return graph

    def both(x):
        with use_backend("eager"):
            y = layer(x)
        return y

    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(both, fullgraph=True, backend=backend)(x), layer(x)
        )
    assert graphs == [False] and backends.chosen() is None


@pytest.fixture
def usable(monkeypatch):
    """usable(names): these backends can be used on any device, no others."""

    def only(*names):
        monkeypatch.setattr(
            backends, "why_not", lambda name, *_: None if name in names else f"no {name} here"
        )

    monkeypatch.setattr(backends, "_warned", set())
    return only


def test_cuda_before_triton(usable):
    usable("triton", "cuda", "cpu")
    assert backends._fastest(CUDA, torch.float16) == "cuda"
    usable("triton", "cpu")
    assert backends._fastest(CUDA, torch.float16) == "triton"
    usable("cpu", "triton")
    assert backends._fastest(CPU, torch.float16) == "cpu"


def test_auto_warns_once_where_kernels_are_missing(usable, recwarn):
    warnings.simplefilter("always")
    usable("eager")
    case = make_case((2, 6, 5, 7))
    for _ in range(3):
        scse_kernels.scse(case.x, *case.parameters)
    (warned,) = recwarn
    assert warned.category is RuntimeWarning
    said = str(warned.message)
    assert "no kernels for cpu tensors" in said and "no cpu here" in said and "pip install" in said
    assert backends._fastest(CUDA, torch.float32) == "eager"
    assert "cuda: no cuda here" in str(recwarn[1].message) and len(recwarn) == 2


def test_auto_does_not_warn_for_other_devices_or_a_named_backend(usable, recwarn):
    usable("eager")
    assert backends._fastest(torch.device("meta"), torch.float32) == "eager"
    case = make_case((2, 6, 5, 7))
    scse_kernels.scse(case.x, *case.parameters, backend="eager")
    with use_backend("eager"):
        scse_kernels.scse(case.x, *case.parameters)
    assert not list(recwarn)


@pytest.mark.filterwarnings("default")
def test_auto_does_not_warn_while_it_is_traced(usable):
    usable("eager")
    case = make_case((2, 6, 5, 7))
    torch.compiler.reset()
    compiled = torch.compile(scse_kernels.scse, fullgraph=True, backend="eager")
    compiled(case.x, *case.parameters)
    torch.func.vmap(lambda x: scse_kernels.scse(x, *case.parameters))(case.x[None])
    assert backends._warned == set()


def test_the_report_of_convert_ends_with_it(usable):
    usable("eager")
    model = torch.nn.Sequential(Smp(6, 2))
    assert "no cpu here" in str(scse_kernels.convert(model)).splitlines()[-1]
    assert "no cpu here" in str(scse_kernels.convert(model)).splitlines()[-1]  # already fused
    assert "no cpu here" not in str(scse_kernels.convert(torch.nn.ReLU()))
    usable("cpu")
    assert "eager" not in str(scse_kernels.convert(model))


def _python(code, **environment):
    package = str(Path(scse_kernels.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_environment_variable():
    code = """if True:
        import torch, scse_kernels
        from scse_kernels import backends
        print(backends.chosen())
        scse_kernels.set_backend("auto")
        print(backends.chosen())
        scse_kernels.set_backend("cuda")
        scse_kernels.SpatialSELayer(4)(torch.ones(1, 4, 2, 2))
    """
    done = _python(code, SCSE_BACKEND="eager")
    assert done.stdout.split("\n")[:2] == ["'eager' (from SCSE_BACKEND)", "None"]
    assert "sse(): backend 'cuda' (from set_backend()) is not available" in done.stderr
    last = _python("import scse_kernels", SCSE_BACKEND="gpu").stderr.splitlines()[-1]
    names = "'auto', 'eager', 'cpu', 'cuda', 'triton'"
    assert last == f"ValueError: SCSE_BACKEND must be one of {names}, got 'gpu'"
    assert _python("import scse_kernels", SCSE_BACKEND="").returncode == 0


def test_an_old_torch_is_named():
    code = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1+cu126')\n"
    last = _python(code + "import scse_kernels").stderr.splitlines()[-1]
    assert last == "ImportError: scse_kernels needs torch 2.10 or newer, found torch 2.9.1+cu126"
