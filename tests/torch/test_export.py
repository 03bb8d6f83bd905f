"""torch.export makes a program of ordinary operations, for every size of input, that can be trained
and runs where this package is not."""

import os
import subprocess
import sys

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case
from networks import gradients, images, needs_kernels, unet
from torch.export import Dim

import scse_kernels

pytestmark = [
    pytest.mark.filterwarnings("default"),  # torch warns of its own parts while tracing
    needs_kernels,
]

SIZES = {"x": {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}}


def _program(module, *shape, strict=False, dynamic_shapes=SIZES):
    example = (images(*shape),)
    return torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=strict)


def _operators(program):
    """The namespaces of all operators of a program, those of its sub-programs included."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for m in graphs for node in m.graph.nodes if node.op == "call_function"]
    return {node.target.namespace for node in nodes if hasattr(node.target, "namespace")}


@pytest.mark.parametrize("strict", (False, True), ids=("non-strict", "strict"))
def test_network(tmp_path, strict):
    network = unet()
    sizes = {"x": {0: Dim("n"), 2: 4 * Dim("h"), 3: 4 * Dim("w")}}
    program = _program(network, 2, 3, 16, 12, strict=strict, dynamic_shapes=sizes)
    assert _operators(program) == {"aten"}
    torch.export.save(program, tmp_path / "unet.pt2")
    loaded = torch.export.load(tmp_path / "unet.pt2").module()
    for shape in ((2, 3, 16, 12), (1, 3, 8, 8), (5, 3, 20, 28)):
        x = images(*shape)
        expected, got = gradients(network, x), gradients(loaded, x)
        assert expected.keys() == got.keys()
        for name, t in expected.items():
            torch.testing.assert_close(got[name], t, msg=lambda m, name=name: f"{name}: {m}")


class _Functional(torch.nn.Module):
    """The functional form on parameters of its own."""

    def __init__(self, case, backend="auto"):
        super().__init__()
        self.variant, self.backend = case.variant, backend
        for name, p in zip(NAMES[1:], case.parameters, strict=True):
            self.register_parameter(name, None if p is None else torch.nn.Parameter(p))

    def forward(self, x):
        parameters = (getattr(self, name) for name in NAMES[1:])
        return call(self.variant, x, *parameters, backend=self.backend)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axes", (1, 2, 3))
def test_variants(axes, variant):
    spatial = (5, 4, 3)[:axes]
    module = _Functional(make_case((2, 6, *spatial), variant))
    sizes = {"x": {0: Dim("n"), **{2 + i: Dim(f"s{i}") for i in range(axes)}}}
    program = _program(module, 2, 6, *spatial, dynamic_shapes=sizes)
    assert _operators(program) == {"aten"}
    x = images(3, 6, *(s + 4 for s in spatial))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_types_are_summed_in_float32(dtype):
    module = scse_kernels.ChannelSpatialSELayer(6).to(dtype)
    x = (images(2, 6, 40, 30) + 100).to(dtype)  # 120,000 overflows float16
    program = torch.export.export(module, (x,), dynamic_shapes=SIZES)
    got, expected = program.module()(x), module(x)
    assert got.dtype == dtype and got.isfinite().all()
    torch.testing.assert_close(got, expected)


def test_channels_last_stays():
    module = scse_kernels.SCSEModule(8, 2)
    x = images(2, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    program = torch.export.export(module, (x,), dynamic_shapes=SIZES)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = images(3, 8, 6, 7).contiguous(memory_format=memory_format)
        y = program.module()(x)
        torch.testing.assert_close(y, module(x))
        assert y.is_contiguous(memory_format=memory_format)


def test_runs_without_this_package(tmp_path):
    module = scse_kernels.ChannelSpatialSELayer(8, combine="max")
    torch.export.save(_program(module, 2, 8, 5, 4), tmp_path / "scse.pt2")
    x = images(3, 8, 6, 7)
    torch.save((x, module(x).detach()), tmp_path / "expected.pt")
    code = """
import sys, torch
x, y = torch.load("expected.pt")
torch.testing.assert_close(torch.export.load("scse.pt2").module()(x), y)
assert "scse_kernels" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("strict", (False, True), ids=("non-strict", "strict"))
def test_a_named_backend_is_refused(fused, strict):
    """Exported, an operator would be left without a gradient."""
    module = _Functional(make_case((2, 6, 5, 4)), fused.backend)
    with pytest.raises(RuntimeError, match=f"torch.export.*got backend '{fused.backend}'"):
        _program(module, 2, 6, 5, 4, strict=strict)
