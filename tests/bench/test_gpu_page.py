"""`python -m bench gpu`: the times of kernels and the page, with a stand-in for the GPU."""

import argparse
import csv
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

gpu = pytest.importorskip("bench.gpu", reason="only a checkout has bench")

from test_gpu_steps import FACTS  # noqa: E402

from bench import options, report, timing  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.gpu import ahead, figures, kernels, page, plan, steps  # noqa: E402
from bench.gpu.steps import Step  # noqa: E402

CPU = torch.device("cpu")
SPEED = 3e6  # of the stand-in's copies, bytes per microsecond
SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"
CUDA = "void scse::cuda::{}<__half, 8, (scse::Combine)0>(__half const*, float*)"


class Gpu:
    """Notes kernels with their times; its clock is their sum."""

    def __init__(self, monkeypatch):
        self.now, self.trace, self.flushes = 1000.0, [], 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.kernel(SPIN, 5.0))
        monkeypatch.setattr(timing, "Flush", lambda device: self.flush)
        monkeypatch.setattr(kernels, "profile", lambda activities: self)

    def __enter__(self):
        self.trace.clear()
        return self

    def __exit__(self, *_):
        pass

    def export_chrome_trace(self, path):
        events = [{"name": "cudaLaunchKernel", "cat": "cuda_runtime", "ts": 0, "dur": 1, "ph": "X"}]
        with open(path, "w") as file:
            json.dump({"traceEvents": events + self.trace[::-1]}, file)  # in any order

    def flush(self):
        self.flushes += 1
        self.kernel("at::native::reduce_kernel<512, 1>", 40.0)

    def kernel(self, name, duration, gap=0.0, blocks=1, cat="kernel"):
        self.now += gap
        given = {"grid": [blocks, 1, 1], "block": [128, 1, 1], "registers per thread": 64}
        event = {"name": name, "cat": cat, "ph": "X", "args": given}
        self.trace.append(event | {"ts": self.now, "dur": duration})
        self.now += duration


@pytest.fixture
def stand_in(monkeypatch):
    """A GPU on which the CUDA kernels run at half a copy's speed with 3 us between them, and
    Triton's at a quarter. Its one launch fails."""
    stand_in = Gpu(monkeypatch)

    def calls(case, backend):
        if os.environ.get("SCSE_TRITON_LAUNCHES") == "1":
            raise RuntimeError("deadlock")
        name = "{}_kernel" if backend == "triton" else CUDA
        share = 0.25 if backend == "triton" else 0.5

        def launch(kernel, passes):
            microseconds = passes * case.x_bytes / (share * SPEED) or 2.0
            stand_in.kernel(name.format(kernel), microseconds, gap=3.0, blocks=64)

        def forward():
            suffix = "" if backend == "triton" else "_planes"
            launch(f"squeeze{suffix}", 1)
            launch("excite", 0)
            launch("apply", 2)

        def backward():
            launch("reduce" if backend == "triton" else "reduce_channels_last", 2)
            launch("excite_backward", 0)
            launch("apply_backward", 3 if case.combine == "max" else 2)

        def clone():
            stand_in.kernel("Memcpy DtoD", 2 * case.x_bytes / SPEED, cat="gpu_memcpy")

        return forward, backward, SimpleNamespace(clone=clone)

    monkeypatch.setattr(kernels, "calls", calls)
    monkeypatch.setattr(kernels, "here", lambda: CPU)
    monkeypatch.setattr(kernels.providers, "missing", lambda device: {"cpu": "it is for the CPU"})
    return stand_in


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measured(path):
    status = kernels.main(["--shape", *plan.LEVELS, plan.LARGE, "--output", str(path)])
    return status, rows_of(path)


def test_the_times_of_kernels(stand_in, tmp_path, capsys):
    status, rows = measured(tmp_path / "kernels.csv")
    assert status == 1  # one launch fails
    out = capsys.readouterr().out
    assert "FAILED: one launch, 8x256x16x16" in out and "deadlock" in out
    assert "left out" not in out
    alone = [r for r in rows if r["family"] == "no overlap" and r["shape"] == plan.LARGE]
    first = [row for row in alone if (row["layout"], row["combine"]) == ("contiguous", "max")]
    assert [(r["direction"], r["kernel"], r["passes"]) for r in first] == [
        ("", "copy", "2"),
        ("forward", "squeeze_planes", "1"),
        ("forward", "excite", "0"),
        ("forward", "apply", "2"),
        ("forward", "span", "3"),
        ("backward", "reduce_channels_last", "2"),
        ("backward", "excite_backward", "0"),
        ("backward", "apply_backward", "3"),
        ("backward", "span", "5"),
    ]
    x_bytes = 2 * 256 * 64**3
    copy, squeeze, excite, apply, span = first[:5]
    assert float(copy["us"]) == pytest.approx(2 * x_bytes / SPEED, rel=1e-4)
    assert float(copy["of_copy"]) == 1
    assert float(squeeze["of_copy"]) == float(apply["of_copy"]) == pytest.approx(0.5, rel=1e-4)
    assert float(squeeze["gap"]) == pytest.approx(3) and apply["gap"] == ""
    assert excite["of_copy"] == "" and squeeze["blocks"] == "64" and squeeze["registers"] == "64"
    took = sum(float(row["us"]) for row in (squeeze, excite, apply)) + 2 * 3
    assert float(span["us"]) == pytest.approx(took, rel=1e-4)
    cases = 5 * 2 * 2
    assert {row["family"] for row in rows} == {*kernels.FAMILIES} - {"one launch"}
    assert stand_in.flushes == 4 * cases * kernels._ROUNDS * 3


