"""The same answers from every instruction set that this machine has, and from Triton's interpreter.
Each runs in a process of its own: they are chosen when the package or Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from budget import check
from norm_budget import make_case
from targets import Target

from scse_kernels import _native

FILE = Path(__file__)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _pytest(environment, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(_native.why_not("_C") is not None, reason="no compiled extension")
def test_every_instruction_set(capability):
    _pytest(
        {"SCSE_CPU_CAPABILITY": capability},
        FILE.with_name("test_norm_correctness.py"),
        *("-k", "cpu-cpu and (tail or 3x8x67x71)"),
    )


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1")
def test_the_interpreter_in_a_process_of_its_own():
    pytest.importorskip("triton")
    _pytest({"TRITON_INTERPRET": "1"}, FILE, "-k", "interpreted")


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("variant", ("add", "max", "sse"))
def test_interpreted(variant, training):
    check(make_case((2, 5, 3, 7), variant, training=training), Target("triton", "cpu"))
