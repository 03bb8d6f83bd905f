"""How noisy the machine was: measured with everything, and said; and parts of a step from its own
steps."""

import math

import pytest
import torch
from torch import nn

timing = pytest.importorskip("bench.timing", reason="only a checkout has bench")

from bench import blocks, ops, report  # noqa: E402
from bench.cases import Case  # noqa: E402

CPU = torch.device("cpu")


def spread(*samples):
    return timing.Timing(samples)


def test_the_fixed_clone_is_the_same_in_all_rounds(monkeypatch):
    call = timing.fixed_clone(CPU)
    assert call().shape == (1 << 20,) and call().data_ptr() != call().data_ptr()
    yardstick = timing.Yardstick(CPU)
    times = iter([1.0, 2.0, 3.0, 5.0, 9.0])
    monkeypatch.setattr(yardstick._clock, "sample", lambda *_: next(times))
    for _ in range(5):
        yardstick.sample()
    found = yardstick.timing()
    assert (found.median, found.iqr, found.spread, len(found.samples)) == (3.0, 3.0, 1.0, 5)


def test_ratios_are_of_the_same_rounds():
    """The machine is twice as slow in some rounds: it is so for both."""
    slow = (1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0)
    over = timing.Timing(tuple(3.0 * s for s in slow))
    under = timing.Timing(slow)
    assert timing.ratio(over, under) == (3.0, 3.0, 3.0)
    assert report.ratio(over, under) == "3.00"


@pytest.mark.parametrize("rounds, beyond", [(5, 1), (7, 1), (8, 2), (9, 2), (15, 4)])
def test_bounds_of_a_ratio(rounds, beyond):
    """Against the binomial distribution, and against draws whose median is known."""
    below = sum(math.comb(rounds, i) for i in range(beyond)) / 2**rounds
    assert below <= 0.05 < below + math.comb(rounds, beyond) / 2**rounds
    generator = torch.Generator().manual_seed(rounds)
    draws = torch.rand(2000, rounds, generator=generator) + 1.0  # median: 1.5
    held = 0
    for row in draws.tolist():
        found = timing.ratio(timing.Timing(tuple(row)), timing.Timing(rounds * (1.0,)))
        assert (found.low, found.high) == (sorted(row)[beyond - 1], sorted(row)[-beyond])
        held += found.low <= 1.5 <= found.high
    assert held > 0.89 * len(draws)


def test_few_rounds_tell_nothing():
    found = timing.ratio(spread(*4 * (4.0,)), spread(*4 * (1.0,)))
    assert found == (4.0, 0.0, math.inf)
    assert report.marked(found) == "4.00?"


def test_doubtful_ratios():
    assert report.marked(timing.Ratio(2.0, 1.82, 2.19)) == "2.00"
    assert report.marked(timing.Ratio(2.0, 1.81, 2.0)) == "2.00?"
    assert report.marked(timing.Ratio(2.0, 2.0, 2.21)) == "2.00?"
    assert report.marked(timing.Ratio(1.02, 0.99, 1.04)) == "1.02?"
    assert report.marked(timing.Ratio(0.97, 0.95, 0.99)) == "0.97"
    assert (report.doubt(0.1), report.doubt(0.11), report.doubt(math.nan)) == ("", "?", "?")


def test_what_is_said_of_the_noise(capsys):
    report.print_noise({"forward": 0.03, "backward": 0.42})
    said = " ".join(capsys.readouterr().out.split())
    assert "forward 3%, backward 42%" in said
    assert "the machine was busy" in said
    report.print_noise({"": 0.1})
    assert "busy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "eager, mark, mean",
    [
        ((6.0,) * 5, "", "3.00 (3.00)"),
        ((6.0, 6.0, 6.0, 6.0, 9.0), "?", "3.00? (3.00?)"),
        ((6.0,), "?", "3.00? (3.00?)"),
    ],
)
def test_tables_mark_what_a_busy_machine_measured(eager, mark, mean, capsys, monkeypatch):
    monkeypatch.setattr(report.console, "width", 200)  # no cell is wrapped
    case = Case((2, 8, 3, 3), torch.float32, "contiguous", 2, "add", CPU)
    others = {"clone": (1.0,) * len(eager), "eager": eager, "cpu": (2.0,) * len(eager)}
    measurements = [
        report.Measurement(case, "forward", timing.WARM, name, spread(*seconds), 1000, None, 0.01)
        for name, seconds in others.items()
    ]
    report.print_case(case, measurements)
    report.print_summary(measurements, ["cpu"])
    out = capsys.readouterr().out
    assert f" 3.00{mark} " in out and f" {mean} " in out


class _Clock:
    """The time that layers and losses move on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(blocks.time, "perf_counter", lambda: self.now)


class _Takes(nn.Module):
    def __init__(self, clock, forward, backward):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.seconds = clock, (forward, backward)

    def forward(self, x):
        self.clock.now += self.seconds[0]
        y = x * self.weight

        def backward(gradient):
            self.clock.now += self.seconds[1]

        y.register_hook(backward)
        return y


def test_blocks_are_timed_in_the_steps(monkeypatch):
    clock = _Clock(monkeypatch)
    first, second = _Takes(clock, 1.0, 2.0), _Takes(clock, 4.0, 8.0)
    net = nn.Sequential(
        _Takes(clock, 100.0, 200.0), first, _Takes(clock, 300.0, 400.0), second, second
    )

    def step(x):
        net(x).sum().backward()
        clock.now += 1000.0  # the optimizer

    timed = blocks.InStep(step, [first, second], CPU)
    for slow in (0.0, 0.0, 5.0):
        first.seconds = 1.0 + slow, 2.0
        timed(torch.ones(3))
    whole, part, share = timed.summary()
    assert (part.median, len(part.samples), whole.median) == (27.0, 3, 2027.0)
    assert share == pytest.approx(27 / 2027)
    assert timed.summary(without=2)[1].median == 32.0
    assert timed.calls == 3
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())


def test_ops_measures_noise_with_the_providers(monkeypatch):
    """The clone that the noise is taken from is a fixed one: that of x is another provider."""
    seen = []

    def interleaved(calls, device, rounds, way, on_round):
        seen.append(list(calls))
        return {
            name: spread(1.0, 1.0, 2.0, 2.0) if name == timing.FIXED else spread(1.0)
            for name in calls
        }

    monkeypatch.setattr(timing, "interleaved", interleaved)
    case = Case((2, 8, 3, 3), torch.float32, "contiguous", 2, "add", CPU)
    measurements, errors = ops._measure(case, ["eager"], 2, lambda stage: None)
    assert not errors and seen == 2 * [[timing.FIXED, "clone", "eager"]]
    assert [m.noise for m in measurements] == 4 * [pytest.approx(1 / 1.5)]
    assert {m.provider for m in measurements} == {"clone", "eager"}
