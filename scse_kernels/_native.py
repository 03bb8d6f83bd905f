"""Loading of the compiled extension modules, on first use, and the reason where one is missing."""

import importlib

import torch

_reasons: dict[str, str | None] = {}


@torch.compiler.assume_constant_result
def why_not(module: str) -> str | None:
    """None if the extension `scse_kernels.<module>` is loaded, else why it can't be.

    Loading registers the module's kernels with torch. The answer is remembered.
    """
    if module not in _reasons:
        try:
            importlib.import_module(f"scse_kernels.{module}")
            _reasons[module] = None
        except ModuleNotFoundError:
            _reasons[module] = f"this installation was built without scse_kernels.{module}"
        except (ImportError, OSError) as error:  # built for another torch or another platform
            _reasons[module] = f"scse_kernels.{module} does not load: {error}"
    return _reasons[module]
