"""convert with example inputs: BatchNorm and ReLU before a block, and what goes another way."""

import copy
import functools
import io
import pickle
import weakref

import pytest
import torch
from networks import images, needs_kernels
from peers import Both, Channel, MonaiSE, Smp, Spatial, TimmSE
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from scse_kernels import convert, revert, use_backend

pytestmark = needs_kernels

C = 12
TOGETHER = "batch norm, relu, "


class Calls(TorchDispatchMode):
    """Counts the calls of the operator that computes all three, and those of torch's BatchNorm."""

    def __init__(self):
        super().__init__()
        self.together = self.apart = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.together += "bn_forward" in function.name()
        self.apart += "batch_norm" in function.name() and "backward" not in function.name()
        return function(*args, **(kwargs or {}))


def calls_of(net, x):
    """How often each is called; the running statistics stay."""
    before = [(b, b.clone()) for b in net.buffers()]
    with Calls() as calls:
        net(x)
    for buffer, value in before:
        buffer.copy_(value)
    return calls.together, calls.apart


class Decoder(nn.Module):
    """As segmentation_models.pytorch's: BatchNorm and ReLU in one child, the block in another."""

    def __init__(self, block=None, norm=None, relu=None):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, C, 3, padding=1), norm or nn.BatchNorm2d(C), relu or nn.ReLU(inplace=True)
        )
        self.attention = nn.Sequential(block or Smp(C, 4))
        self.head = nn.Conv2d(C, 2, 1)

    def forward(self, x):
        return self.head(self.attention(self.conv(x)))


