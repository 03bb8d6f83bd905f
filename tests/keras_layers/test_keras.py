"""The Keras layers: against Keras' functional form, under torch's and JAX's backends, in people's
models."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # before keras is imported
keras = pytest.importorskip("keras", minversion="3.0")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

if keras.config.backend() != "torch":
    pytest.skip(f"Keras runs on {keras.config.backend()}", allow_module_level=True)

from functional_form import CHANNELS, block, maps, network, randomize  # noqa: E402
from keras import layers  # noqa: E402
from networks import needs_kernels  # noqa: E402

import scse_kernels  # noqa: E402
from scse_kernels.keras import (  # noqa: E402
    ChannelSE,
    ChannelSpatialSE,
    SpatialSE,
    load_functional_weights,
)

# Keras' own code; the profiler warns of itself
pytestmark = pytest.mark.filterwarnings("default")

VARIANTS = ("cse", "sse", "add", "max", "mul", "concat")
SIZES = {1: (11,), 2: (7, 6), 3: (5, 4, 3)}


def layer(variant, ratio=4, **options):
    if variant == "cse":
        return ChannelSE(ratio, **options)
    if variant == "sse":
        return SpatialSE(**options)
    return ChannelSpatialSE(ratio, variant, **options)


def pair(axes, variant, **options):
    """A network with these layers and the functional one whose weights it has."""
    theirs = network(axes, lambda x: block(x, variant, **options))
    randomize(theirs)
    ours = network(axes, lambda x: layer(variant, use_bias=options.get("use_bias", True))(x))
    assert load_functional_weights(ours, theirs) == 2
    return ours, theirs


def output_and_gradients(model, x):
    x = torch.tensor(x, requires_grad=True)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *(w.value for w in model.weights)])]


def in_order_of(model, other, gradients):
    """Gradients of `other`'s weights, each beside the weight of `model` with the same values."""
    found = []
    for weight in model.weights:
        matches = [
            gradient
            for theirs, gradient in zip(other.weights, gradients, strict=True)
            if np.prod(theirs.shape) == np.prod(weight.shape)
            and bool((theirs.value.ravel() == weight.value.ravel()).all())
        ]
        assert len(matches) == 1
        found.append(matches[0].reshape(weight.shape))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axes", SIZES)
def test_equals_the_functional_form(axes, variant):
    ours, theirs = pair(axes, variant)
    x = maps(3, *SIZES[axes], 3)
    y, dx, *gradients = output_and_gradients(ours, x)
    y_theirs, dx_theirs, *gradients_theirs = output_and_gradients(theirs, x)
    torch.testing.assert_close(y, y_theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx, dx_theirs, rtol=1e-4, atol=1e-5)
    expected = in_order_of(ours, theirs, gradients_theirs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_formats_of_data(variant):
    """channels_first computes what channels_last does."""
    last, first = (
        layer(variant, data_format="channels_last"),
        layer(variant, data_format="channels_first"),
    )
    x = maps(3, *SIZES[2], CHANNELS)
    last.build(x.shape)
    first.build(np.moveaxis(x, -1, 1).shape)
    randomize(last)
    first.set_weights(last.get_weights())
    y = keras.ops.convert_to_numpy(first(np.moveaxis(x, -1, 1)))
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), last(x).detach(), rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axes", SIZES)
def test_nothing_is_copied(axes, variant):
    """A channels-last map of Keras is read, and its result written, where it is."""
    recalibrate = layer(variant)
    x = torch.tensor(maps(3, *SIZES[axes], CHANNELS), requires_grad=True)
    y = recalibrate(x)
    dy = torch.randn(y.shape)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        y = recalibrate(x)
        dx = torch.autograd.grad(y, x, dy)[0]
    events = [e for e in recorded.events() if e.name == "aten::copy_"]
    assert [e.input_shapes[0] for e in events if len(e.input_shapes[0]) > 2] == []
    assert y.is_contiguous() and dx.is_contiguous()


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes(variant):
    twice = 2 if variant == "concat" else 1
    made = layer(variant)
    assert made.compute_output_shape((None, 7, None, 12)) == (None, 7, None, 12 * twice)
    symbolic = made(keras.Input((7, None, 12)))
    assert symbolic.shape == (None, 7, None, 12 * twice)
    assert made(np.ones((2, 7, 3, 12), np.float32)).shape == (2, 7, 3, 12 * twice)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config(variant):
    made = layer(variant, use_bias=False, data_format="channels_first", name="recalibrate")
    config = made.get_config()
    again = type(made).from_config(config)
    assert again.get_config() == config
    assert len(again.weights) == 0
    again.build((2, 12, 5, 5))
    assert all("bias" not in weight.name for weight in again.weights) and again.weights


