"""Self-check: what is built and usable here, and whether it computes what the reference defines.

    python -m scse_kernels

Every backend that can run on a device of this machine is compared with the reference in float64,
with each family of its kernels: output and all gradients of scse (each way to combine), cse and
sse, for each dtype and memory format. Takes a few seconds. Exits with 1 if one disagrees, and if
the package in a checkout's folder hides an installed one.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch

import scse_kernels

from . import _build_info, _native, backends, ops, selfcheck


def devices() -> list[torch.device]:
    return [
        torch.device("cpu"),
        *(torch.device("cuda", i) for i in range(torch.cuda.device_count())),
    ]


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def triton_version() -> str:
    """Triton's version, and whether it is newer than what the kernels were tried with."""
    from . import _triton

    try:
        import triton
    except ImportError:
        return "not installed"
    if _triton.version(triton.__version__) > _triton.NEWEST:
        return "{} (not tried: {}.{} is the newest that was)".format(
            triton.__version__, *_triton.NEWEST
        )
    return triton.__version__


def status(backend: str, device: torch.device) -> str:
    """ "usable", with what the compiled kernels are compiled for, or why not."""
    if reason := backends.why_not(backend, device):
        return f"not usable: {reason}"
    if backend == "cpu":
        return f"usable, with kernels for {torch.ops.scse_kernels.cpu_capability()}"
    if backend == "cuda":
        code = torch.ops.scse_kernels.cuda_architecture(device.index)
        return f"usable, with code for {code // 10}.{code % 10}"
    return "usable"


def built() -> list[tuple[str, str]]:
    """What the installation has of kernels that must be compiled, or why it has not."""
    rows = []
    for kernels, module in (("CPU, C++", "_C"), ("CUDA, C++", "_C_cuda")):
        against = _build_info.built_against(module)
        if against is None and _native.why_not(module) is None:
            against = "(nothing is written about it)"
        rows.append((kernels, against or f"none: {_build_info.why_left_out(module)}"))
    return rows


def hidden_installation() -> Path | None:
    """The folder of an installed package that a checkout hides: Python was started in the
    checkout's folder, and loaded the package from there."""
    if not _build_info.is_checkout():
        return None
    for entry in sys.path:
        package = Path(entry, "scse_kernels")
        if (package / "__init__.py").exists() and package.resolve() != _build_info.PACKAGE:
            return package
    return None


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())
    print()


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit status, 1 if a usable backend is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m scse_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)

    versions = (
        ("scse_kernels", scse_kernels.__version__),
        ("torch", torch.__version__),
        ("triton", triton_version()),
        ("python", platform.python_version()),
    )
    print_table(("package", "version"), list(versions))
    print(f"  loaded from {_build_info.PACKAGE}\n")
    if hidden := hidden_installation():
        print(
            f"This checkout hides the package that is installed in {hidden}.\n"
            "Start Python in another folder to use that one, or give the checkout kernels by\n"
            f"    {_build_info.mending_command()}"
        )
        return 1
    print_table(("kernels", "built against"), built())
    print_table(("device", ""), [(str(device), describe(device)) for device in devices()])

    pairs = [(backend, device) for backend in ("eager", *ops.BACKENDS) for device in devices()]
    rows = [(backend, str(device), status(backend, device)) for backend, device in pairs]
    print_table(("backend", "device", ""), rows)
    if chosen := backends.chosen():
        print(f"  Calls that name no backend use {chosen}.\n")
    if without := backends.missing_kernels():
        print(f"{without}\n")

    # Row by row: if a check hangs, the reader sees which one.
    wrong, line = 0, "  {:18}  {:6}  {:8}  {:5}  {:17}  {}"
    print(line.format("kernels", "device", "dtype", "", "error / tolerance", "largest in"))
    for row in selfcheck.check([pair for pair in pairs if backends.why_not(*pair) is None]):
        print(line.format(*row), flush=True)
        wrong += row.verdict == "WRONG"
    print()
    print(f"{wrong} of the above are WRONG" if wrong else "all agree with the float64 reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
