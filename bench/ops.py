"""Microbenchmark: one scSE block, or BatchNorm, ReLU and scSE, forward and forward + backward.

Every round times every provider once, in an order that rotates:

  clone      x.clone(), what copying x costs; its bandwidth is the yardstick
  eager      the module that people have: segmentation_models.pytorch's form for add, mul and
             concat, ai-med's for max
  compile    torch.compile of it
  rewritten  the same mathematics rewritten so that Inductor fuses it best, compiled
  unfused    with --block bn_relu_scse: torch's BatchNorm and ReLU, then scse_kernels' module
  ...        every backend of scse_kernels that runs on the device; `reference`, its eager
             operations, only if --providers names it

A provider that disagrees with the float64 reference is not timed, and the exit status is 1.
Bandwidth is the least bytes that any kernel must move (forward reads x, writes y; backward reads x
and dy, writes dx) over the median time, for every provider alike. Forward is in training mode;
backward gives the gradients of x and of all parameters. Peak memory is that of forward + backward
beyond x, y, dy and dx, in units of x. On a GPU everything is timed with a warm and a flushed L2,
without the time in which the GPU waits for the host, which is a column of its own; maps up to
16 MiB, where launches weigh most, also as CUDA graphs (with a warm L2).
Written: ops.csv, ops.png.

--sweep times something else: forward + backward from 2**12 to 2**27 elements, microseconds against
size, for clone, eager, rewritten and scse_kernels; and 2**31 elements of float16 once, where 9 GB
of memory are free. Written: sweep.csv, sweep.md, sweep.png.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scse_kernels import batch_norm, reference

from . import memory, options, providers, report, timing
from .cases import LAYOUTS, SHAPES, Case, Inputs
from .report import Measurement

#: Bytes of x up to which CUDA graphs are timed: one pass takes 5 us or less at 3.35 TB/s, and a
#: kernel's launch takes as long.
_LAUNCH_BOUND = 16 << 20
DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Largest relative error (norm of the difference over the norm) of the output and of each gradient.
#: Wide enough for TF32 convolutions and for gates in half precision; a wrong kernel is off by far
#: more. Not the largest single error: near a tie of the maximum, one rounding moves a share of dy
#: from one branch to the other, in everybody's gradients.
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench ops`."""
    parser.add_argument(
        "--shape",
        type=options.shape,
        nargs="+",
        action=options.Several,
        default=SHAPES,
        help="such as 8x64x64x64 1x32x48x48x48",
    )
    parser.add_argument(
        "--block",
        choices=tuple(providers.BLOCKS),
        default="scse",
        help="bn_relu_scse: BatchNorm and ReLU before it, in every provider (%(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="%(default)s")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="contiguous",
        help="%(default)s",
    )
    parser.add_argument(
        "--reduction",
        type=options.positive,
        nargs="+",
        action=options.Several,
        help="default: 16 2",
    )
    parser.add_argument(
        "--combine",
        nargs="+",
        action=options.Several,
        choices=("add", "max", "mul", "concat"),
        help="default: add max",
    )
    parser.add_argument(
        "--providers", nargs="+", action=options.Several, help="default: all that can run"
    )
    parser.add_argument("--rounds", type=options.positive, help="default: 15")
    parser.add_argument(
        "--quick", action="store_true", help="unless given: reduction 16, add, 7 rounds"
    )
    parser.add_argument(
        "--without-compile",
        action="store_true",
        help="leave out the providers that torch.compile makes",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="time against size, without --shape; one reduction (16) and combine (add)",
    )


