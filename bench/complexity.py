"""Parameters and multiply-adds of the articles' networks, and what the blocks add to them.

U-Net, SD-Net and DenseNet with the patterns none, cSE, sSE and scSE. Nothing is timed. The articles
count C * C weights for a cSE block (two matrices, reduction ratio 2) and C for an sSE block, no
biases: 33,280 for the eight scSE blocks of 64 channels, "about 1.5 %" of a U-Net with 2.1 million
parameters. The column "as the articles count" has that; the columns before it count everything.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import networks, options, report

_STATED = "1.5 %"
#: of the articles' whole-brain segmentation
_CLASSES = 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench complexity`."""
    parser.add_argument("--width", type=options.positive, default=64, help="channels (%(default)s)")
    parser.add_argument(
        "--size", type=options.positive, default=256, help="of a square image (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.size % networks.MULTIPLE:
        raise SystemExit(f"--size must be a multiple of {networks.MULTIPLE}, got {args.size}")
    table = report.table(
        f"{args.width} channels, {_CLASSES} classes, one image of {args.size}x{args.size}"
    )
    for i, column in enumerate(
        ("", "pattern", "parameters", "more", "as the articles count", "stated", "GMAC", "more")
    ):
        table.add_column(column, justify="right" if i > 1 else "left")
    for name in networks.NETWORKS:
        plain = counts(name, "none", args.width, args.size)
        for pattern in networks.PATTERNS:
            parameters, macs = counts(name, pattern, args.width, args.size)
            added = as_the_articles_count(pattern, args.width)
            table.add_row(
                name if pattern == "none" else "",
                pattern,
                f"{parameters:,}",
                f"{parameters / plain[0] - 1:.2%}",
                f"{added:,} = {added / plain[0]:.2%}",
                _STATED if (name, pattern) == ("U-Net", "scSE") else "",
                f"{macs / 1e9:.3f}",
                f"{macs / plain[1] - 1:.3%}",
            )
    report.console.print(table)
    report.console.print(
        "GMAC: multiply-adds of convolutions and linear layers, and one multiplication for each"
        " element that a gate meets. A parameter of the blocks is used once per position (sSE) or"
        " once per image (cSE), one of a 5x5 convolution at every position: so the blocks are"
        " 1.5 % of the parameters and less than that of the work.\n"
        "The U-Net here has somewhat more than the 2.1 million parameters stated, since the"
        " articles don't say how maps are enlarged, nor what of biases and BatchNorm is counted."
    )
    return 0


def counts(network: str, pattern: str, width: int, size: int) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image of size x size."""
    with torch.device("meta"):
        net = networks.build(network, pattern, _CLASSES, width)
        image = torch.empty(1, 1, size, size)
    products = 0

    def recalibrated(block, args, y):
        nonlocal products
        gates = {"none": 0, "cSE": 1, "sSE": 1, "scSE": 2}[pattern]
        products += gates * y.numel()

    for block in net.recalibrations:
        block.register_forward_hook(recalibrated)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    parameters = sum(p.numel() for p in net.parameters())
    return parameters, counter.get_total_flops() // 2 + products


def as_the_articles_count(pattern: str, width: int) -> int:
    """The weights of all blocks: C * C for a cSE and C for an sSE (TMI 2019, section III.D)."""
    blocks = 2 * networks.blocks.BLOCKS
    return blocks * (width**2 * (pattern in ("cSE", "scSE")) + width * (pattern in ("sSE", "scSE")))
