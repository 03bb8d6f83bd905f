"""Run one or a few PTX instructions over arrays: each thread loads its inputs, computes, stores."""

import gpulab
import numpy as np

SIZES = {"b16": 2, "b32": 4, "b64": 8, "pred": 1}


def run(code, inputs, out_type, out_dtype, declare="", arch="sm_90"):
    """``code`` uses %a, %b, %c (inputs in order) and must set %d.  Inputs: list of numpy arrays."""
    n = len(inputs[0])
    names = "abc"[: len(inputs)]
    params = ", ".join(f".param .u64 p{i}" for i in range(len(inputs) + 1))
    lines = []
    for i, (name, x) in enumerate(zip(names, inputs, strict=False)):
        bits = f"b{8 * x.itemsize}"
        lines += [
            f".reg .{bits} %{name};",
            f".reg .b64 %p{name};",
            f"ld.param.u64 %p{name}, [p{i}];",
            f"mad.wide.u32 %p{name}, %tid, {x.itemsize}, %p{name};",
            f"ld.global.{bits} %{name}, [%p{name}];",
        ]
    size = SIZES[out_type]
    out = np.zeros(n, f"u{size}")
    ptx = f"""
.version 8.4
.target {arch}
.address_size 64
.visible .entry k({params})
{{
  .reg .b32 %tid; .reg .b64 %pd; .reg .{out_type} %d; {declare}
  mov.u32 %tid, %tid.x;
  {" ".join(lines)}
  {code}
  ld.param.u64 %pd, [p{len(inputs)}];
  mad.wide.u32 %pd, %tid, {size}, %pd;
  st.global.{out_type} [%pd], %d;
  ret;
}}
"""
    gpulab.Module(ptx).launch("k", 1, n, [*list(inputs), out], resident_ctas=1)
    return out.view(out_dtype)
