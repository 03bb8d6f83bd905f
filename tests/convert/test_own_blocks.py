"""Blocks of one's own: exact ones are converted whole, others are left alone or stay right."""

import copy
import random
import re

import exact_blocks
import other_blocks
import pytest
import torch
from budget import make_case
from networks import needs_kernels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scse_kernels import convert

#: By spatial axes: one position, common sizes, odd ones, larger than windows.
SIZES = {
    1: ((1,), (7,), (64,), (333,)),
    2: ((1, 1), (5, 1), (9, 7), (64, 48), (1, 300), (131, 17)),
    3: ((1, 1, 1), (3, 5, 7), (16, 16, 16), (2, 70, 3)),
}


def _outcome(block, x, dy=None, call=lambda block, x: block(x)):
    """The block's answer and its gradients, or the kind of exception that it raised."""
    x = x.detach().clone().requires_grad_()
    try:
        y = call(block, x)
    except Exception as error:
        return type(error)
    if not isinstance(y, torch.Tensor) or not y.requires_grad:
        return y
    parameters = [p for p in block.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *grads]


def _assert_same(ours, theirs, tolerance=1e-6):
    if isinstance(theirs, type):
        assert isinstance(ours, type), f"the original raises {theirs}"
        return
    assert type(ours) is type(theirs), ours
    if isinstance(theirs, torch.Tensor):
        ours, theirs = [ours], [theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None and isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            size = b.nan_to_num().abs().max().item() if b.numel() else 0.0
            atol = tolerance * size
            torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, equal_nan=True)


def _pair(make):
    torch.manual_seed(0)
    block = make().double()
    return block, copy.deepcopy(block)


def _map(*shape):
    return make_case(shape).x.double()


@pytest.mark.parametrize("name", exact_blocks.BLOCKS)
def test_an_exact_block_is_fused_whole(name):
    make, axes, computes = exact_blocks.BLOCKS[name]
    block, original = _pair(make)
    report = convert(block)
    assert [(e.paths, e.status, e.detail) for e in report.entries] == [
        (("",), "converted", computes)
    ]
    fused = 0
    for training in (True, False):
        block.train(training), original.train(training)
        for sizes in SIZES[axes]:
            for samples in (1, 3):
                x = _map(samples, exact_blocks.C, *sizes)
                calls = []
                handle = nn.modules.module.register_module_forward_pre_hook(
                    lambda m, _, calls=calls: calls.append(m)
                )
                ours = _outcome(block, x)
                handle.remove()
                fused += calls == [block]
                _assert_same(ours, _outcome(original, x))
    # Blocks that squeeze() everything keep their own forward where that would take an axis more.
    assert fused >= (6 if name == "squeezed entirely" else 4 * len(SIZES[axes]))


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize(
    "name", [name for name in exact_blocks.BLOCKS if exact_blocks.BLOCKS[name][2].endswith("+ x")]
)
def test_x_is_added_by_the_kernels(name):
    block, _ = _pair(exact_blocks.BLOCKS[name][0])
    convert(block)
    x = _map(2, exact_blocks.C, 9, 7).requires_grad_()
    with _Operations() as operations:
        y = block(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    own = [name for name in operations.names if not name.startswith("aten::ones")]
    assert [name for name in own if "aten" in name] == []
    assert [name.split("_")[-1] for name in own] == ["forward", "backward"]


@pytest.mark.parametrize("name", exact_blocks.BLOCKS)
def test_other_calls_get_the_original(name):
    """Other numbers of axes, unbatched maps, empty ones, other dtypes and channels."""
    make, axes, _ = exact_blocks.BLOCKS[name]
    block, original = _pair(make)
    convert(block)
    c = exact_blocks.C
    shapes = [(c,), (2, c), (c, c), (c, 5, 4), (c, c, c), (3, c, 5), (3, c, 5, 4), (3, c, 5, 4, 2)]
    shapes += [(c, 5, 4, 3), (c, c, c, c), (2, c, 3, 2, 2, 2), (0, c, *(4, 3, 2)[:axes])]
    shapes += [(2, c, *(0,) * axes), (2, c + 1, *(4, 3, 2)[:axes]), (2, 1, *(4, 3, 2)[:axes])]
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        _assert_same(_outcome(block, x), _outcome(original, x))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, c, *(4, 3, 2)[:axes], dtype=dtype)
        _assert_same(_outcome(block, x), _outcome(original, x))
    x = torch.randn(2, c, *(4, 3, 2)[:axes], dtype=torch.float64)
    for call in (lambda b, x: b(x, x), lambda b, x: b(nothing=x), lambda b, x: b([x])):
        _assert_same(_outcome(block, x, call=call), _outcome(original, x, call=call))


