"""Keras 3 layers for cSE, sSE and scSE, under every backend of Keras.

    from scse_kernels.keras import ChannelSpatialSE

    x = ChannelSpatialSE(ratio=16)(x)

Under Keras' torch backend the layers call the fused functions of this package. A channels-last map
of Keras, [N, H, W, C], is a torch map [N, C, H, W] in channels_last: only the order of the axes is
another, and nothing is copied. Under the other backends the layers use `keras.ops`. So a saved
model runs under every backend.

The formulas are those of Roy, Navab, Wachinger (arXiv:1803.02579, arXiv:1808.08127).
Importing this module imports Keras; nothing else in the package does.
"""

from collections.abc import Iterator
from typing import NamedTuple

import keras
from keras import layers, ops

from .functional import cse, scse, sse
from .ops import COMBINE

_register = keras.saving.register_keras_serializable(package="scse_kernels")


class _SqueezeExcite(layers.Layer):
    """What the three layers share: sizes, layouts and weights."""

    _channel = _spatial = False  # which branches a layer has
    _combine = "add"

    def __init__(self, *, use_bias: bool, data_format: str | None, **kwargs) -> None:
        super().__init__(**kwargs)
        data_format = data_format or keras.config.image_data_format()
        if data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                "data_format must be 'channels_last', 'channels_first' or None,"
                f" got {data_format!r}"
            )
        self.use_bias, self.data_format = bool(use_bias), data_format

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if not 3 <= len(input_shape) <= 5:
            raise ValueError(
                f"{self.name}: the input must have one to three spatial axes, got shape"
                f" {tuple(input_shape)}"
            )
        channels = input_shape[self._axis]
        if channels is None:
            raise ValueError(
                f"{self.name}: the number of channels must be known, got shape"
                f" {tuple(input_shape)} with data_format={self.data_format!r}"
            )
        self.input_spec = layers.InputSpec(ndim=len(input_shape), axes={self._axis: channels})
        if self._channel:
            hidden = channels // self.ratio
            if hidden < 1:
                raise ValueError(
                    f"{self.name}: ratio must be between 1 and the number of channels ({channels}),"
                    f" so that a hidden channel is left, got {self.ratio}"
                )
            self.squeeze_kernel, self.squeeze_bias = self._dense("squeeze", channels, hidden)
            self.excite_kernel, self.excite_bias = self._dense("excite", hidden, channels)
        if self._spatial:
            self.spatial_kernel, self.spatial_bias = self._dense("spatial", channels, 1)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        shape = list(input_shape)
        if self._combine == "concat" and shape[self._axis] is not None:
            shape[self._axis] *= 2
        return tuple(shape)

    def call(self, inputs):
        if keras.config.backend() != "torch":
            return self._by_operations(inputs)
        if self.data_format == "channels_first":
            return self._fused(inputs)
        # A view [N, C, *S]. Where there is one spatial axis, a second one is added: torch knows
        # channels_last for two and three only.
        one_axis = inputs.dim() == 3
        x = inputs.unsqueeze(1) if one_axis else inputs
        y = self._fused(x.movedim(-1, 1)).movedim(1, -1)
        return y.squeeze(1) if one_axis else y

    def get_config(self) -> dict:
        config = {"use_bias": self.use_bias, "data_format": self.data_format}
        return {**super().get_config(), **config}

    @property
    def _axis(self) -> int:
        return -1 if self.data_format == "channels_last" else 1

    def _dense(self, name, inputs, outputs):
        """Kernel and bias of a dense layer, in the shapes of keras.layers.Dense."""
        # A mixed policy must not cast them to a half type: sums are formed in float32.
        kernel = self.add_weight(
            shape=(inputs, outputs),
            initializer="glorot_uniform",
            autocast=False,
            name=f"{name}_kernel",
        )
        bias = None
        if self.use_bias:
            bias = self.add_weight(
                shape=(outputs,), initializer="zeros", autocast=False, name=f"{name}_bias"
            )
        return kernel, bias

    def _fused(self, x):
        """y of the torch map x [N, C, *S]."""

        def dense(name):
            kernel, bias = (getattr(self, f"{name}_{part}") for part in ("kernel", "bias"))
            bias = None if bias is None else ops.convert_to_tensor(bias)
            return ops.convert_to_tensor(kernel).T, bias

        if not self._spatial:
            return cse(x, *dense("squeeze"), *dense("excite"))
        if not self._channel:
            return sse(x, *dense("spatial"))
        weights = (*dense("squeeze"), *dense("excite"), *dense("spatial"))
        return scse(x, *weights, combine=self._combine)

    def _by_operations(self, inputs):
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        x = ops.cast(inputs, "float64" if dtype == "float64" else "float32")
        channels = self._axis % len(x.shape)
        by_channel = by_position = None
        if self._channel:
            spatial = [axis for axis in range(1, len(x.shape)) if axis != channels]
            hidden = ops.relu(self._affine("squeeze", ops.mean(x, axis=spatial)))
            gate = ops.sigmoid(self._affine("excite", hidden))
            by_channel = x * ops.expand_dims(gate, spatial)
        if self._spatial:
            squeezed = self._affine("spatial", ops.moveaxis(x, channels, -1))
            by_position = x * ops.moveaxis(ops.sigmoid(squeezed), -1, channels)
        return ops.cast(self._combined(by_channel, by_position), dtype)

    def _affine(self, name, x):
        kernel, bias = (getattr(self, f"{name}_{part}") for part in ("kernel", "bias"))
        y = ops.matmul(x, ops.cast(kernel, x.dtype))
        return y if bias is None else y + ops.cast(bias, x.dtype)

    def _combined(self, by_channel, by_position):
        if by_position is None:
            return by_channel
        if by_channel is None:
            return by_position
        if self._combine == "concat":
            return ops.concatenate([by_channel, by_position], self._axis)
        return {"add": ops.add, "max": ops.maximum, "mul": ops.multiply}[self._combine](
            by_channel, by_position
        )


