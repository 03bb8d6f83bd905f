"""Loading of the compiled extension modules, and the reason where one can't be loaded."""

import importlib

from . import _build_info


def _load(module: str) -> str | None:
    try:
        importlib.import_module(f"scse_kernels.{module}")
    except ModuleNotFoundError:
        reason = _build_info.why_left_out(module)
        return f"this installation was built without scse_kernels.{module}: {reason}"
    except (ImportError, OSError) as error:  # built for another torch or another platform
        built = _build_info.built_against(module) or "another torch"
        return f"scse_kernels.{module}, built against {built}, does not load: {error}"
    return None


# Loading registers a module's kernels with torch. It happens when the package is imported, not on
# first use: a compiled or exported program may call the operators directly.
_WHY_NOT = {module: _load(module) for module in ("_C", "_C_cuda")}


def why_not(module: str) -> str | None:
    """None if the extension `scse_kernels.<module>` is loaded, else why it isn't."""
    return _WHY_NOT[module]
