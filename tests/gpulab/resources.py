"""Register, spill, shared-memory and occupancy figures from ptxas."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

from .devices import A100, B200, H100, RTX4090
from .errors import GpuLabError


@dataclass
class Resources:
    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int  # static shared memory in bytes
    device: object

    def occupancy(self, block_threads, dynamic_shared=0, device=None):
        """(CTAs per SM, fraction of the SM's warps) for a block size."""
        d = device or self.device
        ctas = d.ctas_per_sm(block_threads, self.registers, self.shared + dynamic_shared)
        return ctas, ctas * -(-block_threads // 32) / (d.max_threads_per_sm // 32)


def find_tool(name):
    """ptxas or cuobjdump: from PATH, else from the triton package."""
    found = shutil.which(name)
    if found:
        return found
    try:
        import triton

        candidate = os.path.join(
            os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name
        )
        return candidate if os.path.exists(candidate) else None
    except ImportError:
        return None


def _device_for(arch):
    return {80: A100, 89: RTX4090, 90: H100, 100: B200}.get(arch, H100)


def _number(arch):
    return int(re.search(r"(\d+)", str(arch)).group(1))


def resources(code, arch=None):
    """{kernel: Resources} of PTX text (by ``ptxas -v``) or a cubin (bytes, by ``cuobjdump``)."""
    if isinstance(code, (bytes, bytearray)) and code[:4] == b"\x7fELF":
        return _cubin_resources(code, _number(arch or 90))
    text = code.decode() if isinstance(code, (bytes, bytearray)) else code
    target = str(arch) if arch else re.search(r"\.target\s+(\w+)", text).group(1)
    target = target if target.startswith("sm_") else f"sm_{target}"
    ptxas = find_tool("ptxas")
    if not ptxas:
        raise GpuLabError("ptxas was not found")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as f:
            f.write(text.rstrip("\0"))
        done = subprocess.run(
            [ptxas, "-v", f"-arch={target}", path, "-o", os.path.join(folder, "kernel.cubin")],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise GpuLabError(f"ptxas failed:\n{done.stderr}{done.stdout}")
    return _parse_verbose(done.stderr + done.stdout, _device_for(_number(target)))


def _parse_verbose(text, device):
    out = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.split("'", 1)[0]

        def number(pattern, part=part):
            m = re.search(pattern, part)
            return int(m.group(1)) if m else 0

        out[name] = Resources(
            name,
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes smem"),
            device,
        )
    return out


def _cubin_resources(code, arch):
    tool = find_tool("cuobjdump")
    if not tool:
        raise GpuLabError("cuobjdump was not found")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(code)
        f.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", f.name], capture_output=True, text=True
        )
    out = {}
    for name, line in re.findall(r"Function (\S+?):\s*\n?\s*(REG:[^\n]*)", done.stdout):
        values = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
        out[name] = Resources(
            name,
            values.get("REG", 0),
            0,
            0,
            values.get("STACK", 0),
            values.get("SHARED", 0),
            _device_for(arch),
        )
    return out


def try_resources(code, arch):
    """Like ``resources``, but an empty dict when ptxas is missing or rejects the code."""
    try:
        return resources(code, arch)
    except (GpuLabError, OSError):
        return {}