def _checked_ratio(ratio: int) -> int:
    if isinstance(ratio, bool) or not isinstance(ratio, int):
        raise TypeError(f"ratio must be int, not {type(ratio).__name__}")
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}")
    return ratio


@_register
class ChannelSE(_SqueezeExcite):
    """cSE: spatial squeeze and channel excitation (arXiv:1709.01507; as cSE arXiv:1803.02579).

    Args:
        ratio: r; the excitation has C // r hidden channels.
        use_bias: whether its two dense layers have biases.
        data_format: "channels_last" or "channels_first"; None takes Keras' own setting.

    Shape: [N, *S, C] ([N, C, *S]) with one to three spatial axes; the output has the same.

    Raises:
        TypeError: ratio is no int.
        ValueError: ratio leaves no hidden channel, data_format is unknown, or the input has another
            number of axes or an unknown number of channels.
    """

    _channel = True

    def __init__(
        self, ratio: int = 16, *, use_bias: bool = True, data_format: str | None = None, **kwargs
    ) -> None:
        super().__init__(use_bias=use_bias, data_format=data_format, **kwargs)
        self.ratio = _checked_ratio(ratio)

    def get_config(self) -> dict:
        return {**super().get_config(), "ratio": self.ratio}


@_register
class SpatialSE(_SqueezeExcite):
    """sSE: channel squeeze and spatial excitation (arXiv:1803.02579).

    Args and errors as in :class:`ChannelSE`, without a ratio.

    Shape: [N, *S, C] ([N, C, *S]) with one to three spatial axes; the output has the same.
    """

    _spatial = True

    def __init__(self, *, use_bias: bool = True, data_format: str | None = None, **kwargs) -> None:
        super().__init__(use_bias=use_bias, data_format=data_format, **kwargs)