def run(args: argparse.Namespace) -> int:
    """Time every provider on every case; returns 1 if one was wrong."""
    if args.layout == "channels_last" and any(len(shape) < 4 for shape in args.shape):
        raise SystemExit("channels_last needs two or three spatial axes")
    competitors = providers.competitors(args.block)
    known = [*competitors, *providers.usable(args.device, args.block)]
    chosen = args.providers or [
        *(("eager", "rewritten") if args.sweep else competitors),
        *providers.fused(args.device, "`--providers eager reference`", block=args.block),
    ]
    for name in chosen:
        if name not in (*known, "reference"):
            reason = providers.missing(args.device).get(name, f"known: {', '.join(known)}")
            raise SystemExit(f"provider {name}: {reason}")
    chosen = [
        name
        for name in dict.fromkeys(chosen)
        if not (args.without_compile and name in providers.COMPILED)
    ]
    if args.sweep:
        return _sweep(args, chosen)
    fused = [name for name in chosen if name not in providers.COMPETITORS]
    reductions = args.reduction or ([16] if args.quick else [16, 2])
    combines = args.combine or (["add"] if args.quick else ["add", "max"])
    rounds = args.rounds or (7 if args.quick else 15)
    dtype = getattr(torch, args.dtype)
    cases = [
        Case(shape, dtype, args.layout, reduction, combine, args.device, args.block)
        for combine in combines
        for reduction in reductions
        for shape in args.shape
    ]
    for case in cases:
        if case.shape[1] < case.reduction:
            raise SystemExit(f"{case}: no hidden channel is left")

    environment = report.environment(args.device)
    report.print_header(environment, providers.missing(args.device))
    report.console.print(report.LEGEND)
    measurements: list[Measurement] = []
    wrong = []
    with report.progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:

            def tell(stage: str, case: Case = case) -> None:
                progress.update(task, description=f"{case}: {stage}")

            found, errors = _measure(case, chosen, rounds, tell)
            measurements += found
            wrong += errors
            report.print_case(case, found)
            for error in errors:
                report.console.print(f"[red]not timed: {error}")
            report.write_csv(args.output / "ops.csv", measurements, environment)
            progress.advance(task)
    report.print_summary(measurements, fused)
    written = [args.output / "ops.csv"]
    try:
        report.plot(args.output / "ops.png", measurements, environment)
        written.append(args.output / "ops.png")
    except ImportError as error:
        report.console.print(f"[yellow]no plot: {error}")
    report.console.print(f"Written: {', '.join(map(str, written))}")
    return 1 if wrong else 0


def _sweep(args: argparse.Namespace, names: list[str]) -> int:
    from . import sweep  # it computes and checks by the functions below

    reductions, combines = args.reduction or [16], args.combine or ["add"]
    if args.shape is not SHAPES or args.block != "scse" or len(reductions) + len(combines) > 2:
        raise SystemExit("--sweep takes one reduction and combine, no --shape, no --block")
    return sweep.run(args, names, reductions[0], combines[0])


def _measure(
    case: Case, names: list[str], rounds: int, tell: Callable[[str], None]
) -> tuple[list[Measurement], list[str]]:
    """Check and time the providers on one case; returns measurements and what was wrong."""
    torch._dynamo.reset()  # nothing compiled for another case counts against the recompile limit
    inputs = case.inputs()
    right = expected(case, inputs)
    modules, errors = {}, []
    for name in names:
        tell(f"compiling {name}" if name in providers.COMPILED else f"checking {name}")
        module = module_of(name, case, inputs)
        if error := disagreement(case, module, inputs, right):
            errors.append(f"{name}, {case}: {error}")
        else:
            modules[name] = module

    tell("measuring memory")
    peaks = {name: _peak(case, module, inputs) for name, module in modules.items()}
    measurements = []
    for backward in (False, True):
        direction = "forward + backward" if backward else "forward"
        x = inputs.x
        calls = {timing.FIXED: timing.fixed_clone(case.device)}
        calls[providers.CLONE] = x.detach().clone
        for name, module in modules.items():
            calls[name] = both(module, inputs) if backward else _forward(module, x)
        for way in timing.ways(case.device):
            if way == timing.GRAPH:
                if case.x_bytes > _LAUNCH_BOUND:
                    continue
                if backward:
                    calls |= {name: _gradients(module, inputs) for name, module in modules.items()}
                calls, failed = _graphs(calls, case.device)
                errors += [
                    f"{name}, {case}: {direction} as a CUDA graph: {e}" for name, e in failed
                ]
            done = iter(range(1, rounds + 1))
            timings = timing.interleaved(
                calls,
                case.device,
                rounds,
                way,
                lambda: tell(f"{direction}, round {next(done)} of {rounds}"),  # noqa: B023
            )
            noise = timings.pop(timing.FIXED).spread
            for name, value in timings.items():
                clone = name == providers.CLONE
                measurements.append(
                    Measurement(
                        case=case,
                        direction=direction,
                        way=way,
                        provider=name,
                        timing=value,
                        least_bytes=2 * case.x_bytes if clone else case.least_bytes(backward),
                        peak_bytes=peaks.get(name) if backward else None,
                        noise=noise,
                    )
                )
    return measurements, errors


