"""The command line: `python -m bench ops|mri|model|complexity|paper|tune [options]`."""

import argparse
import sys
from pathlib import Path

import torch

from . import complexity, model, mri, ops, options, paper, tune


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of scSE.")
    subparsers = parser.add_subparsers(title="benchmarks")
    for module in (ops, mri, model, complexity, paper, tune):
        name = module.__name__.rpartition(".")[2]
        description, _, details = module.__doc__.partition("\n")
        sub = subparsers.add_parser(
            name,
            help=description,
            description=f"{description}\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument(
            "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s"
        )
        sub.add_argument(
            "--threads", type=options.positive, help="CPU threads (default: torch's own choice)"
        )
        sub.add_argument(
            "--output", type=Path, default=Path("results"), help="folder for files (%(default)s)"
        )
        sub.set_defaults(run=module.run)
    return parser


def main() -> int:
    """Run the benchmark that the command line names; returns the exit status."""
    parser = _parser()
    args = parser.parse_args()
    if "run" not in args:
        parser.print_help()
        return 0
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