class Functional(nn.Module):
    def __init__(self, relu, block=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.relu, self.block = relu, block or Both(C, 2, 2, torch.max)

    def forward(self, x):
        return self.block(self.relu(self.norm(self.conv(x))))


def _relu(x):
    return x.relu()


def _relu_(x):
    return x.relu_()


def _row(axes, block, inplace=False, **norm):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    return nn.Sequential(conv(3, C, 3), batch_norm(C, **norm), nn.ReLU(inplace), block)


def cat(*maps):
    return torch.cat(maps, 1)


STRUCTURES = {
    "decoder": Decoder,
    "decoder, ReLU not in place": lambda: Decoder(relu=nn.ReLU()),
    "row": lambda: _row(2, Smp(C, 4)),
    "row, 1d": lambda: _row(1, MonaiSE(1, C, 2), True),
    "row, 3d": lambda: _row(3, Both(C, 2, 3, torch.max), True),
    "cSE": lambda: _row(2, Channel(C, 4)),
    "sSE": lambda: _row(2, Spatial(C, 2)),
    "product": lambda: _row(2, Both(C, 2, 2, torch.mul)),
    "concatenation": lambda: _row(2, Both(C, 2, 2, cat)),
    "momentum=None": lambda: _row(2, Smp(C, 4), momentum=None),
    "not tracked": lambda: _row(2, Smp(C, 4), track_running_stats=False),
    "not affine": lambda: _row(2, Smp(C, 4), affine=False),
    "F.relu": lambda: Functional(F.relu),
    "F.relu, in place": lambda: Functional(functools.partial(F.relu, inplace=True)),
    "torch.relu": lambda: Functional(torch.relu),
    "torch.relu_": lambda: Functional(torch.relu_),
    "Tensor.relu": lambda: Functional(_relu),
    "Tensor.relu_": lambda: Functional(_relu_),
}


def make(build, seed=0):
    """A network in float64 whose parameters and running statistics are random, and its input."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = build().double()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for t in (module.weight, module.bias):
                    if t is not None:
                        nn.init.normal_(t, 0.5)
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
    first = next(m for m in net.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    return net, images(3, 3, *(9, 8, 7)[: first.weight.dim() - 2]).double()


def results(net, x, call=None):
    """y, all gradients and all buffers of a step."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    y = (net if call is None else call)(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    (y * weight).sum().backward()
    named = {"y": y.detach().clone(), "x": x.grad}
    named |= {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return named | {n: b.clone() for n, b in net.named_buffers()}


def assert_same(ours, theirs, rtol=1e-9):
    assert ours.keys() == theirs.keys()
    scale = max(t.abs().max().item() for t in theirs.values() if t.is_floating_point())
    for name, t in theirs.items():
        if t.is_floating_point():
            torch.testing.assert_close(ours[name], t, rtol=rtol, atol=rtol * scale, msg=name)
        else:
            assert torch.equal(ours[name], t), name


def converted(build, seed=0):
    """A network, its converted copy, in which one block computes all three, and an input."""
    original, x = make(build, seed)
    net = copy.deepcopy(original)
    (entry,) = convert(net, (x,)).converted
    assert entry.detail.startswith(TOGETHER) and entry.alone is None, entry
    return original, net, x


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("name", STRUCTURES)
def test_all_three_are_one_operator(name, training):
    original, net, x = converted(STRUCTURES[name])
    for module in (original, net):
        module.train(training)
    assert list(net.state_dict()) == list(original.state_dict())
    for _ in range(2):
        assert_same(results(net, x), results(original, x))
    assert calls_of(net, x) == (1, 0)


def test_convert_leaves_no_trace():
    net, x = make(Decoder)
    net.conv[1].eval()
    net.conv[0].weight.grad = torch.ones_like(net.conv[0].weight)
    before = copy.deepcopy(net)
    tensors = [(k, v.data_ptr()) for k, v in net.state_dict(keep_vars=True).items()]
    random, given = torch.get_rng_state(), x.clone()
    with torch.no_grad():
        convert(net, (x,))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, given) and x.grad is None
    assert tensors == [(k, v.data_ptr()) for k, v in net.state_dict(keep_vars=True).items()]
    for (name, a), b in zip(net.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert torch.equal(net.conv[0].weight.grad, torch.ones_like(net.conv[0].weight))
    assert net.conv[1].weight.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    for ours, theirs in zip(net.modules(), before.modules(), strict=True):
        assert isinstance(ours, type(theirs)) and vars(ours).keys() == vars(theirs).keys()


def _frozen(net):
    net.conv[1].eval()


def _no_gradients(net):
    net.conv.requires_grad_(False)


def _only_the_norm(net):
    net.requires_grad_(False)
    net.conv[1].requires_grad_(True)


@pytest.mark.parametrize("change", (_frozen, _no_gradients, _only_the_norm))
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
def test_frozen_parts(change, first):
    original, x = make(Decoder)
    net = copy.deepcopy(original)
    if first:
        change(net)
    convert(net, (x,))
    change(net)
    change(original)
    assert_same(results(net, x), results(original, x))
    assert calls_of(net, x) == (1, 0)


def test_channels_last():
    original, net, x = converted(Decoder)
    for module in (original, net):
        module.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same(results(net, x), results(original, x))
    z = net.conv[0](x)
    assert net.conv[0](x).is_contiguous(memory_format=torch.channels_last)
    assert net.attention(z).is_contiguous(memory_format=torch.channels_last)
    assert calls_of(net, x) == (1, 0)


def test_autocast():
    original, net, x = converted(Decoder)
    exact = results(original, x)
    original, net, x = make(Decoder)[0].float(), net.float(), x.float()
    net.load_state_dict(original.state_dict())

    def call(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    ours, theirs = (results(m, x, functools.partial(call, m)) for m in (net, original))
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_of(net, x) == (1, 0)
    assert ours["y"].dtype == theirs["y"].dtype == torch.bfloat16
    for name, right in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        if right.is_floating_point():
            distance = [(r[name].double() - right).norm().item() for r in (ours, theirs)]
            assert distance[0] <= 4 * distance[1] + 1e-2 * right.norm().item(), name


def test_without_gradients():
    original, net, x = converted(Decoder)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(net(x), original(x))
            assert calls_of(net, x) == (1, 0)


class Checkpointed(nn.Module):
    """torch.utils.checkpoint around all of it, around what comes before the block, or the block."""

    def __init__(self, around, reentrant=False):
        super().__init__()
        self.first, self.decoder = nn.Conv2d(3, 3, 1), Decoder()
        self.around, self.reentrant = around, reentrant

    def part(self, name, module, x):
        if self.around != name:
            return module(x)
        return checkpoint(module, x, use_reentrant=self.reentrant)

    def tail(self, x):
        return self.decoder.attention(self.decoder.conv(x))

    def forward(self, x):
        x = self.first(x)
        if self.around in ("all", "tail"):
            return self.part(self.around, self.decoder if self.around == "all" else self.tail, x)
        x = self.part("conv", self.decoder.conv, x)
        return self.part("block", self.decoder.attention, x)


@pytest.mark.parametrize("reentrant", (False, True))
def test_recomputation_updates_the_statistics_again(reentrant):
    original, net, x = converted(lambda: Checkpointed("all", reentrant))
    assert_same(results(net, x), results(original, x))
    assert net.decoder.conv[1].num_batches_tracked == 2
    assert calls_of(net, x) == (1, 0)


def test_recomputation_that_ends_with_the_block():
    """Nothing is saved after it, so the exception that ends a recomputation comes out of it."""

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.row = nn.Conv2d(3, 3, 1), _row(2, Smp(C, 4))

        def forward(self, x):
            return checkpoint(self.row, self.first(x), use_reentrant=False)

    original, net, x = converted(Ends)
    assert_same(results(net, x), results(original, x))
    assert net.row[1].num_batches_tracked == 2


@pytest.mark.parametrize("around", ("conv", "block"))
def test_recomputation_that_ends_between(around):
    original, x = make(lambda: Checkpointed(around))
    net = copy.deepcopy(original)
    (entry,) = convert(net, (x,)).converted
    assert entry.alone
    assert_same(results(net, x), results(original, x))
    # And where it is switched on later.
    original, net, x = converted(lambda: Checkpointed(None))
    original.around = net.around = around
    assert_same(results(net, x), results(original, x))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", (copy.deepcopy, _pickled, _saved))
def test_copies(copied):
    original, net, x = converted(Decoder)
    other = copied(net)
    assert calls_of(other, x) == (1, 0)
    revert(other)
    assert calls_of(other, x) == (0, 1) and calls_of(net, x) == (1, 0)
    assert [type(m) for m in other.modules()] == [type(m) for m in original.modules()]
    # A part of it alone is what it was.
    part = copied(net.conv)
    torch.testing.assert_close(part.eval()(x), copy.deepcopy(net.conv).eval()(x))
    assert type(part(x)) is torch.Tensor and calls_of(part, x) == (0, 1)


def test_again_and_back():
    original, net, x = converted(Decoder)
    for again in (None, (x,), x):
        (entry,) = convert(net, again).entries
        assert (entry.status, entry.detail) == ("already fused", "batch norm, relu, scse, add")
        assert calls_of(net, x) == (1, 0)
    convert(net, (torch.ones(2),))  # on which it does not run
    assert calls_of(net, x) == (0, 1)
    revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize("where", ("conv.1", "conv.2", "conv", "attention", "attention.0"))
@pytest.mark.parametrize("kind", ("forward", "forward_pre", "full_backward"))
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
def test_hooks_see_maps(where, kind, first):
    original, x = make(lambda: Decoder(relu=nn.ReLU()))
    net = copy.deepcopy(original)
    seen = {}

    def hook(net):
        def note(module, *parts):
            for part in parts:
                for m in part if type(part) is tuple else (part,):
                    assert type(m) is torch.Tensor
                    seen.setdefault(net, []).append(m.detach().clone())

        return getattr(net.get_submodule(where), f"register_{kind}_hook")(note)

    handles = [hook(original)]
    if first:
        handles.append(hook(net))
        (entry,) = convert(net, (x,)).converted
        assert entry.detail == "scse, add" and entry.alone
    else:
        convert(net, (x,))
        handles.append(hook(net))
    seen.clear()
    assert_same(results(net, x), results(original, x))
    assert len(seen[net]) == len(seen[original]) > 0
    for a, b in zip(seen[net], seen[original], strict=True):
        torch.testing.assert_close(a, b)
    for handle in handles:
        handle.remove()
    assert calls_of(net, x) == ((0, 1) if first else (1, 0))


def test_hooks_on_all_modules_see_maps():
    _, net, x = converted(Decoder)
    maps = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda m, _, y: maps.append(y) if type(m) is nn.ReLU else None)
    assert calls_of(net, x) == (0, 1)
    handle.remove()
    assert all(type(m) is torch.Tensor for m in maps) and maps


def test_convert_sync_batchnorm_takes_it_apart():
    original, net, x = converted(Decoder)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    assert type(net.conv[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(net(x), original.eval()(x))
    assert calls_of(net, x)[0] == 0


def test_batch_norms_that_are_replaced():
    original, net, x = converted(Decoder)
    for module in (original, net):
        module.conv[1] = nn.InstanceNorm2d(C, affine=True).double()
    torch.testing.assert_close(net(x), original(x))


def test_folding_a_reverted_one():
    _, net, x = converted(Decoder)
    y = net.eval()(x)
    revert(net)
    net.conv[0] = nn.utils.fusion.fuse_conv_bn_eval(net.conv[0], net.conv[1])
    net.conv[1] = nn.Identity()
    assert len(convert(net).converted) == 1
    torch.testing.assert_close(net(x), y)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("part", ("", "conv"))
def test_compiled(backend, part):
    torch.compiler.reset()
    original, net, x = converted(Decoder)
    if part:
        net.get_submodule(part).compile(backend=backend, fullgraph=True)
    call = None if part else torch.compile(net, backend=backend, fullgraph=True)
    for training in (True, False):
        for module in (original, net):
            module.train(training)
        assert_same(results(net, x, call), results(original, x))
    torch.compiler.reset()


@pytest.mark.filterwarnings("default")
def test_tools_of_torch():
    original, net, x = converted(Decoder)
    y = original.eval()(x)
    net.eval()
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), y)
    torch.testing.assert_close(torch.jit.trace(net, (x,))(x), y)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), y)
    parameters = dict(net.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(net, parameters, x), y)
    batch = torch.func.vmap(lambda x: torch.func.functional_call(net, parameters, x[None])[0])(x)
    torch.testing.assert_close(batch, y)
    with pytest.raises(RuntimeError, match=r"revert\(model\) first"):
        torch.jit.script(net)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
