"""What the Triton kernels become for GPUs: registers, spills, access widths. Needs no GPU.

The host code runs with kernels that only note their arguments. For these arguments the kernels are
specialised, as Triton does it at a launch, and compiled.
"""

import os
import re
import subprocess
from dataclasses import replace

import gpulab
import pytest
import torch
from budget import make_case

from scse_kernels import ops

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from scse_kernels._triton import heuristics, launch, plan, tuning  # noqa: E402

FORWARD = ("squeeze_kernel", "excite_kernel", "apply_kernel")
BACKWARD = ("reduce_kernel", "excite_backward_kernel", "apply_backward_kernel")
BY_ROWS = (  # in the place of the excitation, where its weights are many
    *("excite_hidden_kernel", "excite_gates_kernel"),
    *("excite_backward_hidden_kernel", "excite_backward_mean_kernel"),
)
ONE_LAUNCH = ("forward_kernel", "backward_kernel")
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
}
SHAPE = (2, 64, 64, 64)
# Registers to a thread, so that an SM with its 65536 has 64 KiB on their way: 128 bytes of each map
# for each thread (see heuristics.py), in eight warps that read two maps or more, or sixteen that
# read one.
REGISTERS = {
    "squeeze_kernel": 128,
    "excite_kernel": 255,
    "apply_kernel": 128,
    "reduce_kernel": 255,
    "excite_backward_kernel": 255,
    "apply_backward_kernel": 255,
    **dict.fromkeys(BY_ROWS, 255),
    "forward_kernel": 255,
    "backward_kernel": 255,
}
AMD = GPUTarget("hip", "gfx942", 64)


def nvidia(capability):
    return GPUTarget("cuda", capability, 32)


class Launch:
    """One launch that the host code asks for."""

    def __init__(self, kernel, arguments, keywords):
        self.kernel = kernel
        options = {"num_warps", "num_stages", "maxnreg"} & set(keywords)
        self.options = {option: keywords.pop(option) for option in options}
        defaults = {p.name: p.default for p in kernel.params if p.has_default}
        self.arguments = defaults | dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        assert set(self.arguments) == set(kernel.arg_names)

    def compile(self, target):
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if name == "OVERLAP":  # as on such a GPU; none was asked
                value = target.backend == "cuda" and target.arch >= 90
            plain = parameter.do_not_specialize
            one = type(value) is int and value == 1 and not plain
            if parameter.is_constexpr or value is None or one:
                signature[name], constants[name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            if is_tensor:
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
            if not plain and (value.data_ptr() if is_tensor else value) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=self.options)


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.fn = kernel, launches, kernel.fn

    def __getitem__(self, grid):
        def note(*arguments, **keywords):
            self.launches[self.kernel.__name__] = Launch(self.kernel, arguments, dict(keywords))

        return note


@pytest.fixture
def launches(monkeypatch):
    """A function: the launches of one forward and backward by the kernel's name, in order."""

    def record(variant, dtype, channels_last=False, shape=SHAPE, parameter_dtype=None):
        noted = {}
        monkeypatch.setattr(plan, "_INTERPRETED", True)  # no driver is asked
        for name in FORWARD + BACKWARD + BY_ROWS + ONE_LAUNCH:
            kernel = getattr(launch, name)
            kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
            monkeypatch.setattr(launch, name, Recorder(kernel, noted))
        case = make_case(shape, variant, dtype, parameter_dtype=parameter_dtype)
        case = case.in_channels_last(channels_last)
        combine = ops.COMBINE.get(variant, 0)
        namespace = torch.ops.scse_kernels
        _, *small = namespace.triton_forward(case.x, *case.parameters, combine)
        namespace.triton_backward(
            case.dy, case.x, *case.parameters, *small, combine, True, True, True
        )
        return noted

    return record


