"""Imported before all else: an old torch is named as such, and not by what it lacks."""

import torch

MINIMUM = "2.10"

if torch.torch_version.TorchVersion(torch.__version__) < MINIMUM:
    raise ImportError(
        f"scse_kernels needs torch {MINIMUM} or newer, found torch {torch.__version__}"
    )