def test_distributed(process_group, first):
    original, x = make(Decoder)
    net = copy.deepcopy(original)
    if first:
        convert(net, (x,))
    parallel = nn.parallel.DistributedDataParallel(net)
    if not first:
        (entry,) = convert(parallel, (x,)).converted
        assert entry.detail.startswith(TOGETHER)
    assert_same(results(net, x, parallel), results(original, x))
    assert calls_of(parallel, x) == (1, 0)


class Ways(nn.Module):
    """What happens between BatchNorm and the block is chosen later."""

    def __init__(self, way="usual"):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), Smp(C, 4)
        self.other = nn.BatchNorm2d(C)
        self.way = way

    def forward(self, x):
        return getattr(self, self.way)(self.conv(x))

    def usual(self, u):
        return self.block(F.relu(self.norm(u)))

    def reader(self, u):
        z = self.norm(u)
        return self.block(F.relu(z)) + z

    def skip(self, u):
        z = F.relu(self.norm(u))
        return cat(self.block(z), z)

    def in_place(self, u):
        z = self.norm(u)
        z.add_(1)
        return cat(self.block(F.relu(z)), z)

    def view(self, u):
        return self.block(F.relu(self.norm(u)).view_as(u))

    def shape(self, u):
        z = F.relu(self.norm(u))
        return self.block(z) * z.shape[1]

    def dropout(self, u):
        return self.block(F.dropout(F.relu(self.norm(u)), 0.0))

    def relu6(self, u):
        return self.block(F.relu6(self.norm(u)))

    def no_relu(self, u):
        return self.block(self.norm(u))

    def two_relus(self, u):
        return self.block(F.relu(F.relu(self.norm(u)) + 0))

    def other_norm(self, u):
        return self.block(F.relu(self.norm(u))) + self.block(F.relu(self.other(u)))

    def two_blocks(self, u):
        z = F.relu(self.norm(u))
        return self.block(z) + self.block(z)

    def norm_alone(self, u):
        return self.block(F.relu(self.norm(u))) + self.norm(2 * u)

    def by_training(self, u):
        z = F.relu(self.norm(u))
        return self.block(z) if self.training else z

    def by_evaluation(self, u):
        z = F.relu(self.norm(u))
        return z if self.training else self.block(z)

    def unused(self, u):
        self.norm(u)
        return 2 * u

    def returned(self, u):
        return F.relu(self.norm(u))

    def in_a_list(self, u):
        maps = [self.norm(u)]
        maps.append(F.relu(maps[0]))
        return cat(*maps)

    def under_no_grad(self, u):
        with torch.no_grad():
            z = F.relu(self.norm(u))
        return self.block(z) + u

    def block_under_no_grad(self, u):
        z = F.relu(self.norm(u))
        with torch.no_grad():
            y = self.block(z)
        return y + u

    def read_under_no_grad(self, u):
        z = F.relu(self.norm(u))
        with torch.no_grad():
            mean = z.mean()
        return self.block(z) * mean

    def detached(self, u):
        return self.block(F.relu(self.norm(u)).detach()) + u


