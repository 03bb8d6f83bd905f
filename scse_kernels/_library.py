"""Where the package's operators are registered with torch: once in a process.

torch defines an operator only once, and compiled programs keep using it. So the library outlives
this package's modules. After importlib.reload, or a second import of the package, the operators are
still there, and registering them again does nothing.
"""

from collections.abc import Callable

import torch


class Library:
    """A torch.library.Library of the namespace scse_kernels. What it is told twice it does once."""

    def __init__(self) -> None:
        self._library = torch.library.Library("scse_kernels", "FRAGMENT")
        self._told: set[tuple[str, str]] = set()

    def _is_new(self, name: str, what: str) -> bool:
        new = (name, what) not in self._told
        self._told.add((name, what))
        return new

    def define(self, name: str, schema: str) -> None:
        """The operator `name`, whose schema without its name is `schema`."""
        if self._is_new(name, "schema"):
            self._library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def register_fake(self, name: str, fake: Callable) -> None:
        """What the operator gives for tensors without data."""
        if self._is_new(name, "fake"):
            torch.library.register_fake(f"scse_kernels::{name}", fake, lib=self._library)

    def impl(self, name: str, kernel: Callable, key: str) -> None:
        """The operator's kernel for a dispatch key."""
        if self._is_new(name, key):
            self._library.impl(name, kernel, key)


def library() -> Library:
    """The one of this process, kept beside the operators themselves."""
    namespace = vars(torch.ops.scse_kernels)
    if "_library" not in namespace:
        namespace["_library"] = Library()
    return namespace["_library"]