def test_a_profiler_that_sees_nothing_is_told(stand_in, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "events", lambda trace: [])
    with pytest.raises(FileNotFoundError):
        measured(tmp_path / "kernels.csv")
    assert "it needs CUPTI" in capsys.readouterr().out


def test_a_backend_that_is_missing_costs_no_other_its_times(
    stand_in, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(kernels.providers, "missing", lambda _: {"cpu": "no", "cuda": "not built"})
    families = ["--family", "overlap", "three launches"]
    shape = ["--shape", plan.LARGE, "--output", str(tmp_path / "it.csv")]
    assert kernels.main([*shape, *families]) == 1
    assert {row["backend"] for row in rows_of(tmp_path / "it.csv")} == {"triton"}
    out = capsys.readouterr().out
    assert "cuda is left out: not built" in out and "cpu" not in out


def test_once_is_between_the_profilers_marks(stand_in, monkeypatch):
    marks = []
    for name in ("start", "stop"):
        mark = lambda name=name: marks.append((name, len(stand_in.trace)))  # noqa: E731
        monkeypatch.setattr(torch.cuda.profiler, name, mark)
    assert kernels.main(["--once", "--shape", "2x64x32x32", "--family", "overlap"]) == 0
    assert [name for name, _ in marks] == ["start", "stop"] * 4
    assert [b[1] - a[1] for a, b in zip(marks[::2], marks[1::2], strict=True)] == [6] * 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_calls_run_a_case(layout, monkeypatch):
    case = Case((3, 16, 6, 5), torch.float32, layout, 2, "max", CPU)
    seen = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: seen.append(grad(*a)) or seen[-1])
    forward, backward, x = kernels.calls(case, "eager")
    forward()
    backward()
    assert len(seen) == 2 and next(g.shape for g in seen[0]) == x.shape
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    scale = torch.linspace(0.5, 1.5, 3).view(3, 1, 1, 1)
    torch.testing.assert_close(x / scale, x[1:2].expand(3, -1, -1, -1))


def test_every_kernel_has_its_passes():
    names = []
    for file in (plan.ROOT / "csrc/cuda").rglob("*.cu*"):
        bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
        pattern = rf"__global__ void(?: {bounds})?\s+(\w+)\("
        names += re.findall(pattern, file.read_text())
    assert {"excite", "excite_gates", "reduce_planes", "apply"} < {*names}
    assert "__launch_bounds__" not in names
    source = (plan.ROOT / "scse_kernels/_triton/launch.py").read_text()
    names += re.findall(r"(\w+_kernel), \(", source)
    assert {"squeeze_kernel", "apply_backward_kernel"} < {*names}
    assert [name for name in names if kernels.passes(name, "max") is None] == []
    assert kernels.passes("at::native::reduce_kernel", "add") is None


def test_short_names():
    assert kernels.short("void scse::cuda::apply<float, (scse::Combine)1>(float*)") == "apply"
    hidden = "at::native::(anonymous namespace)::copy_kernel(float const*, int)"
    assert kernels.short(hidden) == "at::native::copy_kernel"
    assert kernels.short("squeeze_kernel") == "squeeze_kernel"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Block Size","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","byte","byte"
