"""The backends that have kernels for BatchNorm + ReLU + scSE."""

import pytest

from scse_kernels.batch_norm import ops


@pytest.fixture
def fused(fused):
    if fused.backend not in ops.BACKENDS:
        pytest.skip(f"{fused.backend} has no kernels for BatchNorm")
    return fused


@pytest.fixture
def target(target):
    if target.backend not in ("eager", *ops.BACKENDS):
        pytest.skip(f"{target.backend} has no kernels for BatchNorm")
    return target
