"""The benchmarks' way through CUDA events and graphs, with stand-ins for what only a GPU has."""

import argparse
import contextlib
import csv
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

timing = pytest.importorskip("bench.timing", reason="only a checkout has bench")

from bench import ops, providers, report  # noqa: E402
from bench.__main__ import _parser, main  # noqa: E402
from bench.cases import Case  # noqa: E402
from scse_kernels import backends  # noqa: E402

CPU = torch.device("cpu")


class Gpu:
    """Notes what is asked of torch.cuda; its clock ticks a millisecond at each call on a stream."""

    def __init__(self, monkeypatch):
        self.log, self.now, self.capturing = [], 0.0, None
        gpu = self

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream) and other is not self
                gpu.log.append("wait")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing is True

            def record(self):
                self.time = gpu.now

            def elapsed_time(self, end):
                return end.time - self.time

        class Graph:
            def replay(self):
                gpu.log.append("replay")
                gpu.now += self.duration

        here = Stream()

        @contextlib.contextmanager
        def stream(stream):
            assert isinstance(stream, Stream) and stream is not here
            gpu.log.append("aside")
            yield
            gpu.log.append("back")

        @contextlib.contextmanager
        def graph(cuda_graph):
            gpu.log.append("capture")
            before = gpu.now
            yield
            cuda_graph.duration = gpu.now - before
            gpu.log.append("captured")

        def sleep(cycles):
            assert type(cycles) is int and cycles >= 2e5
            gpu.log.append("sleep")

        for name, stand_in in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "stream": stream,
            "graph": graph,
            "current_stream": lambda: here,
            "device": lambda device: contextlib.nullcontext(),
            "synchronize": lambda device: None,
            "_sleep": sleep,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1000),
        }.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def call(self, milliseconds, name="call"):
        def call():
            self.log.append(name)
            self.now += milliseconds

        return call


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_ways():
    assert timing.ways(CPU) == (timing.WARM,)
    assert timing.ways(torch.device("cuda")) == (timing.WARM, timing.COLD, timing.GRAPH)


@pytest.mark.parametrize("cold", [False, True])
def test_clock_gives_the_seconds_between_events(gpu, cold):
    clock = timing._CudaClock(CPU, cold)
    assert (clock.flush.memory.nbytes if clock.flush else 0) == (2000 if cold else 0)
    call = gpu.call(0.25)
    assert clock.prepare("it", call) == 4  # a millisecond's worth
    gpu.log.clear()
    assert clock.sample("it", call, 4) == pytest.approx(0.25e-3)
    assert gpu.log == ["sleep", *["call"] * 4]
    assert 0 < clock.host_seconds["it"] < 1


def test_cold_calls_come_after_all_other_memory_was_read_and_not_written(gpu):
    clock = timing._CudaClock(CPU, True)
    read = []
    clock.host_seconds["it"] = 0.0

    def call():
        read.append(clock.flush.sum.item())
        clock.flush.memory.fill_(len(read) + 1)

    clock.sample("it", call, 3)
    assert read == [500, 1000, 1500]  # 2000 bytes of float32, as the call before left them
    assert clock.flush.memory.eq(4).all()


def test_capture_warms_up_aside_and_replays(gpu):
    replay = timing.captured(gpu.call(0.5), CPU)
    warm_up = ["wait", "aside", "call", "call", "call", "back", "wait"]
    assert gpu.log == [*warm_up, "capture", "call", "captured"]
    gpu.log.clear()
    replay()
    assert gpu.log == ["replay"]


def test_interleaved_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(timing, "_CpuClock", lambda: timing._CudaClock(CPU, False))
    calls = {"a": gpu.call(2.0, "a"), "b": gpu.call(0.125, "b")}
    found = timing.interleaved(calls, CPU, 3)
    assert found["a"].median == pytest.approx(2e-3) and found["b"].median == pytest.approx(1.25e-4)
    assert (found["a"].calls, found["b"].calls) == (2, 8)
    assert found["a"].host > 0


@pytest.fixture
def options(tmp_path):
    """A function: the options of a command line, as `python -m bench` hands them on."""

    def parse(*words) -> argparse.Namespace:
        args = _parser().parse_args([*words, "--output", str(tmp_path), "--device", "cpu"])
        args.device = torch.device(args.device)
        return args

    return parse


