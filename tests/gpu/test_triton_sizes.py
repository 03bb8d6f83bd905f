"""Images of many sizes: how many kernels Triton compiles for them (tests/gpu/triton_sizes.py)."""

import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)

from gpu import triton_sizes  # noqa: E402

DOCUMENT = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


@pytest.mark.parametrize("layout", triton_sizes.LAYOUTS)
def test_images_of_many_sizes_compile_few_kernels(layout):
    """In channels_last they are compiled, not only counted."""
    kernels, _ = triton_sizes.count(layout, really=layout == "channels_last")
    line = triton_sizes.row(layout, kernels)
    assert line in DOCUMENT, f"docs/gpu.md lacks: {line}"
    if layout == "channels_last":
        assert kernels[-1] <= 48
