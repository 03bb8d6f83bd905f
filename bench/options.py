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
