"""AOTInductor compiles an exported network into a package of its own, right for every size."""

import pytest
import torch
from networks import images, needs_kernels
from torch.export import Dim

import scse_kernels

pytestmark = [
    pytest.mark.filterwarnings("default"),  # torch warns of its own parts while tracing
    needs_kernels,
]


def test_package(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        scse_kernels.SCSEModule(8, 2),
        scse_kernels.ChannelSpatialSELayer(8, combine="max"),
    ).eval()
    sizes = {"input": {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}}
    with torch.no_grad():
        program = torch.export.export(network, (images(2, 3, 9, 7),), dynamic_shapes=sizes)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "network.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for shape in ((2, 3, 9, 7), (1, 3, 16, 16), (5, 3, 12, 31)):
            x = images(*shape)
            torch.testing.assert_close(package(x), network(x), rtol=1e-5, atol=1e-5)
