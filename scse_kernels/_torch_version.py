"""Imported before all else, so that the error for an old torch says that it is too old."""

import torch

MINIMUM = "2.10"

if torch.torch_version.TorchVersion(torch.__version__) < MINIMUM:
    raise ImportError(
        f"scse_kernels needs torch {MINIMUM} or newer, found torch {torch.__version__}"
    )
