"""What the tests here have executed of the compiled kernels, and the table of it.

    SCSE_GPU_PROOF=FOLDER python -m pytest tests/gpu
    python tests/gpu/proof.py FOLDER

is what `make gpu-proof` does. Each test process appends lines of JSON to a file of its own in the
folder. Without the variable nothing is written. With it a test that can't run here fails; without
it the test is skipped.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

VARIABLE = "SCSE_GPU_PROOF"
#: Who compiled a kernel -> the kernels that the table must have.
EXPECTED = {
    "triton": (
        "squeeze_kernel",
        "excite_kernel",
        "apply_kernel",
        "reduce_kernel",
        "excite_backward_kernel",
        "excite_hidden_kernel",
        "excite_gates_kernel",
        "excite_backward_hidden_kernel",
        "excite_backward_mean_kernel",
        "apply_backward_kernel",
        "forward_kernel",
        "backward_kernel",
        "norm_statistics_kernel",
        "norm_merge_kernel",
        "norm_squeeze_kernel",
        "norm_apply_kernel",
        "norm_reduce_kernel",
        "norm_sums_kernel",
        "norm_apply_backward_kernel",
    ),
    "nvcc": (
        "squeeze_planes",
        "squeeze_channels_last",
        "excite",
        "apply",
        "apply_flat",
        "reduce_planes",
        "reduce_channels_last",
        "excite_backward",
        "excite_hidden",
        "excite_gates",
        "excite_backward_hidden",
        "excite_backward_mean",
        "apply_backward",
        "apply_backward_flat",
    ),
}


def record(
    compiler: str,
    kernel: str,
    arch: int,
    launches: int = 1,
    error: float | None = None,
    passes: float | None = None,
) -> None:
    """Notes that a test has executed a kernel, and that what came out was right.

    Args:
        compiler: "triton" or "nvcc".
        kernel: its name, without template arguments.
        arch: what it was compiled for, 80 or 90.
        launches: how many of them ran.
        error: the largest error of what it had a part in, in units of what is allowed.
        passes: bytes of DRAM that one launch has read and written, in units of x.
    """
    if folder := os.environ.get(VARIABLE):
        line = json.dumps([compiler, kernel, arch, launches, error, passes])
        with open(Path(folder) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(line + "\n")


def unavailable(reason: str) -> None:
    """Skips the test, or the module that is being imported: what it needs is not here. Fails it
    where a proof was asked for."""
    if os.environ.get(VARIABLE):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def table(folder: Path) -> tuple[str, list[str]]:
    """The table of a folder's records, and the expected kernels that it lacks."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            compiler, kernel, arch, *rest = json.loads(line)
            found[compiler, kernel, arch].append(rest)
    rows = [("compiler", "kernel", "arch", "launches", "worst error / allowed", "DRAM passes")]
    for (compiler, kernel, arch), records in sorted(found.items()):
        launches = sum(launches for launches, _, _ in records)
        errors = [error for _, error, _ in records if error is not None]
        passes = [p for _, _, p in records if p is not None]
        passes = [f"{p:.2f}" for p in (min(passes), max(passes))] if passes else []
        rows.append(
            (
                compiler,
                kernel,
                f"sm_{arch}",
                str(launches),
                f"{max(errors):.2f}" if errors else "",
                " to ".join(dict.fromkeys(passes)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    executed = {(compiler, kernel) for compiler, kernel, _ in found}
    missing = [
        f"{compiler}: {kernel}"
        for compiler, kernels in EXPECTED.items()
        for kernel in kernels
        if (compiler, kernel) not in executed
    ]
    return "\n".join(lines), missing


def main(folder: str) -> int:
    """Prints the table; 1 if a kernel is missing."""
    text, missing = table(Path(folder))
    print(text)
    for kernel in missing:
        print(f"not executed: {kernel}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