def test_ops_times_all_ways(gpu, options, monkeypatch, tmp_path, capsys):
    """The whole benchmark, with the ways and the clock of a GPU."""
    monkeypatch.setattr(timing, "ways", lambda device: (timing.WARM, timing.COLD, timing.GRAPH))

    def interleaved(calls, device, rounds, way, on_round):
        for call in calls.values():
            call()
        for _ in range(rounds):
            on_round()
        return {n: timing.Timing((1e-3 * (1 + i),), 1, 1e-5) for i, n in enumerate(calls)}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    large = "1x8x33x33"
    monkeypatch.setattr(ops, "_LAUNCH_BOUND", 4 * 8 * 33 * 33 - 1)
    args = options(
        "ops", "--shape", "2x8x6x5", large, "--providers", "eager", "reference",
        "--reduction", "2", "--combine", "add", "--rounds", "2",
    )  # fmt: skip
    assert args.run(args) == 0
    with (tmp_path / "ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    directions = ("forward", "forward + backward")
    providers = ("clone", "eager", "reference")
    assert [(r["shape"], r["pass"], r["way"], r["provider"]) for r in rows] == [
        (shape, direction, way, provider)
        for shape in ("2x8x6x5", large)
        for direction in directions
        for way in (timing.WARM, timing.COLD, timing.GRAPH)
        if way != timing.GRAPH or shape != large
        for provider in providers
    ]
    calls = len(providers) + 1  # and the fixed clone
    assert gpu.log.count("capture") == gpu.log.count("replay") == 2 * calls
    assert {row["noise"] for row in rows} == {"0"}
    assert all(float(row["host_s"]) == 1e-5 for row in rows)
    assert (tmp_path / "ops.png").exists()
    out = capsys.readouterr().out
    assert "forward + backward, CUDA graph" in out and "of copy" in out


@pytest.mark.parametrize("name", ["ops", "tune"])
def test_an_option_given_twice(options, name):
    args = options(name, "--shape", "2x8x6x5", "--shape", "1x8x3x3", "2x4x3x3", "--combine", "mul")
    assert args.shape == [(2, 8, 6, 5), (1, 8, 3, 3), (2, 4, 3, 3)] and args.combine == ["mul"]
    assert len(options(name).shape) > 3 and options(name, "--shape", "1x8x3x3").shape == [
        (1, 8, 3, 3)
    ]


@pytest.mark.parametrize("name", ["ops", "mri", "model"])
def test_the_reference_is_not_timed_under_our_name(options, monkeypatch, name):
    monkeypatch.setattr(backends, "why_not", lambda backend, *_: "not built")
    args = options(name)
    with pytest.raises(SystemExit, match=r"no kernels to time. .*cpu: not built.*\n.*reference"):
        args.run(args)
    assert providers.fused(CPU, "--reference", is_asked=True) == ["reference"]
    monkeypatch.undo()
    assert "reference" not in providers.fused(CPU, "--reference", is_asked=True)


def test_every_size_has_a_tick(tmp_path):
    shapes = ((2, 8, 30, 30), (2, 8, 31, 31))
    measurements = [
        report.Measurement(
            Case(shape, torch.float32, "contiguous", 2, "add", CPU),
            "forward", timing.WARM, name, timing.Timing((1e-3,), 1, None), 1000, None, 0.0,
        )
        for shape in shapes
        for name in ("clone", "eager")
    ]  # fmt: skip
    ticks = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    savefig = figure.savefig

    def keep(self, *arguments, **options):
        (panel,) = self.axes
        savefig(self, *arguments, **options)
        low, high = panel.get_xlim()
        ticks.extend(tick for tick in panel.get_xticks() if low <= tick <= high)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "savefig", keep)
        report.plot(tmp_path / "two.png", measurements, report.environment(CPU))
    assert ticks == pytest.approx([case.case.x_bytes / 2**20 for case in measurements[::2]])


