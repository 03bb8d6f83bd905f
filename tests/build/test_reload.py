"""importlib.reload of the package and of all its modules, as notebooks do it (%autoreload)."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import scse_kernels

_CODE = """
    import copy, importlib, sys
    import torch
    sys.path.insert(0, {tests!r})
    from peers import Smp
    import scse_kernels

    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    original = Smp(8, 2)
    model = torch.nn.Sequential(copy.deepcopy(original))
    first = scse_kernels.convert(model)
    assert len(first.converted) == 1
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    kind, layer = type(model[0]), scse_kernels.ChannelSpatialSELayer(8)
    operator = torch.ops.scse_kernels.cpu_forward

    def ours():
        return [name for name in sys.modules if name.split(".")[0] == "scse_kernels"
                and not name.startswith("scse_kernels._C")]

    def check(scse_kernels):
        for module in (model, torch.nn.Sequential(copy.deepcopy(original)), compiled):
            scse_kernels.convert(model)
            assert type(model[0]) is kind, "wrapped twice"
            assert len(scse_kernels.convert(copy.deepcopy(model)).converted) == 0
            got = torch.autograd.grad(module(x).sum(), x)[0]
            torch.testing.assert_close(got, expected)
        assert torch.ops.scse_kernels.cpu_forward is operator
        layer(x).sum().backward()
        new = scse_kernels.ChannelSpatialSELayer(8)
        new.load_state_dict(layer.state_dict())
        assert torch.equal(new(x), layer(x))
        assert len(scse_kernels.convert(copy.deepcopy(original)).converted) == 1

    importlib.reload(scse_kernels)
    check(scse_kernels)
    names = ours()
    assert len(names) > 10
    for name in names:
        importlib.reload(sys.modules[name])
    check(scse_kernels)
    for name in ours():
        del sys.modules[name]
    import scse_kernels as again
    assert again is not scse_kernels
    check(again)
    again.revert(model)
    assert type(model[0]) is Smp
    assert len(again.convert(model).converted) == 1
    print("done")
"""


def test_reload():
    package, tests = Path(scse_kernels.__file__).parents[1], Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CODE).format(tests=str(tests))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["done"], done.stderr
