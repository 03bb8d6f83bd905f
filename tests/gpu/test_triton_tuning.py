"""The file of timings: what it may contain, whom it is for, and that it changes tiles."""

import csv
import json
import math
import warnings
from dataclasses import fields, replace
from typing import ClassVar

import pytest
import torch
from budget import make_case

triton = pytest.importorskip("triton")

from scse_kernels._triton import launch, tuning  # noqa: E402

ENTRY = {
    "channels": 24,
    "positions": 1024,
    "samples": 4,
    "dtype": "float16",
    "layout": "channels_last",
    "combine": "max",
    "block_c": 32,
    "block_s": 8,
    "warps": 4,
    "tiles": 2,
    "launches": 1,
}
TILE = (32, 8, 4, 2, True)
FILE = {"device": "cpu", "triton": triton.__version__, "entries": [ENTRY]}


@pytest.fixture(autouse=True)
def no_table(monkeypatch, tmp_path):
    """No file, and nothing remembered of one."""
    monkeypatch.delenv("SCSE_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


@pytest.fixture
def named(monkeypatch, tmp_path):
    """A function that writes what SCSE_TUNING names."""

    def write(content):
        path = tmp_path / "here.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("SCSE_TUNING", str(path))
        tuning.table.cache_clear()

    return write


def problem(
    shape=(3, 24, 30, 31), variant="max", dtype=torch.float16, memory_format=torch.channels_last
):
    case = make_case(shape, variant, dtype)
    w1, *_, ws, _ = case.parameters
    return launch._describe(memory_format, case.x, w1, ws, tuning.COMBINES.index("max"))


def tile(**changed):
    t = problem(**changed).tile
    return t.block_c, t.block_s, t.warps, t.tiles, t.hold


def test_an_entry_changes_the_tile(named):
    assert tile() != TILE
    named(FILE)
    assert tile() == TILE
    # 3 samples and 930 positions count as up to 4 and up to 1024
    assert tile(shape=(4, 24, 32, 32)) == TILE


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": (2, 24, 30, 31)},
        {"shape": (5, 24, 30, 31)},
        {"shape": (3, 25, 30, 31)},
        {"shape": (3, 24, 33, 32)},
        {"shape": (3, 24, 16, 32)},
        {"dtype": torch.bfloat16},
        {"memory_format": torch.contiguous_format},
        {"variant": "cse"},
    ],
    ids=str,
)
def test_other_maps_keep_their_tile(changed, named):
    before = tile(**changed)
    named(FILE)
    assert tile(**changed) == before != TILE


def test_the_file_in_the_cache_folder_is_found(tmp_path):
    path = tuning.path("cpu")
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(FILE))
    assert tile() == TILE


def test_no_file_is_no_fault():
    assert tuning.table(torch.device("cpu")) == {}  # a warning would be an error


def test_devices_have_files_of_their_own():
    assert tuning.path("NVIDIA H100 80GB HBM3").name == "tuning-NVIDIA-H100-80GB-HBM3.json"
    assert tuning.path("NVIDIA H200") != tuning.path("NVIDIA H100 80GB HBM3")


def without(key):
    return {k: v for k, v in ENTRY.items() if k != key}


