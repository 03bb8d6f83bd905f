"""The cluster's barrier, arrive and wait apart."""

from functools import partial

import gpulab
import pytest


@pytest.mark.parametrize("arrive", ("barrier.cluster.arrive;", ""))
def test_who_waits_has_arrived(arrive):
    ptx = f"""
.version 8.4
.target sm_90
.address_size 64
.visible .entry k()
{{
  {arrive}
  barrier.cluster.wait;
  ret;
}}
"""
    launch = partial(gpulab.Module(ptx).launch, "k", 4, 64, [], cluster=(2, 1, 1), resident_ctas=4)
    if arrive:
        launch()
    else:
        with pytest.raises(gpulab.KernelFault, match="which has not arrived"):
            launch()