@pytest.mark.parametrize("name", exact_blocks.BLOCKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_autocast_gives_the_original_dtype(name, dtype):
    make, axes, _ = exact_blocks.BLOCKS[name]
    block, original = _pair(make)
    block, original = block.float(), original.float()
    convert(block)
    x = torch.randn(3, exact_blocks.C, *(4, 3, 2)[:axes]).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = _outcome(block, x), _outcome(original, x)
    _assert_same(ours, theirs, tolerance=0.1)


@pytest.mark.filterwarnings("ignore:old")
@pytest.mark.parametrize("name", other_blocks.BLOCKS)
def test_another_block_stays_what_it_is(name, capsys):
    make, reason = other_blocks.BLOCKS[name]
    block, original = _pair(make)
    torch.manual_seed(1), random.seed(1)
    states = torch.get_rng_state(), random.getstate()
    report = convert(block)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert capsys.readouterr() == ("", "")
    assert other_blocks.GATES == [] and other_blocks.OfTheClass.maps == []
    assert getattr(block, "maps", []) in ([], {}) and getattr(block, "seen_outside", []) == []
    whole = [entry for entry in report.entries if entry.paths == ("",)]
    if reason is None:
        assert whole == []
    else:
        assert whole[0].status == "left alone" and re.search(reason, whole[0].detail), whole
    x = _map(
        3, exact_blocks.C, *((40,) if isinstance(block, other_blocks.MovingWindow) else (40, 9))
    )
    for training in (True, False):
        block.train(training), original.train(training)
        results = []
        for which in (block, original):
            torch.manual_seed(2), random.seed(2)
            results.append(_outcome(which, x))
        _assert_same(*results)
    other_blocks.GATES.clear(), other_blocks.OfTheClass.maps.clear()


class Flagged(exact_blocks.GAB):
    """Attributes of the object, of the class and of the Python module decide."""

    of_the_class = True

    def __init__(self):
        super().__init__()
        self.on, self.stages, self.slope = True, ["excite"], nn.LeakyReLU(0.2)

    def forward(self, x):
        if not (self.on and self.of_the_class and MODULE_FLAG and "excite" in self.stages):
            return x
        att = self.slope(self.conv1(self.global_avgpool(x)))
        return x * self.sigmoid(self.conv2(att))


MODULE_FLAG = True


@pytest.mark.parametrize(
    "change",
    (
        lambda block, patch: setattr(block, "on", False),
        lambda block, patch: block.stages.clear(),
        lambda block, patch: patch.setattr(Flagged, "of_the_class", False),
        lambda block, patch: patch.setitem(globals(), "MODULE_FLAG", False),
        lambda block, patch: setattr(block.slope, "negative_slope", 0.9),
        lambda block, patch: patch.setattr(nn.LeakyReLU, "forward", lambda self, x: x),
    ),
    ids=("attribute", "list", "class attribute", "global", "of an activation", "forward"),
)
def test_what_forward_reads_is_watched(change, monkeypatch):
    block, original = _pair(Flagged)
    (entry,) = convert(block).entries
    assert entry.detail == "cse, leaky_relu(0.2)"
    x = _map(2, exact_blocks.C, 5, 4)
    before = _outcome(block, x)
    _assert_same(before, _outcome(original, x))
    change(block, monkeypatch)
    original.on, original.stages, original.slope = block.on, block.stages, block.slope
    after = _outcome(original, x)
    assert not torch.equal(after[0], before[0]) if isinstance(after, list) else True
    _assert_same(_outcome(block, x), after)


class Inner(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class WithInner(exact_blocks.GAB):
    def __init__(self):
        super().__init__()
        self.relu = Inner()


def test_the_forward_of_an_inner_class_can_be_patched(monkeypatch):
    block, original = _pair(WithInner)
    assert convert(block).converted
    monkeypatch.setattr(Inner, "forward", lambda self, x: x * 2)
    x = _map(2, exact_blocks.C, 5, 4)
    _assert_same(_outcome(block, x), _outcome(original, x))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.attention = inner

    def forward(self, x):
        return self.attention(x)


def test_one_sample_gets_the_original_where_that_differs():
    block, original = _pair(other_blocks.OneSampleInEvaluation)
    assert convert(block).converted
    for training in (True, False):
        block.train(training), original.train(training)
        for samples in (1, 2):
            x = _map(samples, exact_blocks.C, 5, 4)
            _assert_same(_outcome(block, x), _outcome(original, x))


def test_a_mere_wrapper_is_not_the_block():
    report = convert(nn.Sequential(nn.Conv2d(3, 12, 3), Wrapper(Wrapper(exact_blocks.GAB()))))
    assert [entry.paths for entry in report.entries] == [("1.attention.attention",)]
    report = convert(Wrapper(other_blocks.Normalised()))
    assert [entry.paths for entry in report.entries] in ([("attention",)], [("",)])


class InvertedResidual(nn.Module):
    """A block of a mobile network around squeeze & excitation."""

    def __init__(self, se):
        super().__init__()
        self.expand, self.bn = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.se, self.project = se, nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.project(self.se(torch.relu(self.bn(self.expand(x)))))


def test_the_report_names_the_blocks_and_nothing_else():
    model = nn.ModuleDict(
        {
            "a": InvertedResidual(exact_blocks.GAB()),
            "b": InvertedResidual(other_blocks.MaxPooled()),
            "c": InvertedResidual(nn.Identity()),
            "head": nn.Sequential(nn.Conv2d(12, 1, 1), nn.Sigmoid()),
            "mlp": nn.Sequential(nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 12), nn.Sigmoid()),
        }
    )
    report = convert(model)
    assert [(e.paths, e.status) for e in report.entries] == [
        (("a.se",), "converted"),
        (("b.se",), "left alone"),
    ]