WAYS = [n for n in vars(Ways) if not n.startswith("_") and n not in ("forward", "usual")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_another_way_at_run_time_is_right(way, training):
    """The example went the usual way; these calls don't."""
    original, net, x = converted(Ways)
    for module in (original, net):
        module.train(training)
        module.way = way
    for _ in range(2):
        ours, theirs = (results(module, x) for module in (net, original))
        assert type(net(x)) is type(original(x)) is torch.Tensor
        assert_same(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_another_way_is_left_alone(way):
    original, x = make(lambda: Ways(way))
    net = copy.deepcopy(original)
    (entry,) = convert(net, (x,)).entries
    assert entry.detail == "scse, add" and entry.alone
    assert type(net) is Ways and type(net.norm) is nn.BatchNorm2d
    assert f"converted: scse, add; without BatchNorm: {entry.alone}" in str(convert(net, (x,))) or (
        "already fused" in str(convert(net, (x,)))
    )
    assert_same(results(net, x), results(original, x))


def test_reasons():
    reasons = {
        "reader": "torch.Tensor.__add__ reads what comes before it, too|torch.Tensor.add reads",
        "skip": "torch.cat reads what comes before it, too",
        "relu6": "what it gets is not",
        "shape": "torch.Tensor.shape.__get__ reads",
        "no_relu": "no ReLU",
        "other_norm": "after one BatchNorm and after another",
        "norm_alone": "norm is called for others, too|add reads",
        "two_blocks": "another block reads|reads what comes before it",
        "unused": "doesn't reach it",
        "block_under_no_grad": "no_grad",
    }
    for way, reason in reasons.items():
        net, x = make(lambda way=way: Ways(way))
        (entry,) = convert(net, (x,)).entries
        assert any(part in entry.alone for part in reason.split("|")), (way, entry.alone)


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: Decoder(norm=nn.SyncBatchNorm(C)), "doesn't run|what it gets is not"),
        (lambda: Decoder(norm=nn.InstanceNorm2d(C)), "what it gets is not"),
        (lambda: Decoder(relu=nn.ReLU6()), "what it gets is not"),
        (lambda: Decoder(relu=nn.LeakyReLU()), "what it gets is not"),
        (lambda: Decoder(TimmSE(C, 3, nn.SiLU)), "no kernel"),
        (lambda: Decoder(MonaiSE(2, C, 2, add_residual=True)), "no kernel"),
    ],
)
def test_other_layers_are_left_alone(build, reason):
    original, x = make(build)
    net = copy.deepcopy(original)
    (entry,) = convert(net, (x,)).entries
    assert any(part in entry.alone for part in reason.split("|")), entry.alone
    assert [type(m) for m in net.modules() if m is not net.attention[0]] == [
        type(m) for m in original.modules() if m is not original.attention[0]
    ]
    if not isinstance(original.conv[1], nn.SyncBatchNorm):  # that runs on GPUs alone
        assert_same(results(net, x), results(original, x))