@pytest.mark.parametrize("combine", ["add", "max", "concat"])
def test_ops_with_batch_norm(options, tmp_path, combine):
    """All providers agree with the reference, those that torch.compile makes left out."""
    args = options(
        "ops", "--block", "bn_relu_scse", "--shape", "2x8x6x5", "--providers", "eager", "unfused",
        "reference", "--reduction", "2", "--combine", combine, "--rounds", "1",
    )  # fmt: skip
    assert args.run(args) == 0
    with (tmp_path / "ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["block"] for row in rows} == {"bn_relu_scse"}
    assert {row["provider"] for row in rows} == {"clone", "eager", "unfused", "reference"}


def test_ops_without_batch_norm_knows_no_unfused_block(options):
    args = options("ops", "--providers", "unfused")
    with pytest.raises(SystemExit, match="provider unfused: known: eager, compile, rewritten"):
        args.run(args)


def test_a_graph_that_cannot_be_captured_is_told(gpu):
    def refused():
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, failed = ops._graphs({"a": refused, "b": gpu.call(1.0)}, CPU)
    assert list(graphs) == ["b"]
    assert [(name, "not permitted" in str(error)) for name, error in failed] == [("a", True)]


def test_tune_is_for_gpus(options):
    args = options("tune")
    with pytest.raises(SystemExit, match="tune is for GPUs, got --device cpu"):
        args.run(args)


def test_host_times_each_provider_and_leaves_triton_as_it_was(options, tmp_path, capsys):
    pytest.importorskip("triton")
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from scse_kernels._triton import plan

    if plan._INTERPRETED:
        pytest.skip("the interpreter compiles nothing")

    def replaced():
        names = CompiledKernel._init_handles, plan.takes_addresses, backends.why_not
        return (*names, driver._active)

    before = replaced()
    threads = torch.get_num_threads()
    args = options("host", "--shape", "1x8x4x4", "--reduction", "2", "--rounds", "3")
    assert args.run(args) == 0
    assert replaced() == before
    assert torch.get_num_threads() == threads
    with (tmp_path / "host.csv").open() as file:
        rows = list(csv.DictReader(file))
    usable = ["eager", *providers.usable(CPU), "triton"]
    with_norm = ["eager", "unfused", *providers.usable(CPU, "bn_relu_scse"), "triton"]
    assert [(row["provider"], row["direction"]) for row in rows] == [
        (name, direction)
        for direction in ("forward", "forward + backward")
        for name in usable + with_norm
    ]
    norm = ["bn_relu_scse" in row["case"] for row in rows]
    assert norm == 2 * (len(usable) * [False] + len(with_norm) * [True])
    assert all(float(row["seconds"]) > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(f"\n {name} " in printed for name in with_norm)
    assert "x eager" in printed and "Noise:" in printed


def test_host_on_a_gpu_starts_when_the_gpu_is_done(gpu, monkeypatch):
    from bench import host

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gpu.log.append("synchronize"))
    times = iter([10.0, 12.0])
    monkeypatch.setattr(host.time, "perf_counter", lambda: gpu.log.append("clock") or next(times))
    seconds = host._sample(lambda: gpu.log.append("call"), torch.device("cuda"))
    assert gpu.log == ["synchronize", "clock", *["call"] * host._CALLS, "clock"]
    assert seconds == 2.0 / host._CALLS


def test_a_missing_package_leaves_out_its_benchmark_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    for name in ("mri", "mri_data"):
        monkeypatch.delitem(sys.modules, f"bench.{name}", raising=False)
        monkeypatch.delattr(sys.modules["bench"], name, raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", "mri", "--steps", "3"])
    with pytest.raises(SystemExit, match=r"python -m bench mri: .*nilearn"):
        main()
    assert _parser().parse_args(["ops", "--quick"]).run is ops.run


def test_ops_without_what_is_compiled(gpu, options, monkeypatch, tmp_path):
    monkeypatch.setattr(
        timing,
        "interleaved",
        lambda calls, *_: {name: timing.Timing((1e-3,), 1) for name in calls},
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no plot then
    args = options("ops", "--shape", "2x8x6x5", "--reduction", "2", "--combine", "add",
                   "--without-compile")  # fmt: skip
    assert args.run(args) == 0
    with (tmp_path / "ops.csv").open() as file:
        names = {row["provider"] for row in csv.DictReader(file)}
    assert {"clone", "eager"} < names and not names & {"compile", "rewritten"}
    assert not (tmp_path / "ops.png").exists()


_FITS = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
_DOES_NOT_FIT = """
import torch
torch.library.register_fake("torchvision::nms")(lambda *_: None)
"""


@pytest.mark.parametrize("code", (_FITS, _DOES_NOT_FIT, None), ids=("fits", "doesn't fit", "none"))
def test_torchvision_is_importable_if_it_is_there(code, tmp_path):
    if code is not None:
        (tmp_path / "torchvision.py").write_text(code)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        + ("" if code else "sys.modules['torchvision'] = None\n")
        + "from bench import model\nmodel._allow_torchvision()\n"
        + ("import torchvision\n" if code else "")
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("block", ["scse", "bn_relu_scse"])
def test_no_gradient_of_a_large_map_overflows_float16(block):
    case = Case((8, 32, 64, 64), torch.float16, "contiguous", 16, "add", CPU, block)
    for right in ops.expected(case, case.inputs()):
        assert 0 < right.abs().max() < torch.finfo(torch.float16).max / 8
