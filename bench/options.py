"""Types of command-line options."""

import argparse


def shape(text: str) -> tuple[int, ...]:
    """NxCx and one to three spatial sizes, such as 8x64x64x64."""
    sizes = tuple(int(size) for size in text.split("x"))
    if not 3 <= len(sizes) <= 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected NxCx and one to three spatial sizes")
    return sizes


def positive(text: str) -> int:
    """An integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


class Several(argparse.Action):
    """Values of an option that may be given more than once: `--shape A B` is `--shape A --shape B`.
    argparse's "extend" would add them to the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        given = () if before is self.default else before
        setattr(namespace, self.dest, [*given, *values])


def add_reference(parser: argparse.ArgumentParser) -> None:
    """The option that lets the eager operations stand in for kernels."""
    parser.add_argument(
        "--reference",
        action="store_true",
        help="go on with this package's eager operations where there are no kernels",
    )