class OtherBlock(Ways):
    def __init__(self):
        super().__init__()
        self.no_relu_inside, self.swapped = TimmSE(C, 3, nn.SiLU), False

    def usual(self, u):
        z = F.relu(self.norm(u))
        return self.no_relu_inside(z) if self.swapped else self.block(z)


def test_a_block_without_a_kernel_at_run_time():
    original, x = make(OtherBlock)
    net = copy.deepcopy(original)
    assert [e.detail for e in convert(net, (x,)).converted] == [
        "batch norm, relu, scse, add",
        "cse, silu",
    ]
    original.swapped = net.swapped = True
    assert_same(results(net, x), results(original, x))


class GradientsOfTheBlock(Ways):
    """Has gradients from the block on, when it is called without."""

    def usual(self, u):
        z = F.relu(self.norm(u))
        with torch.enable_grad():
            return self.block(z)


def test_gradients_begin_with_the_block():
    original, x = make(GradientsOfTheBlock)
    net = copy.deepcopy(original)
    convert(net, (x,))
    for module in (net, original):
        with torch.no_grad():
            y = module(x)
        y.sum().backward()
        assert module.norm.weight.grad is None
    for a, b in zip(net.parameters(), original.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


class Held(nn.Module):
    """Keeps what it computed in an object that nobody can look into."""

    class Box:
        def __init__(self, z):
            self.z = z

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), Smp(C, 4)
        self.keep, self.box = False, None

    def forward(self, x):
        z = F.relu(self.norm(self.conv(x)))
        y = self.block(z)
        if self.keep:
            self.box = self.Box(z)
        return y


