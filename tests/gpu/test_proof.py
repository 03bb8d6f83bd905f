"""The table at the end of `make gpu-proof`: nothing is left out of it in silence."""

import pytest
from gpu import proof


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a proof is asked for, whatever this run was asked for."""
    monkeypatch.setenv(proof.VARIABLE, str(tmp_path))
    return tmp_path


def test_records_of_several_processes_are_one_row(folder, monkeypatch, capsys):
    for process, error, passes in ((1, 0.25, 2.0), (2, 0.5, None), (3, None, 3.04)):
        monkeypatch.setattr("os.getpid", lambda process=process: process)
        proof.record("triton", "squeeze_kernel", 90, launches=2, error=error, passes=passes)
        proof.record("triton", "squeeze_kernel", 80)
    monkeypatch.setattr(proof, "EXPECTED", {"triton": ("squeeze_kernel",)})
    assert proof.main(str(folder)) == 0
    header, eighty, ninety = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["compiler", "kernel", "arch", "launches"]
    assert eighty.split() == ["triton", "squeeze_kernel", "sm_80", "3"]
    assert " ".join(ninety.split()) == "triton squeeze_kernel sm_90 6 0.50 2.00 to 3.04"


def test_a_kernel_that_did_not_run_fails(folder, capsys):
    proof.record("triton", "squeeze_kernel", 90)
    assert proof.main(str(folder)) == 1
    missing = capsys.readouterr().err.splitlines()
    assert "not executed: triton: reduce_kernel" in missing
    assert "not executed: triton: squeeze_kernel" not in missing


def test_what_cannot_run_is_skipped_or_in_a_proof_fails(folder, monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="no compiler"):
        proof.unavailable("no compiler")
    monkeypatch.delenv(proof.VARIABLE)
    with pytest.raises(pytest.skip.Exception, match="no compiler"):
        proof.unavailable("no compiler")
    proof.record("triton", "squeeze_kernel", 90)
    assert not list(folder.iterdir())
