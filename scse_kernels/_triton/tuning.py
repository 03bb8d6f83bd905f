"""What `python -m bench tune` found to be faster on a device than the choices of `heuristics.py`.

There is one JSON file for each device. SCSE_TUNING names it, else it lies in the user's cache
folder. It is read once, when a map on the device is first met. A file is used as a whole or not at
all: with one warning it is left aside where it can't be read, or was written for another device or
another Triton.

    {"device": "NVIDIA H100 80GB HBM3", "triton": "3.7.1", "entries": [
      {"channels": 64, "positions": 4096, "samples": 4, "dtype": "float16",
       "layout": "contiguous", "combine": "add",
       "block_c": 64, "block_s": 64, "warps": 2, "tiles": 1, "launches": 3}, ...]}
"""

import json
import os
import re
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch
import triton

from . import heuristics
from .heuristics import Tile, power_of_two

COMBINES = ("add", "max", "mul", "concat", "cse", "sse")
LAYOUTS = ("contiguous", "channels_last")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Kind:
    """The maps that an entry is for: so many channels; positions and samples up to these powers of
    two, and more than half of them."""

    channels: int
    positions: int
    samples: int
    dtype: str
    layout: str
    combine: str


@dataclass(frozen=True)
class Choice:
    """What is chosen for a call; see `heuristics.Tile`. launches: kernels each way, 3 or 1."""

    block_c: int
    block_s: int
    warps: int
    tiles: int
    launches: int

    def tile(self, channels: int) -> Tile:
        hold = channels <= self.block_c
        return Tile(self.block_c, self.block_s, self.warps, self.tiles, hold)


def kind(
    samples: int,
    channels: int,
    positions: int,
    dtype: torch.dtype,
    channels_last: bool,
    combine: int,
) -> Kind:
    """The kind of a call; `combine` as the kernels code it."""
    return Kind(
        channels,
        power_of_two(positions),
        power_of_two(samples),
        str(dtype).removeprefix("torch."),
        LAYOUTS[channels_last],
        COMBINES[combine],
    )


def choice(
    device: torch.device,
    samples: int,
    channels: int,
    positions: int,
    dtype: torch.dtype,
    channels_last: bool,
    combine: int,
) -> Choice:
    """What the file has for such a map, else what the heuristics say."""
    one = kind(samples, channels, positions, dtype, channels_last, combine)
    if tuned := table(device).get(one):
        return tuned
    lanes = 64 if torch.version.hip else 32
    processors = heuristics.multiprocessors(device)
    tile = heuristics.tile(
        samples, channels, positions, dtype.itemsize, lanes, channels_last, processors
    )
    return Choice(tile.block_c, tile.block_s, tile.warps, tile.tiles, 3)


def device_name(device: torch.device) -> str:
    """The model of the device, which a file is for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def path(name: str) -> Path:
    """Where the file for devices of that name is looked for and written."""
    if named := os.environ.get("SCSE_TUNING"):
        return Path(named)
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (
        Path(cache_folder) / "scse_kernels" / f"tuning-{re.sub(r'[^0-9A-Za-z]+', '-', name)}.json"
    )


@cache
def table(device: torch.device) -> dict[Kind, Choice]:
    """The choices for this device; none where there is no file or one that can't be used."""
    name = device_name(device)
    file = path(name)
    if not file.exists() and "SCSE_TUNING" not in os.environ:
        return {}
    try:
        return parse(file.read_text(), name)
    except (OSError, ValueError) as problem:
        warnings.warn(
            f"scse_kernels: no timings are used for {name}, since {file} can't be: {problem}",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def parse(text: str, device: str) -> dict[Kind, Choice]:
    """The entries of a file's text for `device` and this Triton; ValueError says what is wrong."""
    content = json.loads(text)  # a JSONDecodeError is a ValueError
    _check_keys("the file", content, {"device", "triton", "entries"})
    for key, here in (("device", device), ("triton", triton.__version__)):
        if content[key] != here:
            raise ValueError(f"it was written for {key} {content[key]!r}, this is {here!r}")
    if not isinstance(content["entries"], list):
        raise ValueError("entries must be a list")
    found = {}
    for number, entry in enumerate(content["entries"]):
        where = f"entry {number}"
        _check_keys(where, entry, {f.name for f in (*fields(Kind), *fields(Choice))})
        for key, value in entry.items():
            if not _valid(key, value):
                raise ValueError(f"{where}: {key} can't be {value!r}")
        one = Kind(**{f.name: entry[f.name] for f in fields(Kind)})
        made = Choice(**{f.name: entry[f.name] for f in fields(Choice)})
        if made.block_c * made.block_s > 2**20:
            raise ValueError(f"{where}: block_c * block_s is beyond Triton's 2**20")
        if made.tiles > 1 and made.block_c < one.channels:
            raise ValueError(f"{where}: tiles must be 1 where block_c is less than channels")
        if one in found:
            raise ValueError(f"{where}: a second one for {one}")
        found[one] = made
    return found


def text(device: str, entries: dict[Kind, Choice]) -> str:
    """What `parse` reads."""
    rows = [asdict(one) | asdict(made) for one, made in entries.items()]
    return json.dumps({"device": device, "triton": triton.__version__, "entries": rows}, indent=1)


def _check_keys(where, value, expected):
    if not isinstance(value, dict) or value.keys() != expected:
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{where} must be an object with {sorted(expected)}, got {got}")


def _valid(key, value):
    known = {"dtype": _DTYPES, "layout": LAYOUTS, "combine": COMBINES, "launches": (1, 3)}
    if key in known:
        return value in known[key]
    if type(value) is not int or value < 1:
        return False
    if key == "warps" and value > 16:
        return False
    return key in ("channels", "tiles") or value == power_of_two(value)
