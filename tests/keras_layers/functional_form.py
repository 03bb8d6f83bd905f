"""Networks with squeeze & excitation in Keras' functional form, as people write it."""

import keras
import numpy as np
from keras import layers

CHANNELS = 12
COMBINED = {"add": layers.Add, "max": layers.Maximum, "mul": layers.Multiply}


def block(x, variant, ratio=4, use_bias=True, operators=False):
    """cSE, sSE or scSE of a channels-last map with layers of Keras alone.

    operators: `x * gate` in the place of Multiply layers, convolutions in the place of Dense ones.
    """
    axes, channels = len(x.shape) - 2, x.shape[-1]
    convolution = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[axes - 1]
    multiply = (lambda pair: pair[0] * pair[1]) if operators else layers.Multiply()
    by_channel = by_position = None
    if variant != "sse":
        pooling = (
            layers.GlobalAveragePooling1D,
            layers.GlobalAveragePooling2D,
            layers.GlobalAveragePooling3D,
        )[axes - 1]
        if operators:
            gate = pooling(keepdims=True)(x)
            gate = convolution(channels // ratio, 1, use_bias=use_bias)(gate)
            gate = convolution(channels, 1, use_bias=use_bias)(layers.Activation("relu")(gate))
            gate = layers.Activation("sigmoid")(gate)
        else:
            gate = pooling()(x)
            gate = layers.Dense(channels // ratio, activation="relu", use_bias=use_bias)(gate)
            gate = layers.Dense(channels, activation="sigmoid", use_bias=use_bias)(gate)
            gate = layers.Reshape((1,) * axes + (channels,))(gate)
        by_channel = multiply([x, gate])
    if variant != "cse":
        gate = convolution(1, 1, activation="sigmoid", use_bias=use_bias)(x)
        by_position = (layers.Multiply() if not operators else multiply)([x, gate])
    if by_position is None or by_channel is None:
        return by_channel if by_position is None else by_position
    if variant == "concat":
        return layers.Concatenate()([by_channel, by_position])
    return COMBINED[variant]()([by_channel, by_position])


def network(axes, recalibrate) -> keras.Model:
    """A convolution, a block, a convolution, a block, and a head of one channel, as an sSE has."""
    convolution = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[axes - 1]
    inputs = keras.Input((*(None,) * axes, 3))
    x = convolution(CHANNELS, 3, padding="same", activation="relu")(inputs)
    x = recalibrate(x)
    x = convolution(CHANNELS, 3, padding="same")(x)
    x = recalibrate(x)
    return keras.Model(inputs, convolution(1, 1, activation="sigmoid")(x))


def randomize(model, seed=0) -> None:
    """Random values of every weight; biases that leave most hidden channels alive."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        values = generator.normal(size=weight.shape)
        matrix = len(weight.shape) > 1
        weight.assign(values * np.prod(weight.shape[:-1]) ** -0.5 if matrix else 0.5 + values / 2)


def maps(*shape, seed=0) -> np.ndarray:
    """[N, *S, C] in float32; each sample's each channel has a magnitude and a mean of its own."""
    generator = np.random.default_rng(seed)
    spread = (shape[0], *(1 for _ in shape[1:-1]), shape[-1])
    magnitude = 10 ** -generator.random(spread)
    values = magnitude * (generator.normal(size=shape) + generator.normal(size=spread))
    return values.astype(np.float32)
