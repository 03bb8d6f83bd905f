"""Compile @triton.jit functions offline and launch them on the simulator."""

import functools

import numpy as np

from .devices import A100, H100
from .errors import GpuLabError
from .module import Module, is_array

_POINTERS = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float64": "*fp64",
    "int8": "*i8",
    "int16": "*i16",
    "int32": "*i32",
    "int64": "*i64",
    "uint8": "*u8",
    "uint16": "*u16",
    "uint32": "*u32",
    "uint64": "*u64",
    "bool": "*i1",
}
_compiled = {}


def _pointer_type(array):
    if getattr(array, "gpulab_bf16", False):
        return "*bf16"
    name = str(array.dtype).replace("torch.", "")
    if name not in _POINTERS:
        raise GpuLabError(f"no Triton pointer type for {array.dtype}")
    return _POINTERS[name]


def _device_alignment(array):
    """Offset of the pointer from its allocation (allocations are 256-byte aligned)."""
    from .memory import HostBuffer

    b = HostBuffer(array, "")
    return (b.phase + b.pointer - b.low) % 256


def specialise(name, value):
    """(signature type, is divisible by 16) as Triton's own JIT would choose them."""
    if is_array(value):
        return _pointer_type(value), _device_alignment(value) % 16 == 0
    if value is None:
        return "constexpr", False
    if isinstance(value, (bool, np.bool_)):
        return "u1", False
    if isinstance(value, (int, np.integer)):
        if int(value) == 1:
            return "constexpr", False
        kind = "i32" if -(2**31) <= int(value) < 2**31 else ("i64" if int(value) < 2**63 else "u64")
        return kind, int(value) % 16 == 0
    if isinstance(value, (float, np.floating)):
        return "fp32", False
    raise GpuLabError(f"argument {name}: cannot pass {type(value).__name__} to a Triton kernel")


def triton_compile(fn, args, constexprs, target=90, **options):
    """Compile a @triton.jit function for these arguments; returns (compiled kernel, runtime
    arguments)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    jit = fn
    while not hasattr(jit, "arg_names"):  # autotune / heuristics wrappers
        jit = jit.fn
    names = jit.arg_names
    values = dict(zip(names, args, strict=False))
    for key, value in constexprs.items():
        if key not in names:
            raise GpuLabError(f"{key!r} is not an argument of {jit.__name__}")
        values[key] = value
    signature, constants, attrs, runtime = {}, {}, {}, []
    for i, p in enumerate(jit.params):
        if p.name not in values:
            if p.has_default:
                values[p.name] = p.default
            else:
                raise GpuLabError(f"argument {p.name} of {jit.__name__} is missing")
        value = values[p.name]
        kind, divisible = ("constexpr", False) if p.is_constexpr else specialise(p.name, value)
        if (
            not p.is_constexpr
            and kind == "constexpr"
            and value is not None
            and getattr(p, "do_not_specialize", False)
        ):
            kind = "i32"
        signature[p.name] = kind
        if kind == "constexpr":
            constants[p.name] = value
        else:
            runtime.append(value)
            if divisible and not getattr(p, "do_not_specialize", False):
                attrs[(i,)] = [["tt.divisibility", 16]]
    key = (
        id(jit),
        tuple(signature.items()),
        repr(sorted(constants.items(), key=str)),
        tuple(attrs),
        target,
        tuple(sorted(options.items())),
    )
    if key not in _compiled:
        source = ASTSource(fn=jit, signature=signature, constexprs=constants, attrs=attrs)
        _compiled[key] = (
            triton.compile(source, target=GPUTarget("cuda", target, 32), options=options),
            jit,
        )
    return _compiled[key][0], runtime


def module_of(compiled):
    return _module(compiled.asm["ptx"])


@functools.lru_cache(200)  # megabytes each, and a process may run thousands
def _module(ptx):
    return Module(ptx)


def triton_launch(
    kernel,
    grid,
    *args,
    target=90,
    num_warps=4,
    num_stages=3,
    num_ctas=1,
    maxnreg=None,
    device=None,
    launch_options=None,
    latency=False,
    **constexprs,
):
    """Compile (if needed) and run a Triton kernel; returns the Report.

    ``kernel`` is a @triton.jit function or the result of ``triton.compile`` (then pass the
    runtime arguments only).  ``grid`` is a tuple or a function of the constexprs.
    ``launch_options``: keyword arguments for ``Module.launch`` (seed, l2, resident_ctas,
    checks, deadlock_rounds, overlap).  ``latency``: also compute the critical path.
    """
    options = {"latency": latency, **(launch_options or {})}
    if hasattr(kernel, "asm"):
        compiled, runtime = kernel, list(args)
    else:
        extra = {"maxnreg": maxnreg} if maxnreg else {}
        compiled, runtime = triton_compile(
            kernel,
            args,
            constexprs,
            target,
            num_warps=num_warps,
            num_stages=num_stages,
            num_ctas=num_ctas,
            **extra,
        )
    if callable(grid):
        grid = grid(constexprs)
    meta = compiled.metadata
    module = module_of(compiled)
    info = module.kernels[meta.name]
    warps, ctas = meta.num_warps, getattr(meta, "num_ctas", 1)
    grid = tuple(grid) + (1,) * (3 - len(tuple(grid)))
    total = int(np.prod(grid)) * ctas
    hidden = len(info.params) - len(runtime)  # scratch pointers appended by Triton
    scratch = [
        np.zeros(max(16, size * total), np.uint8) if size else None
        for size in (
            getattr(meta, "global_scratch_size", 0),
            getattr(meta, "profile_scratch_size", 0),
        )
    ]
    if not 0 <= hidden <= len(scratch):
        raise GpuLabError(
            f"{meta.name} takes {len(info.params)} PTX parameters, {len(runtime)} arguments were "
            "given"
        )
    if device is None:
        device = A100 if meta.target.arch < 90 else H100
    cluster = (ctas, 1, 1) if ctas > 1 else None
    block = info.reqntid or (32 * warps, 1, 1)
    return module.launch(
        meta.name,
        (grid[0] * ctas, grid[1], grid[2]),
        block,
        runtime + scratch[:hidden],
        shared_bytes=meta.shared,
        cluster=cluster,
        device=device,
        **options,
    )
