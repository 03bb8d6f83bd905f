"""The kernels' code: PTX out of the fat binaries that nvcc embeds in host code."""

import ctypes
import re
import struct
from functools import cache, cached_property, lru_cache

import gpulab

_MAGIC, _PTX = 0xBA55ED50, 1
_ENTRY = re.compile(r"^(?:\.\w+ )*\.entry (\w+)", re.M)


class Image:
    """The PTX of one fat binary for one architecture, loaded kernel by kernel: there is a lot."""

    def __init__(self, ptx: str):
        self.ptx = ptx
        self.architecture = int(re.search(r"^\.target sm_(\d+)", ptx, re.M)[1])

    @cached_property
    def _pieces(self):
        """What stands before the first kernel, and where each kernel begins and ends."""
        starts = [m.start() for m in _ENTRY.finditer(self.ptx)]
        names = _ENTRY.findall(self.ptx)
        ends = [*starts[1:], len(self.ptx)]
        return self.ptx[: starts[0]], dict(zip(names, zip(starts, ends, strict=True), strict=True))

    @lru_cache(24)  # noqa: B019 (images live as long as the process)
    def module(self, kernel: str) -> gpulab.Module:
        """The kernel as a module of its own, with the line numbers of the whole."""
        head, places = self._pieces
        begin, end = places[kernel]
        lines_between = self.ptx.count("\n", len(head), begin)
        files = "\n".join(re.findall(r"^\s*\.file.*$", self.ptx[end:], re.M))
        return gpulab.Module(head + "\n" * lines_between + self.ptx[begin:end] + "\n" + files)


@cache
def images(fatbin: int) -> tuple[Image, ...]:
    """The images in the fat binary at an address, oldest architecture first.

    Its layout is not documented; what is read of it has been so since CUDA 4: a header with a
    magic number, its own size and that of what follows, then for each image its kind, the size of
    its header and of its contents.
    """
    magic, _, header, size = struct.unpack("=IHHQ", ctypes.string_at(fatbin, 16))
    assert magic == _MAGIC, f"not a fat binary: {magic:#x}"
    found, at, end = [], fatbin + header, fatbin + header + size
    while at < end:
        kind, _, header, size = struct.unpack("=HHIQ", ctypes.string_at(at, 16))
        if kind == _PTX:
            found.append(Image(ctypes.string_at(at + header, size).rstrip(b"\0").decode()))
        at += header + size
    return tuple(sorted(found, key=lambda image: image.architecture))