def registers_and_spills(name, compiled, target):
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        find = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # noqa: E731
        spills = find("vgpr_spill_count")
        if name != "backward_kernel":  # its scalars go to lanes of vector registers, not to memory
            spills += find("sgpr_spill_count")
        return find("vgpr_count"), spills
    used = gpulab.resources(compiled.asm["cubin"], target.arch)[name]
    return used.registers, used.stack and bytes_spilled(compiled, target)


def bytes_spilled(compiled, target):
    """Bytes that NVIDIA's assembler spills, when asked once more."""
    ptxas = triton.knobs.nvidia.ptxas_blackwell if target.arch >= 100 else triton.knobs.nvidia.ptxas
    ptx = compiled.asm["ptx"]
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    done = subprocess.run(
        [ptxas.path, "-v", f"--gpu-name={arch}", "-o", os.devnull, "/dev/stdin"],
        input=ptx,
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def test_three_launches_each_way(launches):
    assert tuple(launches("add", torch.float16)) == FORWARD + BACKWARD
    assert tuple(launches("sse", torch.float16)) == (FORWARD[0], FORWARD[2], *BACKWARD)


def wide(kind, compiled, target):
    """How many loads or stores of 16 bytes (or more) of global memory one thread has."""
    if target.backend == "hip":
        return len(re.findall(rf"(?:global|buffer)_{kind}_dwordx4", compiled.asm["amdgcn"]))
    short = {"load": "ld", "store": "st"}[kind]
    widths = re.findall(rf"\b{short}\.global\S*?\.v(\d)\.b(\d+)", compiled.asm["ptx"])
    return sum(int(n) * int(bits) // 128 for n, bits in widths)


def check(noted, variant, dtype, target):
    itemsize = torch.empty((), dtype=dtype).element_size()
    reads_x = variant in ("max", "mul")
    halves = 1 + (variant == "concat")
    maps = {  # read and written by each kernel
        "squeeze_kernel": (1, 0),
        "apply_kernel": (1, halves),
        "reduce_kernel": (1 + halves, 0),
        "apply_backward_kernel": (halves + reads_x, 1),
        "forward_kernel": (2, halves),
        "backward_kernel": (1 + 2 * halves + reads_x, 1),
    }
    for name, one in noted.items():
        compiled = one.compile(target)
        registers, spilled = registers_and_spills(name, compiled, target)
        assert spilled == 0, f"{name} spills"
        if target.backend == "cuda":
            assert registers <= REGISTERS[name], f"{name} takes {registers} registers"
            assert not re.search(r"\b(atom|red)\.\S*f(16|32|64)", compiled.asm["ptx"])
            assert "wgmma" not in compiled.asm["ptx"]
        if name in maps:
            tile = one.arguments["BLOCK_C"] * one.arguments["BLOCK_S"] * itemsize
            chunks = tile // 16 // (target.warp_size * one.options["num_warps"])
            assert chunks > 0
            read, written = maps[name]
            assert wide("load", compiled, target) >= read * chunks, name
            assert wide("store", compiled, target) >= written * chunks, name


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", ["cse", "sse", "add", "max", "mul", "concat"])
def test_fp16_on_sm_90(variant, channels_last, launches):
    check(launches(variant, torch.float16, channels_last), variant, torch.float16, nvidia(90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, launches):
    check(launches("max", dtype), "max", dtype, nvidia(90))


@pytest.mark.parametrize("target", [nvidia(80), nvidia(100), nvidia(120), AMD], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_other_architectures(target, channels_last, launches, monkeypatch):
    if target is AMD:
        monkeypatch.setattr(torch.version, "hip", "7.0")
    noted = launches("max", torch.bfloat16, channels_last)
    check(noted, "max", torch.bfloat16, target)


@pytest.fixture
def one_launch(monkeypatch, launches):
    """`launches`, of what SCSE_TRITON_LAUNCHES=1 asks for."""
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "1")
    return launches


@pytest.mark.parametrize(
    ("variant", "channels_last"), [("add", False), ("max", True), ("sse", True), ("concat", False)]
)
def test_one_launch_on_sm_90(variant, channels_last, one_launch):
    noted = one_launch(variant, torch.float16, channels_last)
    assert tuple(noted) == ONE_LAUNCH
    check(noted, variant, torch.float16, nvidia(90))


@pytest.mark.parametrize("target", [nvidia(80), nvidia(100), nvidia(120), AMD], ids=str)
def test_one_launch_on_other_architectures(target, one_launch, monkeypatch):
    if target is AMD:
        monkeypatch.setattr(torch.version, "hip", "7.0")
    check(one_launch("max", torch.bfloat16), "max", torch.bfloat16, target)


def test_one_launch_by_a_file_of_timings(launches, monkeypatch):
    """What it says goes, unless SCSE_TRITON_LAUNCHES says something else."""
    own = tuning.choice
    monkeypatch.setattr(tuning, "choice", lambda *map_: replace(own(*map_), launches=1))
    assert tuple(launches("add", torch.float16)) == ONE_LAUNCH
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "3")
    assert tuple(launches("add", torch.float16)) == FORWARD + BACKWARD


@pytest.mark.parametrize("channels", [128, 512])
def test_one_launch_of_many_channels(channels, one_launch):
    noted = one_launch("max", torch.float16, channels == 128, (1, channels, 16, 16))
    check(noted, "max", torch.float16, nvidia(90))


def test_all_of_a_program_has_stored_before_it_announces_it(one_launch):
    """Between stores and the atomic operation that releases them all warps meet."""
    for name, one in one_launch("add", torch.float16).items():
        assert one.options["num_warps"] > 1
        ptx = one.compile(nvidia(90)).asm["ptx"]
        events = re.findall(r"st\.global|bar\.sync|atom\.[\w.]*(?:acq_rel|release)", ptx)
        released = [i for i, event in enumerate(events) if event.startswith("atom")]
        assert len(released) == {"forward_kernel": 2, "backward_kernel": 3}[name]
        for i in released:
            assert events[i - 1] == "bar.sync", name


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [16, 512, 1024])
def test_few_and_many_channels(channels, channels_last, launches):
    shape = (1, channels, 64, 64) if channels < 512 else (1, channels, 8, 8)
    noted = launches("max", torch.float16, channels_last, shape)
    assert (BY_ROWS[0] in noted) == (channels >= 512)
    for target in (nvidia(90), AMD) if channels == 512 else (nvidia(90),):
        check({k: v for k, v in noted.items() if k in BY_ROWS}, "max", torch.float16, target)
    check(noted, "max", torch.float16, nvidia(90))


@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 16])
def test_sizes_that_no_large_power_of_two_divides(alignment, launches):
    """Accesses are as wide as the size of the axis of stride 1 allows."""
    noted = launches("add", torch.float16, shape=(2, 64, 5, 5 * alignment))
    chunk = min(alignment * 2, 16)
    one = noted["squeeze_kernel"].compile(nvidia(90))
    found = re.findall(r"ld\.global\S*?\.(?:v(\d)\.)?b(\d+)", one.asm["ptx"])
    # 4 bytes is how ws is read
    assert max(int(n or 1) * int(bits) // 8 for n, bits in found) == max(chunk, 4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 256, 16, 16), (1, 64, 16, 16), (1, 768, 16, 16)], ids=str)
def test_small_maps(shape, channels_last, launches):
    noted = launches("add", torch.float16, channels_last, shape)
    check(noted, "add", torch.float16, nvidia(90))


def programs(tile, samples, positions):
    return samples * -(-positions // (tile.block_s * tile.tiles))


def test_a_tile_keeps_the_promises_of_its_choice():
    for channels in (1, 3, 16, 64, 100, 256, 512, 513, 1024, 2000):
        for positions in (1, 49, 1024, 65536, 10**7):
            for itemsize in (2, 4, 8):
                for channels_last in (False, True):
                    arguments = (channels, positions, itemsize, 32, channels_last)
                    tile = heuristics.tile(1, *arguments, 132)
                    assert tile.hold == (tile.block_c >= channels)
                    assert tile.hold or tile.tiles == 1
                    strips = -(-positions // (tile.block_s * tile.tiles))
                    assert strips <= 512 or not tile.hold
                    # 16 bytes to a thread, 128 at most
                    size = tile.block_c * tile.block_s * itemsize
                    assert size <= 128 * 32 * tile.warps <= 128 * 32 * 8
                    assert size >= 16 * 32 * tile.warps or tile.warps == 1
                    more = heuristics.tile(1, *arguments, 10 * 132)
                    assert programs(more, 1, positions) >= programs(tile, 1, positions)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("samples, channels, side", [(8, 256, 16), (8, 384, 32), (2, 768, 32)])
def test_small_maps_keep_half_the_multiprocessors_busy(samples, channels, side, channels_last):
    for processors in (108, 128, 132, 148):
        arguments = (samples, channels, side**2, 2, 32, channels_last, processors)
        tile = heuristics.tile(*arguments)
        assert programs(tile, samples, side**2) >= processors // 2


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_rows_of_a_contiguous_tile_are_whole_sectors(itemsize):
    """Half of one where a row is a line of the cache."""
    for channels in (1, 16, 64, 256, 512, 1024, 2048):
        for positions in (49, 64, 256, 4096):
            tile = heuristics.tile(1, channels, positions, itemsize, 32, False, 132)
            in_a_line = positions * itemsize <= 128
            assert tile.block_s * itemsize >= (16 if in_a_line else 32)


def test_rows_are_long_where_channels_are_walked_and_samples_many():
    def tile(samples, positions, itemsize=2):
        return heuristics.tile(samples, 2048, positions, itemsize, 32, False, 132)

    assert tile(256, 64) == heuristics.Tile(256, 64, 8, 1, False)
    assert tile(256, 49) == heuristics.Tile(128, 64, 8, 1, False)  # no spilled registers
    assert tile(256, 196, 4) == heuristics.Tile(256, 32, 8, 1, False)
    assert tile(8, 49).block_c == 1024


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("launches_each_way", ["3", "1"])
def test_offsets_in_64_bits(launches_each_way, channels_last, launches, monkeypatch):
    """Where they are needed, and only there: those of all maps, the only tensors of float16."""
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", launches_each_way)
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(launch, "_WIDE", 1)
        noted = launches("concat", torch.float16, channels_last, (2, 16, 8, 8), torch.float32)
        for name, one in noted.items():
            if "excite" in name:
                continue
            ttir = one.compile(nvidia(90)).asm["ttir"]
            kinds = (r"tensor<\S*!tt\.ptr<f16>\S*, tensor<\S*x", r"!tt\.ptr<f16>, ")
            tiles, samples = (
                re.findall(rf"tt\.addptr [^:]*: {kind}(i32|i64)", ttir) for kind in kinds
            )
            # from one half of a sample to the other it is as wide as its size
            expected = {"i64" if wide else "i32"}
            assert set(tiles) == expected and expected <= set(samples), name


def test_which_maps_need_64_bits():
    def wide(*maps):
        p = launch._describe(torch.contiguous_format, maps[0], None, maps[0], 0)
        read = [launch._in_format(m, torch.contiguous_format) for m in maps]
        return p.constants(*read)["WIDE"]

    def map_(*shape, sample=None):
        t = torch.empty(shape, dtype=torch.float16, device="meta")
        return t.as_strided(shape, (sample, *t.stride()[1:])) if sample else t

    small = map_(2, 8, 4, 4)
    assert not wide(small) and not wide(map_(1, 64, 4096, 4096), small)
    assert wide(map_(2, 64, 4096, 4096)) and wide(map_(1, 64, 8192, 4096))
    assert not wide(map_(2, 8, 4, 4, sample=2**29)) and wide(map_(2, 8, 4, 4, sample=2**30))
    assert wide(small, map_(2, 8, 4, 4, sample=2**30))
