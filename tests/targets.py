"""What a test runs: a backend, on a device."""

from typing import NamedTuple


class Target(NamedTuple):
    """A backend and the device on which a test runs it."""

    backend: str
    device: str
