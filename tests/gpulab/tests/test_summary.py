"""The summary table."""

import gpulab
import host_code as host
import pytest
import torch


def cells(text):
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]


def test_rows_and_totals(capsys):
    x, y = torch.randn(1 << 16), torch.randn(1 << 16)
    with gpulab.intercept(device=gpulab.H100.scaled(l2_bytes=1 << 16)) as lab:
        z = host.add(x, y)
        host.total(z)
    gpulab.summary(lab, tensor_bytes=x.nbytes)
    first, second, third, total = cells(capsys.readouterr().out)
    assert first["kernel"] == "0 _add" and first["grid"] == "64x1x1" and first["warps"] == "4"
    assert (
        first["ld 16B"] == first["st 16B"] == "100%"
        and first["ld eff"] == "100%"
        and first["read T"] == "2.000"
    )
    assert (
        float(second["read T"]) >= 0.75
        and third["kernel"] == "2 _total"
        and first["binds"] == "dram"
    )
    assert total["kernel"] == "total of 3"
    assert float(total["write T"]) == pytest.approx(lab.dram_write_bytes / x.nbytes, abs=1e-3)
    assert float(total["read T"]) == pytest.approx(lab.dram_read_bytes / x.nbytes, abs=1e-3)


def test_lists_and_single_reports():
    x = torch.randn(4096)
    with gpulab.intercept() as lab:
        host.add(x, x)
    assert cells(gpulab.summary_text(lab.reports)) == cells(gpulab.summary_text(lab))
    assert cells(gpulab.summary_text(lab.reports[0]))[0]["write MB"] == "0.000"
    assert (
        cells(gpulab.summary_text(lab))[-1]["write MB"] == "0.016"
        and gpulab.summary_text([]) == "no launches"
    )