@_register
class ChannelSpatialSE(_SqueezeExcite):
    """scSE: concurrent spatial and channel squeeze & excitation (arXiv:1803.02579, 1808.08127).

    Args:
        combine: "add" (MICCAI 2018), "max", "mul" or "concat" (TMI 2019).
        ratio, use_bias, data_format: as in :class:`ChannelSE`; use_bias holds for both branches.

    Shape: [N, *S, C] ([N, C, *S]) with one to three spatial axes; the output has the same, twice
    the channels for "concat".

    Raises:
        ValueError: combine is unknown; others as in :class:`ChannelSE`.
    """

    _channel = _spatial = True

    def __init__(
        self,
        ratio: int = 16,
        combine: str = "add",
        *,
        use_bias: bool = True,
        data_format: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(use_bias=use_bias, data_format=data_format, **kwargs)
        if combine not in COMBINE:
            names = ", ".join(map(repr, COMBINE))
            raise ValueError(f"combine must be one of {names}, got {combine!r}")
        self.ratio, self._combine = _checked_ratio(ratio), combine

    @property
    def combine(self) -> str:
        return self._combine

    def get_config(self) -> dict:
        return {**super().get_config(), "ratio": self.ratio, "combine": self.combine}


_POOLING = (
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
)
_PASSED_BY = (layers.Reshape, layers.Activation, layers.ReLU, layers.Permute)


class _Block(NamedTuple):
    """The layers of one block of the functional form; None for those of an absent branch."""

    squeeze: layers.Layer | None
    excite: layers.Layer | None
    spatial: layers.Layer | None


def load_functional_weights(model: keras.Model, source: keras.Model) -> int:
    """Copy the weights of a model written with the functional form into one with these layers.

    The functional form of a block, for a map x::

        c = GlobalAveragePooling2D()(x)
        c = Dense(C, activation="sigmoid")(Dense(C // r, activation="relu")(c))
        s = Conv2D(1, 1, activation="sigmoid")(x)
        y = Add()([Multiply()([x, c]), Multiply()([x, s])])

    Either branch may be absent; Reshape and Activation layers may stand between, 1x1 convolutions
    in place of the Dense layers, pooling with one to three axes. How the branches combine is not
    compared. The k-th block in `source` goes to the k-th of these layers in `model`; all other
    layers with weights are taken in their order too. A bias that `source` lacks becomes zero.

    Args:
        model: built, with layers of this module; changed in place.
        source: a functional or sequential model; it isn't changed.

    Returns:
        The number of blocks.

    Raises:
        TypeError: one of them is not a keras.Model.
        ValueError: the models don't correspond; nothing was copied then.
    """
    for name, given in (("model", model), ("source", source)):
        if not isinstance(given, keras.Model):
            raise TypeError(
                f"load_functional_weights(): {name} must be keras.Model, not {type(given).__name__}"
            )
    blocks = list(_blocks(source))
    targets = [layer for layer in model.layers if isinstance(layer, _SqueezeExcite)]
    inside = {id(layer) for block in blocks for layer in block if layer is not None}
    others = [layer for layer in source.layers if layer.weights and id(layer) not in inside]
    own = [
        layer for layer in model.layers if layer.weights and not isinstance(layer, _SqueezeExcite)
    ]
    for what, ours, theirs in (
        ("squeeze & excitation blocks", targets, blocks),
        ("other layers with weights", own, others),
    ):
        if len(ours) != len(theirs):
            raise ValueError(
                f"load_functional_weights(): model has {len(ours)} {what}, source {len(theirs)}"
            )
    values = [
        *(
            pair
            for layer, block in zip(targets, blocks, strict=True)
            for pair in _pairs(layer, block)
        ),
        *(
            (weight, value)
            for layer, other in zip(own, others, strict=True)
            for weight, value in zip(layer.weights, _weights_of(layer, other), strict=True)
        ),
    ]
    for weight, value in values:
        weight.assign(value)
    return len(blocks)


def _blocks(model: keras.Model) -> Iterator[_Block]:
    """The blocks of the functional form in a model, in the order of their maps."""
    consumers: dict[int, list[keras.Operation]] = {}
    for operation in model.operations:
        for x in keras.tree.flatten(operation.input):
            consumers.setdefault(id(x), []).append(operation)

    def after(operation):
        """What stands behind an operation, Reshape and Activation left out."""
        for consumer in consumers.get(id(operation.output), ()):
            if isinstance(consumer, _PASSED_BY):
                yield from after(consumer)
            else:
                yield consumer

    for users in consumers.values():
        # By name: `x * gate` makes an operation of that name that is no layer.
        multiplied = [user for user in users if type(user).__name__ == "Multiply"]

        def gates(layer, multiplied=multiplied):
            return any(user in multiplied for user in after(layer))

        squeeze = excite = spatial = None
        for user in users:
            if isinstance(user, _POOLING):
                for first in filter(_is_dense, after(user)):
                    for second in filter(_is_dense, after(first)):
                        if gates(second):
                            squeeze, excite = first, second
            elif _is_dense(user) and user.kernel.shape[-1] == 1 and gates(user):
                spatial = user
        if excite is not None or spatial is not None:
            yield _Block(squeeze, excite, spatial)


def _is_dense(layer: layers.Layer) -> bool:
    """Whether a layer is a dense one or a 1x1 convolution."""
    if isinstance(layer, layers.Dense):
        return True
    convolution = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
    return type(layer) in convolution and set(layer.kernel_size) == {1} and layer.groups == 1


def _pairs(layer: _SqueezeExcite, block: _Block) -> Iterator[tuple[keras.Variable, object]]:
    """(weight of ours, its value) for each weight of a block."""
    have = (block.squeeze is not None, block.spatial is not None)
    if have != (layer._channel, layer._spatial):
        raise ValueError(
            f"load_functional_weights(): {layer.name} is a {type(layer).__name__}, the block in its"
            f" place has {' and '.join(n for n, h in zip(('cSE', 'sSE'), have, strict=True) if h)}"
        )
    for name, dense in block._asdict().items():
        if dense is None:
            continue
        kernel, bias = (getattr(layer, f"{name}_{part}") for part in ("kernel", "bias"))
        if kernel.shape != (dense.kernel.shape[-2], dense.kernel.shape[-1]):
            raise ValueError(
                f"load_functional_weights(): {layer.name}'s {kernel.name} is {list(kernel.shape)},"
                f" {dense.name}'s {list(dense.kernel.shape)}"
            )
        yield kernel, ops.reshape(dense.kernel, kernel.shape)
        if bias is not None:
            yield bias, ops.zeros(bias.shape) if dense.bias is None else dense.bias
        elif dense.bias is not None:
            raise ValueError(
                f"load_functional_weights(): {dense.name} has a bias, {layer.name} was made with"
                " use_bias=False"
            )


def _weights_of(layer: layers.Layer, other: layers.Layer) -> list:
    shapes = [[tuple(w.shape) for w in given.weights] for given in (layer, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"load_functional_weights(): {layer.name} has weights {shapes[0]}, {other.name} in its"
            f" place {shapes[1]}"
        )
    return other.weights