@pytest.mark.parametrize("policy", ("mixed_float16", "mixed_bfloat16", "float64"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_policies(variant, policy):
    """y has the compute dtype; weights stay float32, and sums are formed in it."""
    made = layer(variant, dtype=policy)
    x = maps(2, *SIZES[2], CHANNELS)
    made.build(x.shape)
    randomize(made)
    y = made(x)
    assert keras.backend.standardize_dtype(y.dtype) == made.compute_dtype
    exact = layer(variant, dtype="float64")
    exact.build(x.shape)
    exact.set_weights(made.get_weights())
    x = keras.ops.cast(keras.ops.cast(x, made.compute_dtype), "float64")
    wanted = exact(x)
    # One rounding of the result, and those of float32 sums.
    tolerance = max(0.51 * torch.finfo(y.dtype).eps, 1e-13)
    near = {"rtol": tolerance, "atol": 1e-6 if y.dtype != torch.float64 else 1e-13}
    torch.testing.assert_close(y.double(), wanted, **near)
    # What the layer does under other backends than torch's; Keras' own mean is no float64 one.
    other = made._by_operations(keras.ops.cast(x, made.compute_dtype))
    near["rtol"], near["atol"] = max(tolerance, 1e-6), 1e-6
    torch.testing.assert_close(other.double(), wanted, **near)
    assert {w.dtype for w in made.weights} == {made.variable_dtype}


def test_fit_and_save(tmp_path):
    x, steps = maps(16, *SIZES[2], 3), 30
    target = (x.sum(-1, keepdims=True) > 0).astype(np.float32)
    keras.utils.set_random_seed(0)
    model = network(2, lambda x: ChannelSpatialSE(4)(x))
    before = model.get_weights()
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="binary_crossentropy")
    history = model.fit(x, target, epochs=steps, verbose=0).history["loss"]
    assert history[-1] < 0.7 * history[0]
    for old, new, weight in zip(before, model.get_weights(), model.weights, strict=True):
        assert not np.array_equal(old, new), f"{weight.path} was not trained"
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_under_jax(tmp_path):
    """The file of a model, written under torch, gives the same output and gradients under JAX."""
    expected = {}
    for axes, sizes in SIZES.items():
        inputs = keras.Input((*sizes, 3))
        y = layers.Dense(CHANNELS)(inputs)
        for variant in VARIANTS:
            y = layer(variant)(y)
        model = keras.Model(inputs, y)
        randomize(model)
        x = maps(2, *sizes, 3)
        model.save(tmp_path / f"{axes}.keras")
        np.save(tmp_path / f"{axes}.npy", x)
        expected[axes] = [t.detach().numpy() for t in output_and_gradients(model, x)]
        assert all(t.any() for t in expected[axes])
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "under_jax.py", tmp_path],
        env={
            **os.environ,
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(scse_kernels.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for axes, tensors in expected.items():
        got = np.load(tmp_path / f"{axes}.npz")
        assert len(got) == len(tensors)
        for name, wanted in zip(got, tensors, strict=True):
            scale = 1e-5 * np.abs(wanted).max()
            np.testing.assert_allclose(got[name], wanted, rtol=1e-4, atol=scale, err_msg=name)


@pytest.mark.parametrize("options", ({"use_bias": False}, {"operators": True}), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_other_functional_forms(variant, options):
    ours, theirs = pair(2, variant, **options)
    x = maps(3, *SIZES[2], 3)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_bias_that_the_source_lacks_is_zero():
    theirs = network(2, lambda x: block(x, "add", use_bias=False))
    ours = network(2, lambda x: ChannelSpatialSE(4)(x))
    randomize(theirs)
    randomize(ours)
    load_functional_weights(ours, theirs)
    x = maps(3, *SIZES[2], 3)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "recalibrate, message",
    [
        (lambda x: ChannelSE(4)(x), "is a ChannelSE, the block in its place has cSE and sSE"),
        (lambda x: ChannelSpatialSE(3)(x), r"is \[12, 4\], .* \[12, 3\]"),
        (lambda x: ChannelSpatialSE(4, use_bias=False)(x), "has a bias"),
        (lambda x: x, "has 0 squeeze & excitation blocks, source 2"),
        (lambda x: layers.Dense(12)(ChannelSpatialSE(4)(x)), "other layers with weights"),
    ],
)
def test_models_that_do_not_correspond(recalibrate, message):
    ours = network(2, recalibrate)
    theirs = network(2, lambda x: block(x, "add"))
    randomize(theirs, seed=1)
    before = ours.get_weights()
    with pytest.raises(ValueError, match=message):
        load_functional_weights(ours, theirs)
    for old, new in zip(before, ours.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_bad_input():
    with pytest.raises(TypeError, match="ratio must be int, not float"):
        ChannelSE(4.0)
    with pytest.raises(ValueError, match="ratio must be at least 1, got 0"):
        ChannelSpatialSE(0)
    with pytest.raises(ValueError, match=r"combine must be one of 'add', .* got 'sum'"):
        ChannelSpatialSE(4, "sum")
    with pytest.raises(ValueError, match=r"data_format must be 'channels_last'.* got 'NHWC'"):
        SpatialSE(data_format="NHWC")
    with pytest.raises(ValueError, match=r"number of channels \(8\).* got 16"):
        ChannelSE().build((2, 5, 5, 8))
    with pytest.raises(ValueError, match="one to three spatial axes"):
        SpatialSE().build((2, 8))
    with pytest.raises(ValueError, match="number of channels must be known"):
        SpatialSE().build((2, 8, 8, None))
    made = SpatialSE()
    made.build((2, 5, 5, 8))
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 8"):
        made(np.ones((2, 5, 5, 4), np.float32))
    with pytest.raises(TypeError, match=r"source must be keras.Model, not SpatialSE"):
        load_functional_weights(network(2, lambda x: x), made)


def test_the_package_does_not_import_keras():
    code = "import sys, scse_kernels; assert 'keras' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
