"""`python -m bench gpu`: its steps, as far as they go without a device."""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

gpu = pytest.importorskip("bench.gpu", reason="only a checkout has bench")

from bench.__main__ import _parser  # noqa: E402
from bench.gpu import facts, kernels, plan, steps  # noqa: E402
from bench.gpu.steps import FAILED, LEFT_OUT, PASSED, TIMED_OUT, Step  # noqa: E402

FACTS = {
    "device": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "multiprocessors": 132,
    "memory": 80 << 30,
    "l2": 50 << 20,
    "driver": "580.1",
    "cores": 16,
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "triton": "3.6.0",
    "commit": "abc123",
    "modules": dict.fromkeys(facts.MODULES, True) | {"nilearn": False},
    "tools": dict.fromkeys(facts.TOOLS, "/usr/bin/it") | {"ncu": None},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: runs steps with little patience; returns their results by name."""
    monkeypatch.setattr(steps, "LEAST", 0.0)
    monkeypatch.setattr(steps, "GRACE", 1.0)

    def run(*some, seconds=300.0):
        told = []
        results = steps.run(some, tmp_path, seconds, dict(os.environ), told.append)
        assert told == results
        return {result.name: result for result in results}

    return run


def script(name, code, limit=90.0, **how):
    return Step(name, (sys.executable, "-c", code), limit, **how)


def gone(pid):
    """Whether a process has ended; one that nobody has waited for yet has."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def soon(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_step_that_fails_does_not_stop_the_next(run, tmp_path):
    results = run(
        script("first one, bad", "print('so far'); raise ValueError('boom')"),
        script("second", "import os; print(os.environ['TOLD'])", environment={"TOLD": "yes"}),
    )
    bad, good = results["first one, bad"], results["second"]
    assert (bad.state, bad.detail) == (FAILED, "exit status 1")
    output = (tmp_path / "first-one-bad.txt").read_text()
    assert bad.output == "first-one-bad.txt"
    assert output.startswith(f"$ {sys.executable} -c ")
    assert "so far" in output and "ValueError: boom" in output
    assert good.state == PASSED and (tmp_path / good.output).read_text().endswith("yes\n")


# The child ignores what its parent heeds.
CHILD = """
import signal, subprocess, sys, time
ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
ignore += "print('on', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE)
child.stdout.readline()
print("child", child.pid, flush=True)
"""


def test_a_step_that_takes_too_long_ends_with_its_children_and_says_what_it_has(run, tmp_path):
    signals = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    wait = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('summary')\n"
    start = time.monotonic()
    result = run(script("slow", signals + CHILD + wait, limit=8.0))["slow"]
    assert time.monotonic() - start < 50  # it would sleep for 60
    assert result.state == TIMED_OUT and re.fullmatch(r"stopped after \d+ s", result.detail)
    output = (tmp_path / "slow.txt").read_text()
    assert output.endswith("summary\n")
    assert soon(lambda: gone(re.search(r"child (\d+)", output)[1]))


def test_a_step_that_does_not_heed_ctrl_c_is_killed(run):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert run(script("stubborn", stubborn, limit=1.0))["stubborn"].state == TIMED_OUT
    assert time.monotonic() - start < 50  # it would sleep for 60


def test_children_that_a_step_leaves_behind_are_ended(run, tmp_path):
    assert run(script("parent", CHILD))["parent"].state == PASSED
    pid = re.search(r"child (\d+)", (tmp_path / "parent.txt").read_text())[1]
    assert soon(lambda: gone(pid))


def test_what_is_missing_is_said(run):
    results = run(
        Step("tool", ("compute-sanitizer",), 5, needs=("compute-sanitizer",)),
        Step("module", ("none",), 5, needs=("no_such_module", "ncu", "json")),
        script("last", "pass"),
    )
    assert results["tool"].state == LEFT_OUT
    assert results["tool"].detail == "compute-sanitizer not installed"
    assert results["module"].detail == "no_such_module and ncu not installed"
    assert results["last"].state == PASSED


def test_the_time_for_all_shortens_and_leaves_out_the_last(run, monkeypatch):
    monkeypatch.setattr(steps, "LEAST", 2.0)
    wait = "import time; time.sleep(60)"
    results = run(script("a", wait), script("b", wait), seconds=4.5)
    assert results["a"].state == TIMED_OUT and results["a"].seconds < 50
    assert (results["b"].state, results["b"].detail) == (LEFT_OUT, "no time was left")


def test_a_step_beside_the_next_ends_before_the_one_after(run, tmp_path):
    meet = "import pathlib, time\nfor _ in range(1200):\n    time.sleep(.05)\n"
    file = f"pathlib.Path({str(tmp_path / 'met')!r})"
    results = run(
        script("beside", meet + f"    if {file}.exists(): break\nelse: raise SystemExit(1)\n"
               f"{file}.with_name('done').touch()", beside=True),
        script("next", f"import pathlib; {file}.touch()"),
        script("after", f"import pathlib; assert {file}.with_name('done').exists()"),
    )  # fmt: skip
    assert {name: result.state for name, result in results.items()} == {
        "next": PASSED,
        "beside": PASSED,
        "after": PASSED,
    }


def test_a_last_step_beside_has_its_time(run):
    assert run(script("only", "import time; time.sleep(1)", beside=True))["only"].state == PASSED


def test_ctrl_c_ends_what_runs_and_keeps_what_was_found(run, monkeypatch, tmp_path):
    def interrupt(running, stop=False, finish=steps._Running.finish):
        if running.step.name == "now":
            wait = running.process.wait

            def raise_once(*seconds):
                running.process.wait = wait
                raise KeyboardInterrupt

            running.process.wait = raise_once
        return finish(running, stop)

    monkeypatch.setattr(steps._Running, "finish", interrupt)
    results = run(
        script("before", "pass"),
        script("beside", "import time; time.sleep(60)", beside=True),
        script("now", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"),
        script("never", "pass"),
    )
    assert results["before"].state == PASSED and results["beside"].state == TIMED_OUT
    assert {*results} == {"before", "beside"}
    pid = (tmp_path / "now.txt").read_text().split()[-1]
    assert not pid.isdigit() or gone(pid)


def test_everything_is_written_in_the_checkout(tmp_path):
    given = {
        "PATH": "/usr/bin",
        "SCSE_TUNING": "/home/me/t.json",
        "TRITON_INTERPRET": "1",
        "A": "b",
    }
    given |= {"TRITON_CACHE_DIR": "/scratch", "HOME": "/home/me"}
    told = plan.environment(given, tmp_path)
    assert "SCSE_TUNING" not in told and "TRITON_INTERPRET" not in told and told["A"] == "b"
    folders = [name for name in told if name.endswith(("_DIR", "HOME", "TMPDIR", "_PATH"))]
    assert {"HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} < {*folders}
    for name in {*folders} | {"MPLCONFIGDIR", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"}:
        assert Path(told[name]).is_dir() and Path(told[name]).is_relative_to(tmp_path), name
    assert told["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert plan.CACHE.is_relative_to(plan.ROOT) and plan.RESULTS.is_relative_to(plan.ROOT)


@pytest.fixture
def planned(tmp_path):
    return {step.name: step for step in plan.steps(FACTS, tmp_path)}


def test_the_most_valuable_come_first(planned):
    names = list(planned)
    assert names[:3] == ["build", "compile ahead", "self-check"]
    order = ["tests, cuda", "kernels", "deep levels", "model", "ops, float16, contiguous"]
    order += ["ncu", "tune"]
    assert [name for name in names if name in order] == order
    assert {"memcheck", "racecheck", "tests, triton", "ops, float32, contiguous"} < {*names}
    assert len(names) == len({*names})
    assert planned["build"].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert planned["build"].limit <= 240
    assert planned["compile ahead"].command[-2:] == ("--jobs", "14")  # two cores stay free


@pytest.mark.parametrize("cores, memory, jobs", [(1, 80 << 30, "1"), (16, 8 << 30, "4")])
def test_processes_that_use_the_gpu_fit_it(cores, memory, jobs, tmp_path):
    small = {
        step.name: step
        for step in plan.steps({**FACTS, "cores": cores, "memory": memory}, tmp_path)
    }
    assert small["compile ahead"].command[-1] == jobs
    # The tests run beside each other.
    tests = [step.command for name, step in small.items() if name.startswith("tests")]
    shares = [int(command[command.index("-n") + 1]) for command in tests]
    assert len(shares) == 4 and sum(shares) <= max(4, int(jobs))


def test_each_benchmark_knows_its_options(planned, tmp_path):
    seen = set()
    for step in planned.values():
        if step.command[1:3] == ("-m", "bench"):
            args = _parser([step.command[3]]).parse_args(step.command[3:])
            assert args.output.is_relative_to(tmp_path) or step.name == "model"
            seen.add(step.command[3])
    assert seen == {"ops", "tune", "model"}


def test_the_tests_that_are_run_are_there(planned):
    for name in ("tests, cuda", "tests, triton", "tests, batch norm"):
        files = [word for word in planned[name].command if word.startswith("tests/")]
        assert files and all((plan.ROOT / file).exists() for file in files)
        assert planned[name].needs == ("pytest",)
        assert "xdist.plugin" in planned[name].command
    without = dict(FACTS, modules=FACTS["modules"] | {"xdist": False})
    alone = {step.name: step.command for step in plan.steps(without, plan.RESULTS)}
    assert "-n" not in alone["tests, cuda"] and "xdist.plugin" not in alone["tests, cuda"]


def test_every_tool_calls_each_kernel_once(planned):
    for name in ("ncu", "memcheck", "racecheck"):
        command = list(planned[name].command)
        assert planned[name].needs == (command[0],)
        at = command.index("bench.gpu.kernels")
        assert command[at - 2] == sys.executable
        families = command[command.index("--family") + 1 :]
        assert {kernels.FAMILIES[family].backend for family in families} == {"cuda", "triton"}
        assert {"overlap", "three launches", "one launch"} == {*families}
    deep = planned["deep levels"].command
    families = deep[deep.index("--family") + 1 : deep.index("--output")]
    assert families == (
        *("overlap", "no overlap"),
        *("three launches", "three launches, no overlap"),
    )
    command = planned["ncu"].command
    assert command[command.index("--clock-control") + 1] == "none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plan, "CACHE", tmp_path / "cache")
    assert gpu.run(argparse.Namespace(minutes=9)) == 2
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("make gpu: torch finds no GPU that it can use; device.txt in ")
    assert "CUDA" in line or "NVIDIA" in line
    assert not (tmp_path / "results" / "device.json").exists()


def test_facts_of_a_device(monkeypatch):
    class Device:
        name, major, minor = "GPU", 9, 0
        multi_processor_count, total_memory, L2_cache_size = 132, 80 << 30, 50 << 20

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    found = json.loads(json.dumps(facts.facts()))
    assert found.keys() == FACTS.keys()
    assert found["capability"] == "9.0" and found["modules"]["pytest"] is True
    assert found["tools"]["ncu"] is None or found["tools"]["ncu"].endswith("ncu")
