"""`bench model` on a small network: what it says of a right conversion and of a wrong one."""

import argparse

import pytest
import torch

pytest.importorskip("bench.timing", reason="only a checkout has bench")
pytest.importorskip("rich")
from networks import needs_kernels

from bench import model

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:Memory block of unknown size"),
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Calls it; returns the exit status."""
    monkeypatch.setattr(model, "MODELS", {"small": model._Model(model._unet, (3, 1, 16, 16))})

    def call():
        parser = argparse.ArgumentParser()
        model.add_arguments(parser)
        args = parser.parse_args(["--models", "small", "--rounds", "1"])
        args.device, args.output = torch.device("cpu"), tmp_path
        return model.run(args)

    return call


def test_a_right_conversion(run, tmp_path, capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert "DISAGREE" not in out and "with batch norm" in out
    if "left out" not in out:  # no matplotlib
        assert (tmp_path / "model.png").stat().st_size > 5000


def test_a_slightly_wrong_conversion(run, monkeypatch, capsys):
    """Too little for float32 to show."""
    convert = model.convert

    def wrong(net, *example):
        report = convert(net, *example)
        with torch.no_grad():
            block = net.get_submodule(report.converted[0].paths[0])
            next(block.parameters()).mul_(1 + 1e-5)
        return report

    monkeypatch.setattr(model, "convert", wrong)
    assert run() == 1
    assert "DISAGREE" in capsys.readouterr().out