"""


def write_ncu(path):
    x_bytes = 2 * 256 * 64**3
    lines = []
    for place in range(8):  # two families
        for name, read, written in (
            (CUDA.format("squeeze_planes"), 1.0 + 0.1 * place, 0.01),
            ("scse::cuda::excite(float const*)", 0.0, 0.0),
            (CUDA.format("apply"), 1.5, 0.75),
        ):
            moved = (f"{int(part * x_bytes):,}" for part in (read, written))
            lines.append(",".join(f'"{field}"' for field in (0, 7, name, "(1, 1, 1)", *moved)))
    path.write_text(NCU + "\n".join(lines) + "\n")


def write_ops(path):
    case = Case((8, 64, 64, 64), torch.float16, "contiguous", 16, "add", CPU)
    milliseconds = {"clone": 1.0, "eager": 6.0, "rewritten": 3.0, "cuda": 1.5, "triton": 2.0}
    found = [
        report.Measurement(
            case,
            "forward",
            way,
            name,
            timing.Timing((1e-3 * value,)),
            2 * case.x_bytes,
            None,
            0.0,
        )
        for way in (timing.WARM, timing.COLD)
        for name, value in milliseconds.items()
    ]
    path.parent.mkdir()
    report.write_csv(path, found, report.environment(CPU))


def write_tune(path):
    fields = ("shape", "dtype", "layout", "combine", "block_c", "block_s", "warps", "tiles")
    fields += ("launches", "own", "step", "way", "median_s")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        case = ("8x64x64x64", "float16", "contiguous", "add")
        for way, own, best in (("warm L2", 40e-6, 32e-6), ("cold L2", 90e-6, 72e-6)):
            writer.writerow((*case, 64, 64, 2, 1, 3, True, 1, way, own))
            writer.writerow((*case, 64, 128, 4, 1, 3, False, 1, way, best))


def test_a_full_pass_and_its_page(stand_in, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "results"
    monkeypatch.setattr(plan, "RESULTS", folder)
    monkeypatch.setattr(plan, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(steps, "LEAST", 0.0)
    monkeypatch.setattr(steps, "GRACE", 0.5)
    folder.mkdir()
    (folder / "old.csv").touch()

    def script(name, code, **how):
        return Step(name, (sys.executable, "-c", code), how.pop("limit", 30.0), **how)

    def device_step(given):
        write = f"open({str(given / 'device.json')!r}, 'w').write({json.dumps(FACTS)!r})"
        return script("device", write)

    def fake_steps(facts, given):
        assert facts == FACTS and given == folder and not (folder / "old.csv").exists()
        measured(folder / "kernels.csv")
        write_ncu(folder / "ncu.csv")
        write_ops(folder / "ops-float16-contiguous" / "ops.csv")
        write_tune(folder / "tune.csv")
        fails = "print('FAILED tests/a.py::test_b - AssertionError'); print('1 failed, 7 passed')"
        return [
            script("self-check", "print('all agree with the float64 reference')"),
            script("tests, cuda", f"{fails}; raise SystemExit(1)"),
            script("tune", "import time; time.sleep(60)", limit=1.0),
            Step("ncu", ("ncu",), 30, needs=("no_such_module",)),
        ]

    monkeypatch.setattr(plan, "device_step", device_step)
    monkeypatch.setattr(plan, "steps", fake_steps)
    assert gpu.run(argparse.Namespace(minutes=9)) == 1
    out = capsys.readouterr().out
    text = (folder / "page.md").read_text()
    assert text in out and "tests, cuda: FAILED (exit status 1), " in out
    assert text.startswith("# NVIDIA H100 80GB HBM3, 9.0\n")
    assert "torch 2.11.0+cu130, CUDA 13.0, Triton 3.6.0, Python 3.12.3; commit abc123" in text
    assert "not installed: nilearn, ncu" in text
    assert "reads and writes 3.00 TB/s" in text
    cells = {
        "| self-check | passed | 0 | all agree with the float64 reference |",
        "| tests, cuda | FAILED | 0 | 1 failed, 7 passed |",
        "Left out: ncu (no_such_module not installed).",
        # the kernels of the large map, and whole calls
        "| cuda | no overlap | apply_backward | 2 / 3 |"
        " 179.0 us, 50% | 268.4 us, 50% | 179.0 us, 50% | 268.4 us, 50% |",
        "| triton | three launches, no overlap | reduce_kernel | 2 | 357.9 us, 25% |",
        "| 8x128x32x32 | backward | 22% | 22% | 15% |",
        # counted passes
        "| squeeze | 1 | 1.40 + 0.01 | 1.50 + 0.01 | 1.60 + 0.01 | 1.70 + 0.01 |",
        "| apply | 2 | 1.50 + 0.75 | 1.50 + 0.75 | 1.50 + 0.75 | 1.50 + 0.75 |",
        # backends.py
        "| 256x64x64x64 | 1.98 | 1.97 | 1.98 |",
        # heuristics.py
        "| 8x64x64x64, float16, contiguous, add | 64 64 2 1 3 | 64 128 4 1 3 | 1.25 |",
        "| float16 | contiguous | add | forward | 4.00 |  | 2.00 | 0.67 | 3.00 |  | 1.50 | 0.50 |",
    }
    assert [cell for cell in cells if cell not in text] == []
    # Kernels that overlap are not timed one by one.
    assert not re.search(r"\| (cuda \| overlap|triton \| three launches) \| \w+ \| [12]", text)
    assert re.search(r"\| tune \| TIMED OUT \| [1-9] \|", text)
    failed = text[text.index("## What failed") : text.index("## Kernels")]
    assert "FAILED tests/a.py::test_b - AssertionError" in failed and "tests-cuda.txt" in failed


def test_deep_levels(stand_in, tmp_path):
    deep = ["--reduction", "2", "--combine", "add", "--layout", "contiguous"]
    families = ["--family", "no overlap", "three launches"]
    path = tmp_path / "deep.csv"
    shapes = ["--shape", "8x128x16x16", "8x512x16x16"]
    assert kernels.main([*shapes, *deep, *families, "--output", str(path)]) == 0
    rows = rows_of(path)
    assert {row["reduction"] for row in rows} == {"2"}
    lines = [line for line in figures.deep(rows).splitlines() if line.startswith("| 8x")]
    squeeze, apply = (passes * 8 * 512 * 16 * 16 * 2 / (0.5 * SPEED) for passes in (1, 2))
    span = squeeze + 2 + apply + 6
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 8x128x16x16", "contiguous", "no overlap"],
        ["| 8x512x16x16", "contiguous", "no overlap"],
        ["| 8x128x16x16", "contiguous", "three launches"],
        ["| 8x512x16x16", "contiguous", "three launches"],
    ]
    forward = lines[1].split(" | ")[3]
    assert forward == f"squeeze {squeeze:.1f}, excite 2.0, apply {apply:.1f}, **{span:.1f}**"


def test_a_page_of_nothing(tmp_path):
    text = page.text(FACTS, [], tmp_path, 60.0)
    assert text.count("Not measured.") == 3 and "Not tuned." in text
    assert "Not measured with both." in text
    assert "Not counted by ncu" in text and "Nothing failed." in text


def test_a_part_that_cannot_be_read_does_not_cost_the_page(tmp_path):
    (tmp_path / "tune.csv").write_text("shape,dtype\n8x64x64x64,float16\n")
    text = page.text(FACTS, [], tmp_path, 60.0)
    assert "This part could not be written: KeyError: 'layout'" in text
    assert text.count("Not measured.") == 3


def test_a_call_that_failed_under_ncu_is_told(tmp_path):
    write_ncu(tmp_path / "ncu.csv")
    assert "mixed up" not in page.text(FACTS, [], tmp_path, 60.0)
    (tmp_path / "ncu.txt").write_text("$ ncu\nFAILED: overlap, 256x64x64x64\n")
    assert "A call failed (ncu.txt): columns may be mixed up." in page.text(FACTS, [], tmp_path, 60)


def test_first_lines(tmp_path):
    file = tmp_path / "it.txt"
    file.write_text("$ python -c error\n" + "fine\n" * 20 + "\nWRONG here\n" + "E   x\n" * 9)
    assert page.first_lines(file) == ["WRONG here", *["E   x"] * 5]
    said = ["torch.OutOfMemoryError: too much", "a.cu(7): error: no", "========= Invalid read"]
    said += ["========= Error: Potential RAW hazard"]
    file.write_text("\n".join(["$ x", "Traceback", "  if error := wrong():", *said, "last"]))
    assert page.first_lines(file) == said
    file.write_text("$ x\n" + "".join(f"line {i}\n" for i in range(9)))
    assert page.first_lines(file) == [f"line {i}" for i in range(3, 9)]


def test_what_is_compiled_ahead(monkeypatch):
    todo = list(ahead.tasks())
    assert len({*todo}) == len(todo)
    functions = [function for function, _ in todo]
    first = functions.count("check")  # the self-check runs first
    assert functions[:first] == ["check"] * first
    names = [arguments[0] for function, arguments in todo if function == "provider"]
    assert {*names} == {"triton", "compile", "rewritten"} and names[0] == "triton"
    seen = []
    monkeypatch.setattr(kernels, "calls", lambda case, name: seen.append((case, name)))
    assert ahead.run(todo[-1]) is None
    case, name = seen[0]
    assert name == "rewritten" and case.shape == (8, 32, 128, 128) and case.combine == "max"

    def overlaps(case, name):
        settings.append((case.shape, name, os.environ["SCSE_TRITON_OVERLAP"]))

    settings = []
    monkeypatch.setattr(kernels, "calls", overlaps)
    assert not any(ahead.run(task) for task in todo if task[0] == "timed")
    shapes = (*plan.LEVELS, plan.LARGE, *plan.DEEP)
    assert len(settings) == 8 * (len(plan.LEVELS) + 1) + 4 * len(plan.DEEP)
    assert {*settings} == {
        (shape, "triton", overlap) for shape in map(options.shape, shapes) for overlap in ("0", "1")
    }

    def broken(case, name):
        raise ValueError("no")

    monkeypatch.setattr(kernels, "calls", broken)
    assert ahead.run(todo[-1]).endswith("ValueError: no")
