"""convert and revert: what is recognised, what is left alone, and that nothing else changes."""

import copy
import io
import pickle
import re

import pytest
import torch
from budget import make_case
from peers import (
    COPIES,
    REAL,
    REAL_OTHERS,
    Both,
    Channel,
    MonaiSE,
    OldSmp,
    Smp,
    Spatial,
    TimmSE,
    TorchvisionSE,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import scse_kernels
from scse_kernels import backends, convert, revert


def _results(module, case):
    """y, dx and the gradients of the parameters, in float64."""
    x = case.x.double().requires_grad_()
    y = module(x)
    dy = case.dy.double()
    dy = dy if dy.shape == y.shape else torch.cat([dy, 2 * dy], 1)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def _assert_agree(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * b.abs().max().item())


def _is_fused(block, x):
    """Whether the block computes by itself, without calling the modules below it."""
    called = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, _: called.append(m))
    try:
        block(x)
    finally:
        handle.remove()
    return called == [block]


class Net(nn.Module):
    """A small network around a block."""

    def __init__(self, block, channels=12):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3)
        self.block = block
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return self.last(self.block(self.first(x)))


def _state(module):
    """The state_dict, as where each tensor is and its shape."""
    return [(k, v.data_ptr(), v.shape) for k, v in module.state_dict(keep_vars=True).items()]


@pytest.mark.parametrize("name", (*COPIES, *REAL))
def test_a_known_block_is_fused(name):
    make, channels, axes, computes = (COPIES | REAL)[name]
    block = make().double()
    original, cls = copy.deepcopy(block), type(block)
    state, parameters = _state(block), list(block.parameters())
    case = make_case((3, channels, *(9, 7, 5)[:axes]))

    report = convert(block)
    found = [(e.paths, e.module, e.status, e.detail) for e in report.entries]
    assert found == [(("",), cls.__name__, "converted", computes)]
    assert isinstance(block, cls)
    assert _state(block) == state
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    original.load_state_dict(block.state_dict(), strict=True)
    block.load_state_dict(original.state_dict(), strict=True)
    assert _is_fused(block, case.x.double())
    _assert_agree(_results(block, case), _results(original, case))

    again = convert(block)
    assert [(e.status, e.detail) for e in again.entries] == [("already fused", computes)]
    assert again.converted == [] and _is_fused(block, case.x.double())
    revert(block)
    assert type(block) is cls and set(vars(block)) == set(vars(original))
    assert not _is_fused(block, case.x.double())


class Scaled(Channel):
    """A forward of one's own, which differs by little."""

    def forward(self, x):
        return super().forward(x) * 1.001


class Detached(TimmSE):
    """The same output, but no gradient through the gate."""

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(pooled)))).detach()


class OnlyInTraining(Channel):
    def forward(self, x):
        return super().forward(x) if self.training else x


class Float32(Channel):
    """Computes in float32 whatever x is, and returns that."""

    def forward(self, x):
        return super().forward(x).float()


class InPlace(Channel):
    def forward(self, x):
        return x.copy_(super().forward(x))


class WithGate(Channel):
    def forward(self, x):
        return super().forward(x), x


class Dropping(Channel):
    def forward(self, x):
        return super().forward(F.dropout(x, 1e-6, self.training))


class Counting(Channel):
    def __init__(self):
        super().__init__(12, 4)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Tempered(Channel):
    """A buffer that does nothing yet."""

    def __init__(self):
        super().__init__(12, 4)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.temperature


class SomeParameter(nn.Parameter):
    pass


def _with_layer(name, layer, block=None):
    block = block or Channel(12, 4)
    setattr(block, name, layer)
    return block


def _with(change, block=None):
    block = block or Channel(12, 4)
    change(block)
    return block


