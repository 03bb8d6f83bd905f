"""What `convert` did, as the user reads it."""

import re
from dataclasses import dataclass

from torch import nn

#: Names of what a reader would call attention on feature maps or squeeze & excitation.
_NAMES = re.compile(
    r"(?i:excit|attention|attn|recalibrat|scse)"
    r"|(?<![A-Z])(SC|C|S)?SE(?![a-z])"
    r"|(?<![A-Z])(C?BAM|ECA|GAB)(?![a-z])"
    r"|(Channel|Spatial)\w*Gate"
    r"|(?<![A-Za-z])[cs]se(?![a-z])"
)


@dataclass(frozen=True)
class Entry:
    """One block of the model.

    Attributes:
        paths: where it is in the model ("" for the model itself); several if it is shared.
        module: the name of its class.
        status: "converted", "already fused" or "left alone".
        detail: what it computes, such as "scse, max", or why it was left alone.
    """

    paths: tuple[str, ...]
    module: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What `convert` did; prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def converted(self) -> list[Entry]:
        """The blocks that this call converted."""
        return [entry for entry in self.entries if entry.status == "converted"]

    @property
    def left_alone(self) -> list[Entry]:
        """The blocks that look like squeeze & excitation but were left as they are."""
        return [entry for entry in self.entries if entry.status == "left alone"]

    def __str__(self) -> str:
        if not self.entries:
            return "no squeeze & excitation block was found"
        rows = [("path", "class", "result")]
        for entry in self.entries:
            path = entry.paths[0] or "(the model itself)"
            if len(entry.paths) > 1:
                path += f" (shared, {len(entry.paths)} places)"
            rows.append((path, entry.module, f"{entry.status}: {entry.detail}"))
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def is_named_so(module: nn.Module) -> bool:
    """Whether the name of the module's class, or of one that it inherits from, says attention or
    squeeze & excitation. Not torch's own classes: their attention is between tokens."""
    return any(
        _NAMES.search(cls.__name__)
        for cls in type(module).__mro__
        if not cls.__module__.startswith(("torch.", "scse_kernels."))
    )
