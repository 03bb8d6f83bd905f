"""How many Triton kernels a U-Net with scSE blocks compiles when its images have many sizes: prints
the table of docs/gpu.md, and what a kernel takes. They are compiled for sm_90, without a device.

    PYTHONPATH=tests python -m gpu.triton_sizes
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from budget import make_parameters
from gpu import recorder
from triton.runtime import driver

from scse_kernels import scse

#: Sides of the images, sixteen; channels of the decoder's blocks, and how much smaller than the
#: image their maps are.
SIDES = range(192, 512, 20)
BLOCKS = ((256, 16), (128, 8), (64, 4), (32, 2))
REDUCTION = 16
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@contextmanager
def compiler(really: bool) -> Iterator[list[float]]:
    """The seconds of a processor that each compiled kernel took, a list that grows. No kernel is
    launched; unless `really`, none is compiled either, but counted."""
    seconds = []

    def compile(function, key, signature, device, constants, options, attributes, warmup):
        begin = sum(os.times()[:4])  # of this process and of the assembler
        if really:
            source = function.ASTSource(function, signature, constants, attributes)
            target = driver.active.get_current_target()
            function.compile(source, target=target, options=options.__dict__)
        seconds.append(sum(os.times()[:4]) - begin)

    with (
        tempfile.TemporaryDirectory() as empty,
        pytest.MonkeyPatch.context() as patch,
        recorder.stand_in(compile),
    ):
        patch.setenv("TRITON_CACHE_DIR", empty)
        yield seconds


def step(samples: int, side: int, layout: str) -> None:
    """All blocks, forward and backward: maps of float16, parameters of float32."""
    for channels, smaller in BLOCKS:
        shape = samples, channels, side // smaller, side // smaller
        x = torch.zeros(shape, dtype=torch.float16).contiguous(memory_format=LAYOUTS[layout])
        leaves = [t.requires_grad_() for t in (x, *make_parameters(channels, REDUCTION))]
        y = scse(*leaves, backend="triton")
        torch.autograd.grad(y, leaves, torch.zeros_like(y))


def count(layout: str, really: bool) -> tuple[list[int], list[float]]:
    """Kernels after the first image, after one of each size, and after batches of two and three of
    each size too; and the seconds of each."""
    after = []
    with compiler(really) as seconds:
        for samples in (1, 2, 3):
            for side in SIDES:
                step(samples, side, layout)
                after.append(len(seconds))
    return [after[0], after[len(SIDES) - 1], after[-1]], seconds


def row(layout: str, kernels: list[int]) -> str:
    return f"| {layout} | " + " | ".join(map(str, kernels)) + " |"


def main() -> None:
    for layout in LAYOUTS:
        kernels, seconds = count(layout, really=layout == "channels_last")
        print(row(layout, kernels), flush=True)
        if layout == "channels_last":
            first = kernels[0]
            print(
                f"{sum(seconds[:first]):.0f} s for the first {first}, {sum(seconds):.0f} s for "
                f"all; {sum(seconds) / len(seconds):.1f} s each, {min(seconds):.1f} to "
                f"{max(seconds):.1f}"
            )


if __name__ == "__main__":
    main()
