"""torch.onnx.export, as people call it: a graph of standard ONNX operators, for every size of
input, that computes in onnxruntime what the module computes."""

import pytest
import torch
from networks import images, needs_kernels, unet
from torch.export import Dim

import scse_kernels

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings("default"),  # torch warns of its own parts while tracing
    needs_kernels,
]


def _exported(module, path, *shape, sizes):
    """The ONNX model and a function that runs it."""
    module.eval()
    torch.onnx.export(
        module, (images(*shape),), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())

    def run(x):
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return onnx.load(path), run


def _check(model, run, module, *shapes):
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    for shape in shapes:
        x = images(*shape, seed=1)
        with torch.no_grad():
            torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-6)


def _count(model, *operators):
    return sum(node.op_type in operators for node in model.graph.node)


def test_network(tmp_path):
    network = unet()
    sizes = {0: Dim("n"), 2: 4 * Dim("h"), 3: 4 * Dim("w")}
    model, run = _exported(network, tmp_path / "unet.onnx", 2, 3, 16, 12, sizes=sizes)
    _check(model, run, network, (2, 3, 16, 12), (1, 3, 8, 8), (5, 3, 20, 28))
    blocks = sum(isinstance(m, scse_kernels.SCSEModule) for m in network.modules())
    assert _count(model, "ReduceMean") == blocks
    assert _count(model, "AveragePool", "GlobalAveragePool") == 0


@pytest.mark.parametrize("axes", (1, 3))
@pytest.mark.parametrize("combine", ("add", "max", "mul", "concat"))
def test_lines_and_volumes(tmp_path, combine, axes):
    module = scse_kernels.ChannelSpatialSELayer(6, combine=combine)
    sizes = {0: Dim("n"), **{2 + i: Dim(f"s{i}") for i in range(axes)}}
    spatial = (5, 4, 3)[:axes]
    model, run = _exported(module, tmp_path / "scse.onnx", 2, 6, *spatial, sizes=sizes)
    _check(model, run, module, (2, 6, *spatial), (3, 6, *(s + 4 for s in spatial)))


@pytest.mark.parametrize("layer", (scse_kernels.ChannelSELayer, scse_kernels.SpatialSELayer))
def test_one_branch(tmp_path, layer):
    module = layer(6)
    sizes = {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}
    model, run = _exported(module, tmp_path / "se.onnx", 2, 6, 5, 4, sizes=sizes)
    _check(model, run, module, (2, 6, 5, 4), (3, 6, 9, 8))
