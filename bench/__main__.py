"""The command line: `python -m bench ops|host|mri|model|complexity|paper|tune|gpu [options]`."""

import argparse
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import options

#: Each a module of this package with add_arguments(parser) and run(args).
NAMES = ("ops", "host", "mri", "model", "complexity", "paper", "tune", "gpu")


def _parser(names: Iterable[str] = NAMES) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of scSE.")
    subparsers = parser.add_subparsers(title="benchmarks", metavar="|".join(NAMES))
    for name in names:
        try:
            module = importlib.import_module(f".{name}", __package__)
        except ModuleNotFoundError as error:  # one of the packages of the extra `bench`
            sub = subparsers.add_parser(name, help=f"can't run: {error}", add_help=False)
            sub.set_defaults(cannot_run=f"python -m bench {name}: {error}")
            continue
        description, _, details = module.__doc__.partition("\n")
        sub = subparsers.add_parser(
            name,
            help=description,
            description=f"{description}\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        if name != "gpu":  # it is for one GPU, and has its own place for files
            _add_common_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s"
    )
    parser.add_argument(
        "--threads", type=options.positive, help="CPU threads (default: torch's own choice)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="folder for files (%(default)s)"
    )


def main() -> int:
    """Run the benchmark that the command line names; returns the exit status."""
    # Imports the named benchmark only: all together take seconds.
    parser = _parser([name for name in sys.argv[1:2] if name in NAMES] or NAMES)
    args, unknown = parser.parse_known_args()
    if "cannot_run" in args:  # whatever its options would be
        raise SystemExit(args.cannot_run)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if "run" not in args:
        parser.print_help()
        return 0
    if "device" in args:
        _heed_common_arguments(args, parser)
    return args.run(args)


def _heed_common_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