BAD = {
    "not JSON": ("{", "Expecting"),
    "a list": ([], "the file must be an object"),
    "no device": ({"triton": "3", "entries": []}, "the file must be an object"),
    "another device": (FILE | {"device": "NVIDIA H200"}, "device 'NVIDIA H200', this is 'cpu'"),
    "another Triton": (FILE | {"triton": "2.0"}, "triton '2.0', this is"),
    "entries no list": (FILE | {"entries": {}}, "entries must be a list"),
    "an entry without warps": (FILE | {"entries": [ENTRY, without("warps")]}, "entry 1 must be"),
    "an unknown key": (FILE | {"entries": [ENTRY | {"stages": 3}]}, "entry 0 must be"),
    "two of a kind": (FILE | {"entries": [ENTRY, ENTRY | {"warps": 8}]}, "entry 1: a second one"),
    "tiles of part of the channels": (
        FILE | {"entries": [ENTRY | {"block_c": 16}]},
        "entry 0: tiles must be 1",
    ),
    "too large": (FILE | {"entries": [ENTRY | {"block_s": 2**16}]}, "beyond Triton's"),
} | {
    f"{key} {value!r}": (FILE | {"entries": [ENTRY | {key: value}]}, f"entry 0: {key} can't be")
    for key, value in (
        ("block_c", 33),
        ("block_s", 0),
        ("warps", 3),
        ("warps", 32),
        ("tiles", 1.5),
        ("tiles", True),
        ("launches", 2),
        ("dtype", "int8"),
        ("layout", "channels_first"),
        ("combine", "sum"),
        ("positions", 1000),
        ("channels", "24"),
    )
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_left_aside_whole_with_one_warning(content, message, named):
    before = tile()
    named(content)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert tile() == before
    assert len(caught) == 1 and "here.json" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile() == before


def test_a_missing_file_that_was_named_is_told(named, tmp_path):
    named(FILE)
    (tmp_path / "here.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"here\.json"):
        tile()


def test_what_is_written_is_what_is_read(named):
    kind = tuning.Kind(24, 1024, 4, "float16", "channels_last", "max")
    entries = {kind: tuning.Choice(32, 8, 4, 2, 1)}
    assert tuning.parse(tuning.text("cpu", entries), "cpu") == entries
    named(tuning.text("cpu", entries))
    assert tile() == TILE


ARGUMENTS = (torch.device("cpu"), 2, 12, 42, torch.float32, False, 0)


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """A function that tunes for ARGUMENTS with times made up: the further from `best`, the longer.
    The package's own choice takes `gain` times as long. Eager modules take the kernels' place."""
    bench = pytest.importorskip("bench.tune", reason="only a checkout has bench")
    build = bench.providers.build
    own = tuning.choice(*ARGUMENTS)

    def run(best, gain, wrong=None, pool=None):
        def distance(choice):
            names = ("block_s", "warps", "tiles", "launches")
            return sum(abs(math.log2(getattr(choice, n) / getattr(best, n))) for n in names)

        def interleaved(calls, device, rounds, way):
            for choice, step in calls.items():
                step()
                assert tuning.choice(*ARGUMENTS) == choice  # what ran would have used it
            scale = math.log(gain) / distance(own)
            return {c: bench.timing.Timing((math.exp(scale * distance(c)),)) for c in calls}

        disagreement = bench.ops.disagreement
        monkeypatch.setattr(bench.timing, "interleaved", interleaved)
        monkeypatch.setattr(bench.providers, "build", lambda _, *how: build("reference", *how))
        monkeypatch.setattr(
            bench.ops,
            "disagreement",
            lambda *how: "dx is off" if tuning.choice(*ARGUMENTS) == wrong else disagreement(*how),
        )
        device, samples, channels, _, dtype, *_ = ARGUMENTS
        case = bench.Case((samples, channels, 6, 7), dtype, "contiguous", 2, "add", device)
        status = bench.tune([case], 3, tmp_path / "tune.csv", pool)
        tuning.table.cache_clear()  # as when the package next starts
        return status

    return run


def test_the_tuner_finds_the_fastest_and_writes_what_is_read(tune, tmp_path):
    own = tuning.choice(*ARGUMENTS)
    best = replace(own, block_s=4 * own.block_s, launches=1)
    assert tune(best, gain=1.5) == 0
    assert tuning.choice(*ARGUMENTS) == best
    with (tmp_path / "tune.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert None not in rows[0] and {row["own"] for row in rows} == {"True", "False"}
    # a second run starts from there, and ends there
    assert tune(best, gain=1.5) == 0
    assert tuning.choice(*ARGUMENTS) == best


def test_other_processes_compile_all_that_the_tuner_times(tune, tmp_path):
    class Pool:
        """Calls at once, in this process."""

        compiled: ClassVar[list] = []

        def map(self, function, cases, choices):
            self.compiled += choices
            return map(function, cases, choices)

    own = tuning.choice(*ARGUMENTS)
    best = replace(own, block_s=4 * own.block_s, launches=1)
    assert tune(best, gain=1.5, pool=Pool()) == 0
    assert tuning.choice(*ARGUMENTS) == best
    names = [field.name for field in fields(own)]
    with (tmp_path / "tune.csv").open() as file:
        timed = {tuple(int(row[n]) for n in names) for row in csv.DictReader(file)}
    compiled = [tuple(getattr(choice, n) for n in names) for choice in Pool.compiled]
    assert timed - {tuple(getattr(own, n) for n in names)} == {*compiled}
    assert len(compiled) == len({*compiled})


def test_the_tuner_keeps_the_own_choice_unless_another_is_clearly_faster(tune):
    own = tuning.choice(*ARGUMENTS)
    assert tune(replace(own, block_s=2 * own.block_s), gain=1.02) == 0
    assert tuning.choice(*ARGUMENTS) == own
    assert json.loads(tuning.path("cpu").read_text())["entries"] == []


def test_the_tuner_drops_what_is_wrong(tune, capsys):
    own = tuning.choice(*ARGUMENTS)
    best = replace(own, block_s=2 * own.block_s)
    assert tune(best, gain=1.5, wrong=best) == 1
    assert tuning.choice(*ARGUMENTS) != best
    assert "dx is off" in " ".join(capsys.readouterr().out.split())


def test_the_tuner_leaves_other_entries_alone(tune, tmp_path):
    path = tuning.path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(FILE))
    tuning.table.cache_clear()
    own = tuning.choice(*ARGUMENTS)
    tune(replace(own, block_s=2 * own.block_s), gain=1.5)
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert tile() == TILE
