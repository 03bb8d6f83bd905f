"""A process for test_keras.py: outputs and gradients, under JAX, of models saved in a folder."""

import sys
from pathlib import Path

import jax
import keras
import numpy as np

import scse_kernels.keras  # noqa: F401  registers the layers

assert keras.config.backend() == "jax"
for file in Path(sys.argv[1]).glob("*.keras"):
    model = keras.models.load_model(file)
    x = np.load(file.with_suffix(".npy"))
    weights = [variable.value for variable in model.trainable_variables]

    def output(x, weights, model=model):
        return model.stateless_call(weights, [], x)[0]

    dx, gradients = jax.grad(lambda *given: (output(*given) ** 2).sum(), (0, 1))(x, weights)
    names = [variable.path for variable in model.trainable_variables]
    results = {"y": jax.jit(output)(x, weights), "dx": dx}
    results.update(zip(names, gradients, strict=True))
    np.savez(file.with_suffix(".npz"), **results)
