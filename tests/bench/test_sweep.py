"""`python -m bench ops --sweep`, on maps so small that nothing of it is a measurement."""

import csv

import pytest
import torch
from torch import nn

pytest.importorskip("bench.timing", reason="only a checkout has bench")

from bench import huge, memory, ops, providers, sweep
from bench.__main__ import _parser

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(options): the sweep over two sizes; its exit status."""
    monkeypatch.setattr(sweep, "EXPONENTS", range(12, 14))
    monkeypatch.setattr(huge, "SHAPE", (130, 64, 2, 2))  # more than two chunks
    monkeypatch.setattr(providers, "usable", lambda *_: ["cpu"])
    monkeypatch.setattr(providers, "_through", _reference_as("cpu"))

    def sweep_with(*words):
        args = _parser().parse_args(["ops", "--sweep", "--output", str(tmp_path), *words])
        args.device = CPU
        return args.run(args)

    return sweep_with


def _reference_as(name):
    through = providers._through
    return lambda backend, *a: through("eager" if backend == name else backend, *a)


def test_the_sizes():
    for exponent in (*sweep.EXPONENTS, 31):
        n, channels, height, width = sweep.shape(exponent)
        assert n * channels * height * width == 2**exponent
        assert channels == 64 and width in (height, 2 * height) and width <= 128
    assert (sweep.EXPONENTS[0], sweep.EXPONENTS[-1]) == (12, 27)
    assert torch.Size(huge.SHAPE).numel() == 2**31


@pytest.mark.parametrize("checked", [1 << 21, 0], ids=["all", "samples"])
def test_a_sweep(run, checked, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "_SMALL", checked)
    assert run("--rounds", "2", "--without-compile") == 0
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["shape"], r["provider"]) for r in rows] == [
        (shape, name) for shape in ("1x64x8x8", "1x64x8x16") for name in ("clone", "eager", "cpu")
    ]
    assert all(float(row["median_s"]) > 0 and float(row["noise"]) >= 0 for row in rows)
    caption, _, header, _, *lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert "torch" in caption and "| clone, µs | eager, µs | cpu, µs |" in header
    assert [line.split("|")[1].strip() for line in lines] == ["2**12", "2**13"]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    out = " ".join(capsys.readouterr().out.split())
    assert "130x64x2x2 float16" in out and "three samples are right" in out
    assert "Noise:" in out


class _WrongAtTheEnd(nn.Module):
    """Its last sample is wrong: y (1) or dx (-1)."""

    def __init__(self, module, sign):
        super().__init__()
        self.module, self.sign = module, sign

    def forward(self, x):
        y = self.module(x)
        more = x[-1:] * 0.5
        return y + torch.cat(
            [torch.zeros_like(x[:-1]), more if self.sign > 0 else more - more.detach()]
        )


@pytest.mark.parametrize("sign, name", [(1, "y"), (-1, "dx")])
def test_a_wrong_sample_of_a_large_map(run, monkeypatch, tmp_path, capsys, sign, name):
    monkeypatch.setattr(sweep, "_SMALL", 0)
    monkeypatch.setattr(sweep, "shape", lambda exponent: (5, 64, 2**exponent // 2**8, 2))
    right = ops.module_of
    monkeypatch.setattr(
        ops,
        "module_of",
        lambda who, case, *a: (
            _WrongAtTheEnd(right(who, case, *a), sign)
            if who == "cpu" and case.shape[0] == 5
            else right(who, case, *a)
        ),
    )
    assert run("--rounds", "1", "--without-compile") == 1
    assert f"{name} of sample 4 is off by" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "sweep.csv").open() as file:
        assert {row["provider"] for row in csv.DictReader(file)} == {"clone", "eager"}


def test_a_wrong_sample_of_the_largest_map(run, monkeypatch):
    right = ops.module_of
    monkeypatch.setattr(
        ops, "module_of", lambda who, case, *a: _WrongAtTheEnd(right(who, case, *a), 1)
    )
    with pytest.raises(SystemExit, match="cpu is wrong: sample 129 is off by"):
        huge.run("cpu", CPU, "contiguous", 16, "add")


def test_samples_of_the_largest_map_differ():
    case = ops.Case((130, 8, 2, 3), torch.float16, "channels_last", 2, "add", CPU)
    x = huge._map(torch.randn(1, 8, 2, 3).half(), case)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.flatten(1).unique(dim=0).shape[0] == 130


def test_what_does_not_fit_is_left_out_and_said(run, monkeypatch, tmp_path, capsys):
    maps = sweep._MAPS * 4
    monkeypatch.setattr(memory, "_free", lambda device: maps * 2**13 - 1)
    assert run("--rounds", "1", "--without-compile") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "From 2**13 elements on left out: it needs" in out
    assert "forward, once: left out, it needs" in out
    with (tmp_path / "sweep.csv").open() as file:
        assert {row["shape"] for row in csv.DictReader(file)} == {"1x64x8x8"}


def test_free_memory(monkeypatch):
    assert memory.too_large(1 << 10, CPU) is None
    assert "it needs 1048576.0 GiB" in memory.too_large(1 << 50, CPU)
    monkeypatch.setattr(memory, "_free", lambda device: None)
    assert memory.too_large(1 << 50, CPU) is None


@pytest.mark.parametrize(
    "words", [("--shape", "1x8x3x3"), ("--block", "bn_relu_scse"), ("--reduction", "2", "4")]
)
def test_what_a_sweep_does_not_take(run, words):
    with pytest.raises(SystemExit, match="--sweep takes one reduction and combine"):
        run(*words)