def module_of(name: str, case: Case, inputs: Inputs) -> nn.Module:
    """The provider's module for the case, with the parameters of the inputs."""
    module = providers.build(
        name, case.shape[1], case.reduction, case.combine, len(case.shape) - 2, case.block
    ).to(case.device, case.dtype)
    providers.load(module, inputs.parameters)
    return providers.compiled(name, module)


def _forward(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: module(x)


def both(module: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    leaves = [inputs.x, *module.parameters()]

    def call() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = module(inputs.x)
        y.backward(inputs.dy)
        return y

    return call


def _gradients(module: nn.Module, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward + backward that leaves `.grad` alone."""
    leaves = [inputs.x, *module.parameters()]
    return lambda: torch.autograd.grad(module(inputs.x), leaves, inputs.dy)


def _graphs(
    calls: dict[str, Callable[[], object]], device: torch.device
) -> tuple[dict[str, Callable[[], None]], list[tuple[str, Exception]]]:
    """The calls as CUDA graphs, and those that can't be captured, with the reason."""
    graphs, failed = {}, []
    for name, call in calls.items():
        try:
            graphs[name] = timing.captured(call, device)
        except RuntimeError as error:
            failed.append((name, error))
    return graphs, failed


def _peak(case: Case, module: nn.Module, inputs: Inputs) -> int:
    """Bytes beyond x, y, dy and dx at the peak of forward + backward. Gradients of parameters
    count."""
    call = both(module, inputs)
    call()
    for leaf in (inputs.x, *module.parameters()):
        leaf.grad = None
    return max(memory.peak(call, case.device) - case.y_bytes - case.x_bytes, 0)


def expected(case: Case, inputs: Inputs) -> list[Tensor]:
    """y and the gradients of x and of the parameters in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (inputs.x, *inputs.parameters)]
    if case.block == "bn_relu_scse":
        y = batch_norm.reference.bn_relu_scse(
            *leaves[:3], None, None, *leaves[3:], eps=1e-5, combine=case.combine
        )
    else:
        y = reference.scse(*leaves, combine=case.combine)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy.double())]


def disagreement(
    case: Case, module: nn.Module, inputs: Inputs, expected: list[Tensor]
) -> str | None:
    """None if output and gradients agree with `expected`, else how they don't."""
    y = both(module, inputs)()
    got = [y, inputs.x.grad, *(p.grad for p in module.parameters())]
    norm = ("d_bn_weight", "d_bn_bias") if case.block == "bn_relu_scse" else ()
    names = ("y", "dx", *norm, "dw1", "db1", "dw2", "db2", "dws", "dbs")
    for name, actual, right in zip(names, got, expected, strict=True):
        if error := too_far(case.dtype, actual, right):
            return f"{name} {error}"
    return None


def too_far(dtype: torch.dtype, actual: Tensor, right: Tensor) -> str | None:
    """None if it is as near to what is right as a dtype allows, else how far it is."""
    error, norm = (actual.double().view_as(right) - right).norm(), right.norm()
    if error <= _TOLERANCE[dtype] * norm:  # NaN is an error, too
        return None
    return f"is off by {error / norm:.1e} of its norm"