def test_what_is_kept_was_computed_in_time():
    original, net, x = converted(Held)
    original.keep = net.keep = True
    for module in (original, net):
        module(x)
        with torch.no_grad():
            module.norm.weight.mul_(3)
    torch.testing.assert_close(net.box.z + 0, original.box.z + 0)


class Freed(nn.Module):
    """Sees whether its BatchNorm's input is gone once the block has run."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), Smp(C, 4)
        self.seen = []

    def forward(self, x):
        u = self.conv(x)
        there = weakref.ref(u)
        y = self.norm(u)
        del u
        y = self.block(F.relu(y))
        self.seen.append(there() is None)
        return y


def test_nothing_is_kept_without_gradients():
    _, net, x = converted(Freed)
    net.seen.clear()
    with torch.no_grad():
        net(x)
    assert net.seen == [True] and calls_of(net, x) == (1, 0)


def test_on_the_meta_device():
    _, net, x = converted(Decoder)
    assert net.to("meta")(x.to("meta")).shape == (3, 2, 9, 8)


class Changed(Ways):
    def __init__(self):
        super().__init__()
        self.change = False

    def usual(self, u):
        z = self.norm(u)
        if self.change:
            u.mul_(2)
        return self.block(F.relu(z))


class Through(torch.autograd.Function):
    """Takes a tensor without asking for __torch_function__."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


class Custom(Ways):
    def __init__(self):
        super().__init__()
        self.through = False

    def usual(self, u):
        z = F.relu(self.norm(u))
        return self.block(Through.apply(z) if self.through else z)


def test_what_can_not_be_right_raises():
    _, net, x = converted(Changed)
    net.change = True
    with pytest.raises(RuntimeError, match=r"input was changed in place.*revert\(model\)"):
        net(x)
    _, net, x = converted(Custom)
    net.through = True
    with pytest.raises(RuntimeError, match=r"revert\(model\)"):
        results(net, x)
    # With an example that shows it, it is left alone.
    for build, name in ((Changed, "change"), (Custom, "through")):
        original, x = make(build)
        setattr(original, name, True)
        net = copy.deepcopy(original)
        (entry,) = convert(net, (x,)).entries
        assert entry.alone and type(net.norm) is nn.BatchNorm2d
        if build is Custom:
            assert_same(results(net, x), results(original, x))


