"""Fixtures of the tests of convert."""

import pytest
import torch.distributed as dist


@pytest.fixture
def process_group(tmp_path):
    """torch.distributed in this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
