"""Calls of the CUDA kernels: which they are, and how one is made and judged."""

import random
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from budget import VARIANTS, Case, call, errors, make_case, output_and_gradients
from fakecuda import Lab, running_on
from gpu import proof
from gpulab import A100, H100, Device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
#: A device for each architecture that there is code for.
MACHINES = {"sm_80": A100, "sm_90": H100}

#: How wide rows can be accessed -> sizes (channels, *space), by the number of spatial axes.
#: Contiguous maps have rows of positions, channels_last ones of channels. Of flat maps the samples
#: are multiples of 16 bytes and the rows are not; those of 4 bytes are such in float32, too.
SIZES = {
    "16 bytes": {1: (72, 160), 2: (72, 8, 20), 3: (40, 4, 6, 8)},
    "4 bytes": {1: (38, 102), 2: (38, 6, 17), 3: (22, 3, 5, 6)},
    "flat": {1: (72, 101), 2: (88, 9, 11), 3: (72, 3, 5, 7)},
    "one element": {1: (37, 101), 2: (37, 9, 11), 3: (19, 3, 5, 7)},
}
FLAT_CHANNELS_LAST = {2: (37, 8, 29), 3: (19, 4, 6, 8)}
MIXED = (torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16)


def in_layout(layout: str, t: torch.Tensor) -> torch.Tensor:
    """The same values, channels last if it says so."""
    if layout == "contiguous":
        return t.contiguous()
    last = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.contiguous(memory_format=last)


def apart(layout: str, t: torch.Tensor) -> torch.Tensor:
    """In that layout, the samples far apart, with NaN between them."""
    size = (2 * t.shape[0] + 1, *t.shape[1:])
    around = in_layout(layout, torch.full(size, torch.nan, dtype=t.dtype))
    view = around[1::2]
    return view.copy_(t)


def misaligned(layout: str, t: torch.Tensor) -> torch.Tensor:
    """In that layout, beginning one element after an aligned address."""
    t = in_layout(layout, t)
    around = torch.full((t.numel() + 2,), torch.nan, dtype=t.dtype)
    return around.as_strided(t.shape, t.stride(), 1).copy_(t)


ARRANGED = {"dense": in_layout, "samples apart": apart, "misaligned": misaligned}
PARAMETERS = ("as x", torch.float32, torch.float64, torch.float16, torch.bfloat16, "mixed")


def mixed(case: Case) -> Case:
    """With parameters of several dtypes."""
    pairs = zip(case.parameters, MIXED, strict=True)
    return replace(case, parameters=tuple(p if p is None else p.to(dtype) for p, dtype in pairs))


@dataclass(frozen=True)
class Call:
    """What one call is asked, see `case`."""

    machine: str
    variant: str
    dtype: torch.dtype
    layout: str
    access: str
    axes: int
    samples: int
    parameters: object
    biases: bool
    reduction: int
    residual: bool
    x: str
    dy: str

    @property
    def case(self) -> Case:
        flat_last = (self.access, self.layout) == ("flat", "channels_last")
        sizes = FLAT_CHANNELS_LAST if flat_last else SIZES[self.access]
        case = make_case(
            (self.samples, *sizes[self.axes]),
            self.variant,
            self.dtype,
            self.reduction,
            self.biases,
            parameter_dtype=self.parameters if isinstance(self.parameters, torch.dtype) else None,
            residual=self.residual,
        )
        if self.parameters == "mixed":
            case = mixed(case)
        return case.arranged(
            partial(ARRANGED[self.x], self.layout), partial(ARRANGED[self.dy], self.layout)
        )

    def __str__(self):
        values = vars(self) | {"residual": "+ x" if self.residual else ""}
        return " ".join(
            str(value).removeprefix("torch.")
            for value in values.values()
            if value not in ("dense", "")
        )


def _calls():
    """Every kernel is reached by one of these: all combinations of what kernels are compiled for.
    The rest is drawn, so that all pairs of two properties occur (test_kernels.py looks)."""
    draw = random.Random(7)
    for machine, variant, dtype, layout, access in product(
        MACHINES, VARIANTS, DTYPES, LAYOUTS, SIZES
    ):
        # Accesses of 8 bytes for float32; of one element, as below, for the others.
        if access == "4 bytes" and draw.random() < (0.5 if dtype == torch.float32 else 0.8):
            continue
        # A misaligned map would not reach these kernels; test_shapes.py has such maps.
        wide = access in ("16 bytes", "flat")
        ways = ("dense", "samples apart") if wide else ("dense", *ARRANGED)
        yield Call(
            machine,
            variant,
            dtype,
            layout,
            access,
            axes=draw.choice((1, 2, 3) if layout == "contiguous" else (2, 3)),
            samples=draw.choice((1, 2, 3)),
            parameters=draw.choice(PARAMETERS),
            biases=draw.random() < 0.6,
            reduction=draw.choice((2, 3, 16)),
            residual=variant != "concat" and draw.random() < 0.5,
            # Of channels_last maps whose samples lie apart the operators make contiguous ones.
            x=draw.choice([w for w in ways if (layout, w) != ("channels_last", "samples apart")]),
            dy=draw.choice(ways),
        )


CALLS = tuple(_calls())


#: Excitations of many weights, a launch for each layer: channels and hidden ones. Their kernels are
#: compiled for rows of whole fours or any, and for two or eight samples to a block.
MANY_WEIGHTS = {"fours": (1024, 16), "any": (1023, 17)}
LAYERED = tuple(
    (machine, dtype, rows, samples)
    for machine, dtype, rows, samples in product(
        MACHINES, (*DTYPES, "mixed"), MANY_WEIGHTS, (3, 66)
    )
    if (dtype, rows) != ("mixed", "fours")  # where dtypes differ, rows are any
)


def layered(of: tuple) -> tuple[Device, Case]:
    """The device and the case of one of LAYERED; the rest of it differs from one to the next."""
    machine, dtype, rows, samples = of
    number = LAYERED.index(of)
    channels, hidden = MANY_WEIGHTS[rows]
    case = make_case(
        (samples, channels, *((1, 2), (3, 3))[samples < 8]),
        ("add", "max", "cse", "mul", "concat")[number % 5],
        DTYPES[number % 3],
        channels // hidden,
        biases=number % 4 > 0,
        parameter_dtype=dtype if isinstance(dtype, torch.dtype) else None,
        activation=("relu", "silu")[number % 2],
    )
    return MACHINES[machine], mixed(case) if dtype == "mixed" else case


def results(gpu: Device, case: Case, **how) -> tuple[dict[str, torch.Tensor], Lab]:
    """y and the gradients of all arguments, and what was launched for them."""
    with running_on(gpu, **how) as lab:
        return output_and_gradients(partial(call, backend="cuda"), case), lab


def proved(gpu: Device, case: Case, **how) -> tuple[dict[str, torch.Tensor], Lab]:
    """The same, held to its budget and noted as a proof."""
    got, lab = results(gpu, case, **how)
    found = errors(case, got)
    for result, error in found.items():
        assert error <= 1, f"{result}: error is {error:.3g} times what is allowed"
    worst = max(found.values())
    for kernel in lab.launched:
        proof.record("nvcc", kernel.split("<")[0], 90 if gpu.arch >= 90 else 80, 1, worst)
    return got, lab


def execute(gpu: Device, case: Case, **how) -> Lab:
    """The same, without the results."""
    return proved(gpu, case, **how)[1]