def test_errors_are_torchs():
    original, net, _ = converted(Ways)
    for x in (torch.randn(1, 3, 3, 3), torch.randn(3, 3, 3)):
        errors = []
        for module in (original, net):
            with pytest.raises(ValueError) as caught:
                module(x.double())
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    assert_same(
        results(net, torch.ones(2, 3, 5, 5).double()),
        results(original, torch.ones(2, 3, 5, 5).double()),
    )


def test_a_backend_without_kernels_for_it():
    original, net, x = converted(Decoder)
    with use_backend("eager"):
        assert calls_of(net, x) == (0, 1)
        assert_same(results(net, x), {**results(original, x), **dict(net.named_buffers())})


def test_random_layers_behind_and_before():
    """A mask is the same in both, so that the comparison sees nothing else."""
    net = nn.Sequential(nn.Dropout(0.5), Decoder(), nn.Dropout(0.5))
    (entry,) = convert(net, images(3, 3, 9, 8)).converted
    assert entry.detail.startswith(TOGETHER)


def test_a_wrong_operator_is_noticed(monkeypatch):
    from scse_kernels.convert import function

    right = function.bn_relu_scse
    for wrong in (
        lambda *a, **k: 1.0001 * right(*a, **k),
        lambda u, *a, **k: right(u.detach(), *a, **k),
        lambda *a, **k: right(*a, **{**k, "momentum": 0.2}),
        lambda *a, **k: right(*a, **{**k, "eps": 1e-3}),
    ):
        net, x = make(Decoder)
        with monkeypatch.context() as patch:
            patch.setattr(function, "bn_relu_scse", wrong)
            (entry,) = convert(net, (x,)).converted
        assert entry.alone == "with its BatchNorm the model computes something else"
        assert type(net) is Decoder and calls_of(net, x) == (0, 1)


def test_bad_example_inputs():
    net, _ = make(Decoder)
    with pytest.raises(TypeError, match=r"example_inputs must be a tuple .* not int"):
        convert(net, 3)
    (entry,) = convert(net, (torch.ones(2),)).converted
    assert "doesn't run on example_inputs in training" in entry.alone
    (entry,) = convert(net, ("x",)).entries
    assert "no tensor in example_inputs" in entry.alone


def _smp(name):
    pytest.importorskip("bench.model")._allow_torchvision()
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        pytest.skip(str(error))
    return getattr(smp, name)(
        "resnet18", encoder_weights=None, decoder_attention_type="scse",
        decoder_channels=(32, 16, 16), encoder_depth=3,
    )  # fmt: skip


def _unet():
    unet = pytest.importorskip("bench.unet", reason="only a checkout has bench")
    return unet.UNet(3, 4, lambda channels: Smp(channels, 2))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "build, channels, together",
    [
        (lambda: _smp("Unet"), 3, "attention2"),
        (lambda: _smp("UnetPlusPlus"), 3, "attention2"),
        (_unet, 1, "coders"),
    ],
    ids=("smp Unet", "smp Unet++", "bench"),
)
def test_peoples_networks(build, channels, together):
    original = build().double()
    net = copy.deepcopy(original)
    x = images(2, channels, 32, 32).double()
    for entry in convert(net, (x,)).converted:
        assert entry.detail == TOGETHER * (together in entry.paths[0]) + "scse, add"
    blocks = sum(together in path for path, m in net.named_modules() if type(m).__name__ in (
        "FusedSmp", "FusedSCSEModule",
    ))  # fmt: skip
    assert blocks >= 3
    for training in (True, False):
        for module in (original, net):
            module.train(training)
        assert_same(results(net, x), results(original, x), rtol=1e-8)
        assert calls_of(net, x)[0] == blocks