OTHERS = {
    "ReLU6": (lambda: TimmSE(12, 3, nn.ReLU6), "act is a ReLU6"),
    "PReLU": (lambda: TimmSE(12, 3, nn.PReLU), "act is a PReLU"),
    "unbounded gate": (lambda: MonaiSE(2, 12, 2, second="ReLU"), "no gate"),
    "batch norm": (lambda: TimmSE(12, 3, norm=nn.BatchNorm2d).eval(), "bn is a BatchNorm2d"),
    "dropout": (lambda: TimmSE(12, 3, lambda: nn.Dropout(1e-6)), "random numbers"),
    "functional dropout": (lambda: Dropping(12, 4), "random numbers"),
    "forward overridden": (lambda: Scaled(12, 4), "something else"),
    "gate detached": (lambda: Detached(12, 3), "something else"),
    "eval differs": (lambda: OnlyInTraining(12, 4), "something else"),
    "another dtype": (lambda: Float32(12, 4), "something else"),
    "in place": (lambda: InPlace(12, 4), "in-place"),
    "two results": (lambda: WithGate(12, 4), "returns a tuple"),
    "buffer changes": (Counting, "sets the attribute calls"),
    "buffer takes part": (Tempered, "something else"),
    "forward of the object": (
        lambda: _with(lambda block: setattr(block, "forward", lambda x: x)),
        "its forward was replaced",
    ),
    "forward of a child": (
        lambda: _with(lambda block: setattr(block.fc1, "forward", lambda x: x)),
        "fc1 has hooks",
    ),
    "forward hook": (
        lambda: _with(lambda block: block.sigmoid.register_forward_hook(print)),
        "sigmoid has hooks",
    ),
    "forward pre-hook": (
        lambda: _with(lambda block: block.fc1.register_forward_pre_hook(print)),
        "fc1 has hooks",
    ),
    "backward hook": (
        lambda: _with(lambda block: block.fc1.register_full_backward_hook(print)),
        "fc1 has hooks",
    ),
    "backward pre-hook": (
        lambda: _with(lambda block: block.fc1.register_full_backward_pre_hook(print)),
        "fc1 has hooks",
    ),
    "pruned": (
        lambda: _with(lambda block: prune.random_unstructured(block.fc1, "weight", 0.5)),
        "fc1 has hooks",
    ),
    "parametrized": (
        lambda: _with(lambda block: parametrizations.weight_norm(block.fc2)),
        "fc2 is a ParametrizedLinear",
    ),
    "lazy": (lambda: _with_layer("fc1", nn.LazyLinear(3)), "fc1 is a LazyLinear"),
    "subclass of Parameter": (
        lambda: _with(
            lambda block: setattr(block.fc1, "weight", SomeParameter(block.fc1.weight.data))
        ),
        "fc1.weight is a SomeParameter",
    ),
    "smp 0.0.2": (lambda: OldSmp(12, 4), "sSE.0 has 12 output channels.*0.0.2"),
    "no hidden channel": (
        lambda: _with_layer("fc1", nn.Linear(12, 0), _with_layer("fc2", nn.Linear(0, 12))),
        "at least one hidden channel",
    ),
    "scripted": (lambda: torch.jit.script(TorchvisionSE(12, 3)), "torch.jit"),
    "several gates": (
        lambda: _with_layer("fc2", nn.Conv2d(3, 24, 1), TimmSE(12, 3)),
        r"fc2 \[24, 3\] doesn't lead back from fc1 \[3, 12\]",
    ),
    "neighbourhood": (
        lambda: _with(
            lambda block: setattr(block, "conv", nn.Conv2d(12, 1, 3, padding=1)), Spatial(12, 2)
        ),
        "conv.weight is not that of a 1x1 convolution",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Initializing zero-element")
@pytest.mark.parametrize("name", (*OTHERS, *REAL_OTHERS))
def test_another_block_is_left_alone(name):
    make, why_not = (OTHERS | REAL_OTHERS)[name]
    block = make()
    cls = type(block)
    report = convert(nn.Sequential(block))
    (entry,) = report.left_alone
    assert report.entries == (entry,) and entry.paths == ("0",)
    assert re.search(why_not, entry.detail), entry.detail
    assert type(block) is cls


def test_what_is_no_recalibration_is_not_mentioned():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12)

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(12, 1, 1)

    report = convert(nn.ModuleList([Mlp(), Head(), nn.SELU(), nn.Sequential(nn.MSELoss())]))
    assert report.entries == ()
    assert str(report) == "no squeeze & excitation block was found"


@pytest.mark.parametrize(
    "activation, name",
    [(lambda: nn.LeakyReLU(1e-4), "leaky_relu(0.0001)"), (nn.ReLU6, None), (nn.SELU, None)],
)
def test_no_activation_passes_for_another(activation, name):
    """A single hidden channel that is positive for all samples would hide a leak below zero."""
    blocks = [TimmSE(channels, 1, activation) for channels in range(1, 40)]
    details = [entry.detail for entry in convert(nn.ModuleList(blocks)).converted]
    assert details == ([f"cse, {name}"] * len(blocks) if name else [])


def test_a_block_around_a_block_is_not_mentioned():
    class SEBottleneck(Net):
        pass

    (entry,) = convert(SEBottleneck(Smp(12, 4))).entries
    assert entry.paths == ("block",)


def test_the_branches_of_another_combination_are_fused():
    """A tie gives all of its gradient to one side here: the whole is left alone, its parts not."""
    block = Both(12, 2, 2, lambda a, b: torch.where(a >= b, a, b)).double()
    original = copy.deepcopy(block)
    report = convert(block)
    assert [(e.paths, e.status) for e in report.entries] == [
        (("",), "left alone"),
        (("cSE",), "converted"),
        (("sSE",), "converted"),
    ]
    case = make_case((3, 12, 9, 7))
    assert not _is_fused(block, case.x.double()) and _is_fused(block.cSE, case.x.double())
    _assert_agree(_results(block, case), _results(original, case))


def test_the_report_is_a_table():
    block = Smp(32, 16)
    model = nn.ModuleDict({"decoder": nn.ModuleList([block, nn.ReLU(), block])})
    model["other"] = TorchvisionSE(12, 3, nn.ReLU6)
    model["ours"] = scse_kernels.ChannelSELayer(12)
    lines = str(convert(model)).splitlines()
    if backends.missing_kernels():  # told in a last line
        assert "no kernels" in lines.pop()
    other = "it computes something else: activation is a ReLU6"
    assert [re.split("  +", line) for line in lines] == [
        ["path", "class", "result"],
        ["decoder.0 (shared, 2 places)", "Smp", "converted: scse, add"],
        ["other", "TorchvisionSE", f"left alone: {other}"],
        ["ours", "ChannelSELayer", "already fused: a layer of scse_kernels"],
    ]
    assert len({line.index(word) for line, word in zip(lines, ("class", "Smp"), strict=False)}) == 1


def test_a_shared_block_stays_shared():
    block = MonaiSE(2, 12, 2)
    model = nn.ModuleList([nn.Sequential(nn.ReLU(), block), block, nn.Sequential(block)])
    elsewhere = [block]
    (entry,) = convert(model).entries
    assert entry.paths == ("0.1", "1", "2.0")
    assert model[0][1] is model[1] is model[2][0] is elsewhere[0]
    assert _is_fused(elsewhere[0], torch.randn(2, 12, 3, 4))
    revert(model)
    assert type(elsewhere[0]) is MonaiSE


def test_inside_a_wrapper():
    model = nn.DataParallel(Net(Smp(12, 4)))
    assert [e.paths for e in convert(model).converted] == [("module.block",)]
    replica = model.module.block._replicate_for_data_parallel()
    assert type(replica) is type(model.module.block)


def test_only_the_class_changes():
    block = Both(12, 4, 2, torch.max)
    block.register_buffer("seen", torch.ones(3))
    block.register_forward_hook(lambda *_: None)
    block.sSE.eval()
    block.cSE.requires_grad_(False)
    before = {name: dict(vars(module)) for name, module in block.named_modules()}
    convert(block)
    for name, module in block.named_modules():
        assert vars(module).keys() == before[name].keys()
        for key, value in vars(module).items():
            assert value is before[name][key], (name, key)
    assert block.training and not block.sSE.training
    assert [p.requires_grad for p in block.parameters()] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_the_probe_leaves_no_trace(context):
    calls = []
    block = Dropping(12, 4)  # draws random numbers
    fine = Both(12, 4, 2, torch.max).requires_grad_(False)
    for module in (block, fine):
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    values = [p.clone() for p in fine.parameters()]
    state = torch.get_rng_state()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    with context():
        report = convert(nn.Sequential(block, fine))
    assert [e.status for e in report.entries] == ["left alone", "converted"]
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []
    Channel(12, 4)(torch.randn(2, 12, 3, 4))
    assert calls != []  # the hook on all modules is there again
    handle.remove()
    for module in (block, fine):
        assert all(m.training for m in module.modules())
        assert all(p.grad is None for p in module.parameters())
    assert all(map(torch.equal, values, fine.parameters()))


@pytest.mark.parametrize("value", (0.0, 1e4, float("nan")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_the_decision_does_not_depend_on_the_values(value, dtype):
    """Saturated or empty gates would make the sum look like the maximum."""
    blocks = [Both(12, 4, 2, combine) for combine in (torch.add, torch.max)]
    blocks.append(Scaled(12, 4))
    for block in blocks:
        for parameter in block.parameters():
            nn.init.constant_(parameter, value)
        block.to(dtype)
    report = convert(nn.ModuleList(blocks))
    assert [e.detail for e in report.entries] == [
        "scse, add",
        "scse, max",
        "it computes something else",
    ]


def test_on_the_meta_device():
    with torch.device("meta"):
        block = Smp(12, 4)
    convert(block)
    case = make_case((3, 12, 9, 7))
    block.to_empty(device="cpu").load_state_dict(Smp(12, 4).state_dict())
    assert _is_fused(block, case.x)


def test_training_goes_on():
    """An optimizer made before conversion, gradients, moving to another dtype."""
    models = [Net(Both(12, 4, 2, torch.max))]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, 0.9) for model in models]
    convert(models[0])
    x = make_case((3, 1, 9, 7)).x
    first = [p.clone() for p in models[0].parameters()]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert not torch.equal(models[0].block.sSE.conv.bias, first[-3])
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    block = models[0].double().block
    assert _is_fused(block, x.double().expand(-1, 12, -1, -1))
    revert(models[0])
    torch.testing.assert_close(models[0](x.double()).float(), models[1](x), rtol=1e-3, atol=1e-3)


def _deepcopied(model):
    return copy.deepcopy(model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", (_deepcopied, _pickled, _saved))
def test_copies_are_converted_and_can_be_reverted(copied):
    model = Net(Smp(12, 4))
    convert(model)
    x = make_case((3, 1, 9, 7)).x
    y = model(x)
    other = copied(model)
    assert type(other.block) is type(model.block) and other.block is not model.block
    assert torch.equal(other(x), y)
    with torch.no_grad():
        other.block.sSE[0].bias += 1
        assert torch.equal(model(x), y) and not torch.equal(other(x), y)
    assert _is_fused(other.block, other.first(x))
    revert(other)
    assert type(other.block) is Smp
    assert _is_fused(model.block, model.first(x))
    with torch.no_grad():
        other.block.sSE[0].bias -= 1
    torch.testing.assert_close(other(x), y)


def test_hooks_of_the_block_stay():
    block, calls = Smp(12, 4), []
    handle = block.register_forward_hook(lambda m, args, y: calls.append("forward") or 2 * y)
    block.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    block.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    block.cSE[1].register_state_dict_post_hook(lambda *_: calls.append("child's state_dict"))
    convert(block)
    x = torch.randn(2, 12, 3, 4, requires_grad=True)
    y = block(x)
    y.sum().backward()
    block.state_dict()
    assert calls == ["pre", "forward", "backward", "child's state_dict", "state_dict"]
    handle.remove()
    torch.testing.assert_close(2 * block(x), y)
    revert(block)
    calls.clear()
    block(x)
    assert calls == ["pre"]


def test_hooks_of_children_run_the_original_while_they_are_there():
    block = Smp(12, 4)
    convert(block)
    x = torch.randn(2, 12, 3, 4)
    y, gates = block(x), []
    handle = block.cSE[4].register_forward_hook(lambda m, args, gate: gates.append(gate))
    torch.testing.assert_close(block(x), y)
    assert len(gates) == 1 and not _is_fused(block, x)
    handle.remove()
    assert _is_fused(block, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: prune.l1_unstructured(block.cSE.fc1, "weight", 0.5),
        lambda block: parametrizations.weight_norm(block.cSE.fc1),
        lambda block: setattr(block.cSE, "fc1", nn.Sequential(nn.Linear(12, 3), nn.Dropout(0.0))),
        lambda block: setattr(block.cSE, "relu", nn.SiLU()),
        lambda block: setattr(block.cSE, "forward", lambda x: x),
    ],
    ids=["pruned", "parametrized", "layer replaced", "activation replaced", "forward replaced"],
)
def test_what_is_changed_after_conversion_counts(change):
    block = Both(12, 4, 2, torch.max)
    convert(block)
    change(block)
    original = Both(12, 4, 2, torch.max)
    original._modules = block._modules
    case = make_case((3, 12, 9, 7))
    for _ in range(2):  # a stale weight would fail in the second backward
        for a, b in zip(*(_gradients(b, case) for b in (block, original)), strict=True):
            torch.testing.assert_close(a, b)


def _gradients(module, case):
    module.zero_grad()
    module(case.x).backward(case.dy)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def test_few_shot_weights_are_passed_on():
    block = Spatial(12, 2)
    x, weights = torch.randn(2, 12, 5, 7), torch.randn(3, 12, 1, 1)
    expected = block(x, weights)
    convert(block)
    assert torch.equal(block(x, weights), expected)
    assert torch.equal(block(x=x, weights=weights), expected)


def test_symbolic_trace_sees_the_original():
    model = Net(Smp(12, 4))
    x = torch.randn(2, 1, 9, 7)
    y = model(x)
    convert(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), y)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("when", ("before", "in place, before", "the block, before", "after"))
def test_compiled_models(when):
    torch._dynamo.reset()
    model = Net(Smp(12, 4))
    x = torch.randn(2, 1, 9, 7)
    y, called = model(x), model
    if when == "before":
        called = torch.compile(model, backend="eager", fullgraph=True)
        called(x)
    elif when == "in place, before":
        model.compile(backend="eager", fullgraph=True)
        model(x)
    elif when == "the block, before":
        model.block.compile(backend="eager", fullgraph=True)
    convert(called)
    if when == "after":
        called = torch.compile(model, backend="eager", fullgraph=True)
    originals = []
    try:
        forward, Smp.forward = Smp.forward, lambda *_: originals.append(1)
        torch.testing.assert_close(called(x), y)
    finally:
        Smp.forward = forward
    assert originals == []


def test_a_class_changed_later_is_not_reverted():
    block = Smp(12, 4)
    convert(block)
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"revert\(\): the class of 0 was changed .* Sharded"):
        revert(nn.Sequential(block))


def test_a_model_is_wanted():
    with pytest.raises(TypeError, match=r"convert\(\): model must be a Module, not dict"):
        convert({})
