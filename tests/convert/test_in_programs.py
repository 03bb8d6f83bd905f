"""What converted blocks do in people's programs: copies, files, subclasses, tools of torch."""

import abc
import copy
import gc
import importlib
import io
import pickle
import weakref

import pytest
import torch
from exact_blocks import GAB, C, OldStyleSuper
from networks import needs_kernels
from peers import Both, Channel, Smp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scse_kernels import convert, revert


def _x(*sizes):
    return torch.randn(2, C, *(sizes or (4, 3)))


def _is_converted(block):
    return type(block).__name__.startswith("Fused")


class Registered(GAB):
    """Keeps a list of its subclasses, and wants an argument of each."""

    subclasses: list = []  # noqa: RUF012

    def __init_subclass__(cls, *, name, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.subclasses.append(name)


class RegistryMeta(type):
    classes: list = []  # noqa: RUF012

    def __init__(cls, name, bases, namespace):
        super().__init__(name, bases, namespace)
        RegistryMeta.classes.append(name)


class ByMetaclass(GAB, metaclass=RegistryMeta):
    pass


class Abstract(GAB, metaclass=abc.ABCMeta):
    pass


def test_no_class_is_registered():
    blocks = nn.ModuleList([Registered(), ByMetaclass(), Abstract()])
    before = list(RegistryMeta.classes)
    assert len(convert(blocks).converted) == 3 and all(map(_is_converted, blocks))
    assert Registered.subclasses == [] and RegistryMeta.classes == before
    assert isinstance(blocks[2], Abstract) and not isinstance(Abstract(), type(blocks[2]))


def test_whatever_raises_the_model_is_as_before(monkeypatch):
    from scse_kernels.convert import swap

    model, calls = nn.Sequential(GAB(), Smp(12, 4), GAB()), []
    set_class = swap.set_class

    def fails_once(module, cls):
        calls.append(cls)
        if len(calls) == 2:
            raise KeyboardInterrupt
        set_class(module, cls)

    monkeypatch.setattr(swap, "set_class", fails_once)
    with pytest.raises(KeyboardInterrupt):
        convert(model)
    assert [type(block) for block in model] == [GAB, Smp, GAB]


class Rebuilt(GAB):
    """Is copied by making a new one."""

    def __init__(self, note="new"):
        super().__init__()
        self.note = note

    def __reduce__(self):
        return _rebuild, (self.__class__, self.note, self.state_dict())


def _rebuild(cls, note, state):
    block = cls(note)
    block.load_state_dict(state)
    return block


class WithoutState(GAB):
    """Its __reduce__ leaves the weights out: so does its copy, converted or not."""

    def __reduce__(self):
        return (WithoutState, ())


class Stateful(GAB):
    def __getstate__(self):
        return {**vars(self), "saved": True}

    def __setstate__(self, state):
        vars(self).update(state)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("cls", (GAB, Rebuilt, Stateful, OldStyleSuper))
@pytest.mark.parametrize("copied", (copy.deepcopy, copy.copy, _saved), ids=lambda f: f.__name__)
@pytest.mark.parametrize("protocol", (2, 4))
def test_copies_hold_the_weights(cls, copied, protocol):
    block = cls()
    block.register_buffer("extra", torch.arange(3.0), persistent=False)
    convert(block)
    x = _x()
    y = block(x)
    for other in (copied(block), pickle.loads(pickle.dumps(block, protocol))):
        assert _is_converted(other) and torch.equal(other(x), y)
        assert other is not block and vars(other) is not vars(block)
        revert(other)
        assert type(other) is cls and _is_converted(block)
        torch.testing.assert_close(other(x), y)


def test_a_copy_is_what_the_class_makes_of_it():
    block = WithoutState()
    convert(block)
    other = copy.deepcopy(block)
    assert _is_converted(other) and other(_x()).shape == (2, C, 4, 3)


def _object(name):
    """What a dotted name stands for."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found


@pytest.mark.parametrize("make", (GAB, lambda: Smp(12, 4), lambda: Both(12, 4, 2, max)))
def test_weights_only_loads_what_torch_names(make):
    model = nn.Sequential(make())
    convert(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    with torch.serialization.safe_globals([_object(name) for name in names]):
        other = torch.load(file, weights_only=True)
    assert type(other[0]) is type(model[0])
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_pickles_of_earlier_versions_load_unconverted():
    from scse_kernels.convert import _new, _Recipe

    class Old:
        """Pickled as the converted blocks of that version."""

        def __init__(self, block):
            self.block = block

        def __reduce__(self):
            recipe = _OldRecipe(("scse, add", ((0, "cSE", nn.Sequential),), (2, 4, 6)))
            return (_new, (type(self.block), recipe), vars(self.block))

    class _OldRecipe(tuple):
        def __reduce__(self):
            return (_Recipe, tuple(self))

    block = Smp(12, 4)
    other = pickle.loads(pickle.dumps(Old(block)))
    x = _x()
    assert type(other) is Smp and torch.equal(other(x), block(x))
    assert convert(other).converted


def test_classes_are_not_kept_alive():
    class Local(Channel):
        pass

    block = Local(12, 4)
    convert(block)
    classes = [weakref.ref(Local), weakref.ref(type(block))]
    assert all(ref() is not None for ref in classes)
    del Local, block
    for _ in range(3):
        gc.collect()
    assert [ref() for ref in classes] == [None, None]


def test_blocks_of_a_recipe_have_one_class():
    blocks = [GAB(), GAB()]
    convert(nn.ModuleList(blocks))
    assert type(blocks[0]) is type(blocks[1])


def test_super_of_the_own_class_ends():
    block = OldStyleSuper()
    convert(block)
    x = _x()
    y = block(x)
    calls = []
    handle = block.gate[1].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(block(x), y)
    assert calls == [1]
    handle.remove()
    with pytest.raises(TypeError):
        block(x, x)


@pytest.mark.parametrize("made_inside", (False, True))
def test_convert_in_fake_tensor_mode(made_inside):
    block = Smp(12, 4)
    with FakeTensorMode():
        if made_inside:
            block = Smp(12, 4)
        (entry,) = convert(block).entries
        assert entry.detail == "scse, add"
        if made_inside:
            assert block(_x()).shape == (2, C, 4, 3)
    if not made_inside:
        assert block(_x()).shape == (2, C, 4, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", (lambda: Smp(12, 4), lambda: nn.Sequential(Smp(12, 4))))
def test_jit_script_says_revert(make):
    model = make()
    convert(model)
    with pytest.raises(RuntimeError, match=r"Smp as convert\(\) left it: revert\(model\) first"):
        torch.jit.script(model)
    revert(model)
    torch.jit.script(model)


class InAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Conv2d(3, C, 1), Smp(C, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.block(self.first(x))


@pytest.mark.parametrize("strict", (True, False))
def test_export_with_an_autocast_region_inside_forward(strict):
    model, x = InAutocast().eval(), torch.randn(2, 3, 5, 4)
    expected = model(x)
    convert(model)
    program = torch.export.export(model, (x,), strict=strict)
    y = program.module()(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


@needs_kernels
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("with_the_loss", (False, True))
def test_a_compiled_gradient_penalty_is_refused(with_the_loss):
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, C, 1), Smp(C, 4))
    convert(model)
    net = model if with_the_loss else torch.compile(model, backend="eager")

    def step(x):
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return g.square().sum()

    if with_the_loss:
        step = torch.compile(step, backend="eager")
    with pytest.raises(Exception, match="has no second derivatives"):
        step(torch.randn(2, 3, 5, 4, requires_grad=True)).backward()
    torch.compiler.reset()


@pytest.mark.filterwarnings("default")
def test_after_fsdp_the_reason_is_given(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = FullyShardedDataParallel(
        nn.Sequential(nn.Conv2d(3, C, 1), Both(C, 4, 2, torch.max)), device_id=torch.device("cpu")
    )

    class SEBlock(GAB):
        pass

    wrapped = FullyShardedDataParallel(nn.Sequential(SEBlock()), device_id=torch.device("cpu"))
    (entry,) = convert(wrapped).left_alone
    assert "FullyShardedDataParallel: convert before that" in entry.detail
    assert not convert(model).converted
    sharded = SEBlock()
    fully_shard(sharded)
    (entry,) = convert(sharded).left_alone
    assert "DTensor" in entry.detail
