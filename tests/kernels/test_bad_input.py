"""Bad input raises before anything is computed: which argument, what it must be, what came."""

import re

import pytest
import torch
from budget import NAMES, make_case
from torch.utils._python_dispatch import TorchDispatchMode

import scse_kernels
from scse_kernels import ops
from scse_kernels.batch_norm import ops as norm_ops

MUST_BE = r"must|expected"


class _NoArithmetic(TorchDispatchMode):
    """Fails on any operator: what is checked is known from shapes, dtypes and devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran")


def _arguments(device="cpu"):
    case = make_case((2, 6, 5, 7))
    tensors = (t.to(device) for t in (case.x, *case.parameters))
    return dict(zip(NAMES, tensors, strict=True))


def _raises(error, message, function, *args, **kwargs):
    with pytest.raises(error) as caught, _NoArithmetic():
        function(*args, **kwargs)
    assert re.search(message, str(caught.value), re.S), f"{caught.value!s} lacks {message}"


def _functions(name):
    """scse, and that of cse and sse which takes the argument."""
    takers = {"scse": NAMES, "cse": NAMES[:5], "sse": ("x", "ws", "bs")}
    for function, names in takers.items():
        if name in names:
            yield getattr(scse_kernels, function), names


def _check(error, message, target, **changed):
    """Each function that takes the changed argument raises `error` and its own name."""
    for function, names in _functions(next(iter(changed))):
        arguments = {n: t for n, t in _arguments(target.device).items() if n in names}
        arguments |= changed
        message_of = rf"{function.__name__}\(\).*(?:{message})"
        _raises(error, message_of, function, **arguments, backend=target.backend)


@pytest.mark.parametrize("value", (1.0, None, [1.0, 2.0], "x"), ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_not_a_tensor(target, name, value):
    if value is None and name.startswith("b"):
        return  # that is how a bias is left out
    kind = type(value).__name__
    _check(TypeError, rf"'?{name}'?.*({MUST_BE}).*Tensor.*{kind}", target, **{name: value})


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool, torch.complex64), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtype(target, name, dtype):
    value = torch.ones_like(_arguments(target.device)[name], dtype=dtype)
    expected = rf"'?{name}'?.*({MUST_BE}).*float.*got.*{re.escape(str(dtype))}"
    _check(TypeError, expected, target, **{name: value})


@pytest.mark.parametrize(
    "shape", ((), (6,), (2, 6), (2, 6, 3, 3, 3, 3), (2, 0, 5, 7), (2, 6, 0, 7), (2, 6, 5, 0))
)
def test_shape_of_x(target, shape):
    x = torch.ones(shape, device=target.device)
    _check(ValueError, rf"x ({MUST_BE}).*{re.escape(str(shape))}", target, x=x)


@pytest.mark.parametrize("channels", (1, 5, 7, 12))
def test_channels_of_x(target, channels):
    x = torch.ones(2, channels, 5, 7, device=target.device)
    message = rf"x has {channels} channels, this layer is for 6: .*(w1|ws) ({MUST_BE}).*got.*6"
    _check(ValueError, message, target, x=x)
    layers = (scse_kernels.ChannelSELayer, scse_kernels.SpatialSELayer3D)
    for layer in (*layers, scse_kernels.ChannelSpatialSELayer):
        with pytest.raises(ValueError, match=f"x has {channels} channels, this layer is for 6"):
            layer(6, device=target.device)(x)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("w1", ()),
        ("w1", (3,)),
        ("w1", (0, 6)),
        ("w1", (3, 5)),
        ("w1", (6, 3)),
        ("w1", (3, 6, 3, 3)),
        ("w1", (3, 6, 1, 2)),
        ("b1", ()),
        ("b1", (1,)),
        ("b1", (6,)),
        ("b1", (3, 2)),
        ("w2", (6,)),
        ("w2", (3, 6)),
        ("w2", (6, 4)),
        ("w2", (5, 3)),
        ("w2", (6, 3, 3, 3)),
        ("b2", ()),
        ("b2", (1,)),
        ("b2", (3,)),
        ("ws", ()),
        ("ws", (5,)),
        ("ws", (2, 6)),
        ("ws", (6, 1)),
        ("ws", (1, 6, 3, 3)),
        ("bs", (0,)),
        ("bs", (2,)),
        ("bs", (6,)),
    ],
)
def test_shape_of_a_parameter(target, name, shape):
    value = torch.ones(shape, device=target.device)
    _check(ValueError, rf"{name} ({MUST_BE}).*got.*{re.escape(str(list(shape)))}", target,
           **{name: value})  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_two_devices(target, name):
    value = _arguments()[name].to("meta")
    message = "device" if name == "x" else rf"device.*(meta.*{name}|{name}.*meta)"
    _check(RuntimeError, message if name != "x" else "meta", target, **{name: value})


@pytest.mark.parametrize("combine", ("sum", "ADD", "", None, 1))
def test_combine(target, combine):
    message = rf"combine ({MUST_BE}).*'add'.*'max'.*'mul'.*'concat'.*got {re.escape(repr(combine))}"
    _raises(
        ValueError,
        message,
        scse_kernels.scse,
        **_arguments(target.device),
        combine=combine,
        backend=target.backend,
    )
    with pytest.raises(ValueError, match=message):
        scse_kernels.ChannelSpatialSELayer(6, combine=combine)


@pytest.mark.parametrize("value", ("ReLU", "swish", "", None, 1))
@pytest.mark.parametrize(
    "argument, known", (("activation", "'relu'.*'none'"), ("gate", "'sigmoid'"))
)
def test_activation_and_gate(target, argument, known, value):
    for function, names in _functions("w1" if argument == "activation" else "x"):
        arguments = {n: t for n, t in _arguments(target.device).items() if n in names}
        message = (
            rf"{function.__name__}.*{argument} ({MUST_BE}).*{known}.*got {re.escape(repr(value))}"
        )
        options = {argument: value, "backend": target.backend}
        _raises(ValueError, message, function, **arguments, **options)


@pytest.mark.parametrize("activation", ("relu", "silu", "gelu", "gelu_tanh", "none"))
def test_slope_without_effect(target, activation):
    message = rf"{activation}.*no slope.*got 0.2"
    options = {"activation": activation, "slope": 0.2, "backend": target.backend}
    _raises(ValueError, message, scse_kernels.scse, **_arguments(target.device), **options)


@pytest.mark.parametrize("slope", ("0.2", True, torch.ones(())), ids=repr)
def test_type_of_slope(target, slope):
    options = {"activation": "elu", "slope": slope, "backend": target.backend}
    message = rf"slope ({MUST_BE}).*float.*{type(slope).__name__}"
    _raises(TypeError, message, scse_kernels.scse, **_arguments(target.device), **options)


@pytest.mark.parametrize("residual", (1, 0.0, None, "x", torch.ones(())), ids=repr)
def test_type_of_residual(target, residual):
    for function, names in _functions("x"):
        arguments = {n: t for n, t in _arguments(target.device).items() if n in names}
        options = {"residual": residual, "backend": target.backend}
        kind = type(residual).__name__
        message = rf"{function.__name__}\(\): residual ({MUST_BE}).*bool.*{kind}"
        _raises(TypeError, message, function, **arguments, **options)


def test_no_residual_of_a_concatenation(target):
    options = {"combine": "concat", "residual": True, "backend": target.backend}
    message = rf"scse\(\): residual ({MUST_BE}).*False.*'concat'.*channels"
    _raises(ValueError, message, scse_kernels.scse, **_arguments(target.device), **options)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "make, kind",
    (
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (lambda x: x.flatten(2)[0].to_sparse_csr(), "torch.sparse_csr"),
        (torch.Tensor.to_mkldnn, "torch._mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), "nested"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "torch.quint8"),
    ),
    ids=("coo", "csr", "mkldnn", "nested", "jagged", "quantised"),
)
@pytest.mark.parametrize("function", ("scse", "cse", "sse"))
def test_other_kinds_of_tensors(function, make, kind):
    arguments = _arguments()
    names = {"scse": NAMES, "cse": NAMES[:5], "sse": ("x", "ws", "bs")}[function]
    arguments = {name: arguments[name] for name in names}
    arguments["x"] = make(arguments["x"])
    with pytest.raises(TypeError, match=rf"{function}\(\).*x'? must .*got.*{re.escape(kind)}"):
        getattr(scse_kernels, function)(**arguments)


@pytest.mark.parametrize("backend", ("cudnn", "CPU", "", None))
@pytest.mark.parametrize("function", ("scse", "cse", "sse"))
def test_unknown_backend(function, backend):
    arguments = _arguments()
    names = {"scse": NAMES, "cse": NAMES[:5], "sse": ("x", "ws", "bs")}[function]
    message = rf"backend ({MUST_BE}).*'auto'.*'eager'.*got {re.escape(repr(backend))}"
    _raises(
        ValueError,
        message,
        getattr(scse_kernels, function),
        **{n: arguments[n] for n in names},
        backend=backend,
    )


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_backend_on_the_wrong_device(backend):
    meta = {name: t.to("meta") for name, t in _arguments().items()}
    _raises(
        RuntimeError,
        rf"'{backend}'.*not available.*meta|'{backend}'.*not available.*\w",
        scse_kernels.scse,
        **meta,
        backend=backend,
    )


def test_auto_falls_back_on_other_devices():
    meta = {name: t.to("meta") for name, t in _arguments().items()}
    assert scse_kernels.scse(**meta).shape == (2, 6, 5, 7)


@pytest.mark.parametrize("layer", (scse_kernels.SpatialSELayer, scse_kernels.SpatialSELayer3D))
@pytest.mark.parametrize("shape", ((6,), (3, 5, 1, 1), (1, 12, 1, 1), (0, 6, 1, 1), (6, 1)))
def test_shape_of_few_shot_weights(layer, shape):
    with pytest.raises(ValueError, match=rf"weights must .*6.*{re.escape(str(list(shape)))}"):
        layer(6)(torch.ones(2, 6, 5, 7), torch.ones(shape))


@pytest.mark.parametrize(
    "weights", (1.0, [1.0], torch.ones(1, 6, 1, 1, dtype=torch.int64)), ids=str
)
def test_type_of_few_shot_weights(weights):
    with pytest.raises(TypeError, match=r"weights|ws"):
        scse_kernels.SpatialSELayer(6)(torch.ones(2, 6, 5, 7), weights)


def test_x_beside_few_shot_weights():
    layer, weights = scse_kernels.SpatialSELayer(6), torch.ones(1, 6, 1, 1)
    with pytest.raises(TypeError, match="x"):
        layer([1.0], weights)
    with pytest.raises(ValueError, match="x must"):
        layer(torch.ones(6), weights)


@pytest.mark.parametrize(
    "cls",
    (
        scse_kernels.ChannelSELayer,
        scse_kernels.ChannelSpatialSELayer,
        scse_kernels.ChannelSpatialSELayer3D,
        scse_kernels.SCSEModule,
        scse_kernels.SpatialSELayer,
    ),
)
@pytest.mark.parametrize("shape", ((2, 5, 4, 4), (2, 6), (2, 6, 0, 4)))
def test_modules(cls, shape):
    layer = cls(6, 2) if cls is not scse_kernels.SpatialSELayer else cls(6)
    with pytest.raises(ValueError, match=r"x|w1|ws"):
        layer(torch.ones(shape))


LAYERS = (
    scse_kernels.ChannelSELayer,
    scse_kernels.ChannelSELayer3D,
    scse_kernels.SpatialSELayer,
    scse_kernels.SpatialSELayer3D,
    scse_kernels.ChannelSpatialSELayer,
    scse_kernels.ChannelSpatialSELayer3D,
    scse_kernels.SCSEModule,
)


@pytest.mark.parametrize("cls", LAYERS)
def test_number_of_channels(cls):
    for channels in (0, -3):
        with pytest.raises(ValueError, match=rf"channels must be at least 1, got {channels}"):
            cls(channels)
    for channels in ("8", 8.0, None, [8]):
        kind = type(channels).__name__
        with pytest.raises(TypeError, match=f"channels must be an int, not {kind}"):
            cls(channels)


@pytest.mark.parametrize("cls", [cls for cls in LAYERS if cls.__name__[:7] != "Spatial"])
def test_type_of_reduction(cls):
    for reduction in ("2", 2.0, None):
        kind = type(reduction).__name__
        with pytest.raises(TypeError, match=f"reduction(_ratio)? must be an int, not {kind}"):
            cls(8, reduction)


@pytest.mark.parametrize("cls", LAYERS)
def test_channels_of_another_layer(cls):
    layer = cls(32)
    with pytest.raises(ValueError, match="x has 16 channels, this layer is for 32"):
        layer(torch.ones(2, 16, 4, 4))


@pytest.mark.skipif(
    scse_kernels.backends.why_not("cpu", torch.device("cpu")) is not None, reason="no cpu kernels"
)
def test_operators_keep_to_their_memory():
    """A direct call of an operator gets no message of ours about shapes. But it makes no stray
    access either."""
    c, hidden = 6, 3
    given = {
        "x": torch.ones(2, c, 4, 4),
        "w1": torch.ones(hidden, c),
        "b1": torch.ones(hidden),
        "w2": torch.ones(c, hidden),
        "b2": torch.ones(c),
        "ws": torch.ones(1, c),
        "bs": torch.ones(1),
    }
    forward, backward = ops.FORWARD["cpu"], ops.BACKWARD["cpu"]
    y, *small = forward(**given, combine=0)
    saved = dict(zip(("pooled", "hidden", "channel_gate"), small, strict=True))
    needs = {"need_dx": True, "need_channel": True, "need_spatial": True}
    for name in (*given, *saved):
        wrong = torch.ones(2, c, 0, 4) if name == "x" else torch.ones(1, 1, 7)
        arguments = {**given, **saved, name: wrong}
        with pytest.raises(RuntimeError, match="positions" if name == "x" else name):
            backward(y, **arguments, combine=0, **needs)
        if name in given:
            with pytest.raises(RuntimeError, match="positions" if name == "x" else name):
                forward(**{**given, name: wrong}, combine=0)


@pytest.mark.skipif(
    scse_kernels.backends.why_not("cpu", torch.device("cpu")) is not None, reason="no cpu kernels"
)
def test_operators_of_batch_norm_keep_to_their_memory():
    c, hidden = 6, 3
    sizes = {"bn_weight": (c,), "bn_bias": (c,), "w1": (hidden, c), "b1": (hidden,)}
    sizes |= {"w2": (c, hidden), "b2": (c,), "ws": (1, c), "bs": (1,)}
    given = {"u": torch.ones(2, c, 4, 4)} | {n: torch.ones(size) for n, size in sizes.items()}
    forward, backward = norm_ops.FORWARD["cpu"], norm_ops.BACKWARD["cpu"]
    y, *small = forward(**given, mean=None, var=None, eps=1e-5, combine=0)
    saved = dict(zip(("mean", "var", "pooled", "hidden", "channel_gate"), small, strict=True))
    needs = dict.fromkeys(("need_du", "need_affine", "need_channel", "need_spatial"), True)
    for name in (*given, *saved):
        wrong = torch.ones(2, c, 0, 4) if name == "u" else torch.ones(1, 1, 7)
        arguments = {**given, **saved, name: wrong}
        with pytest.raises(RuntimeError, match="positions" if name == "u" else name):
            backward(y, **arguments, eps=1e-5, of_batch=True, combine=0, **needs)
