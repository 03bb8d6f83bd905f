"""What a launch did: instruction classes, coalescing, bank conflicts and the Report."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

SENTINEL = np.int64(1) << 62
UNCHARGED = ("move", "ld_param")  # ptxas removes most of them


def classify(ins):
    """The counter class of an instruction."""
    op, mods = ins.op, ins.mods
    spaces = {m.split("::")[0] for m in mods}
    if op == "cp":
        control = {"commit_group", "wait_group", "wait_all", "arrive"} & set(mods)
        return "async_copy" if ins.operands and not control else "other"
    if op in ("ld", "ldu", "st"):
        space = next(
            (s for s in ("param", "global", "shared", "local", "const") if s in spaces), "generic"
        )
        return f"{op[:2]}_{space}"
    if op in ("ldmatrix", "stmatrix"):
        return "ld_shared" if op == "ldmatrix" else "st_shared"
    if op in ("atom", "red"):
        return "atomic_shared" if "shared" in spaces else "atomic"
    if op == "shfl":
        return "shuffle"
    if op in ("vote", "match", "activemask", "elect", "redux"):
        return "vote"
    if op in ("bar", "barrier", "mbarrier"):
        return "barrier"
    if op in ("membar", "fence"):
        return "fence"
    if op in ("bra", "brx", "ret", "exit", "call"):
        return "branch"
    if op == "mma":
        return "mma"
    if op in ("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt", "div") and ins.type in (
        "f32",
        "f16",
        "f16x2",
        "bf16",
        "bf16x2",
    ):
        return "sfu"
    if op in ("mov", "cvta", "mapa"):
        return "move"
    if op == "cvt":
        return "convert"
    t = ins.type
    if t in ("f32", "f32x2"):
        return "fp32"
    if t == "f64":
        return "fp64"
    if t in ("f16", "bf16", "f16x2", "bf16x2"):
        return "fp16"
    return "int" if t else "other"


def reads_global(ins):
    """Whether a counted access to global memory is a load."""
    if ins.op == "cp":
        spaces = [m.split("::")[0] for m in ins.mods]
        return (
            "global" not in spaces
            or "shared" not in spaces
            or spaces.index("shared") < spaces.index("global")
        )
    return ins.op in ("ld", "ldu")


class Counters:
    """Filled in by the engine while a launch runs.  Arrays are indexed by instruction, ``sm_*`` by
    SM."""

    def __init__(self, program, sms=1):
        n = len(program.instrs)
        self.program = program
        self.sms = sms
        self.sm_issued = np.zeros(sms, np.int64)  # warp instructions without the uncharged ones
        self.sm_read = np.zeros(sms, np.int64)  # bytes from the L2
        self.sm_written = np.zeros(sms, np.int64)  # bytes to the L2
        self.sm_wavefronts = np.zeros(sms, np.int64)
        self.block_issued = program.block_issued
        self._all_warps = None  # per SM, of a group of all lanes
        self.block_warps = np.zeros(len(program.blocks), np.int64)
        self.block_threads = np.zeros(len(program.blocks), np.int64)
        self.requests = np.zeros(n, np.int64)  # warp-level memory requests with an active lane
        self.lanes = np.zeros(n, np.int64)  # active lanes of those
        self.bytes = np.zeros(n, np.int64)
        self.sectors = np.zeros(n, np.int64)  # 32-byte sectors touched, per request
        self.wavefronts = np.zeros(n, np.int64)  # shared-memory passes
        self.ideal_wavefronts = np.zeros(n, np.int64)
        self.max_ways = np.zeros(n, np.int64)
        self.steps = 0

    def ran(self, g, block):
        """One execution of a block by a group."""
        self.block_warps[block.index] += g.n_warps
        self.block_threads[block.index] += g.n
        self.steps += block.end - block.start
        issued = self.block_issued[block.index]
        if not issued:
            return
        if not g.full:
            self.sm_issued += issued * self.per_sm(g.row_sm())
            return
        if self._all_warps is None:
            self._all_warps = self.per_sm(g.row_sm())
        self.sm_issued += issued * self._all_warps

    def per_sm(self, sm):
        return np.bincount(sm, minlength=self.sms)

    def moved(self, sm, write):
        """Sectors that go between SMs and the L2 (``sm``: one entry per sector)."""
        side = self.sm_written if write else self.sm_read
        side += 32 * self.per_sm(sm)

    def moved_bytes(self, slot, nbytes, write):
        """A bulk copy's bytes, by the CTA in ``slot``."""
        side = self.sm_written if write else self.sm_read
        side[slot % self.sms] += nbytes

    def global_access(self, g, sector, mask, size, ins):
        """Count one access; returns the touched sectors and their warp's row, in warp order."""
        rows = g.warp_rows(sector, mask, SENTINEL)
        if not (rows[:, 1:] >= rows[:, :-1]).all():
            rows = np.sort(rows, axis=1)
        new = np.empty(rows.shape, bool)
        new[:, 0] = True
        np.not_equal(rows[:, 1:], rows[:, :-1], out=new[:, 1:])
        if mask is not None or not g.full_warps:
            new &= rows != SENTINEL
            lanes = int(mask.sum()) if mask is not None else g.n
            requests = int(new.any(axis=1).sum())
        else:
            lanes, requests = g.n, rows.shape[0]
        row, column = np.nonzero(new)
        touched = rows[row, column]
        pc = ins.pc
        self.requests[pc] += requests
        self.lanes[pc] += lanes
        self.bytes[pc] += lanes * size
        self.sectors[pc] += touched.size
        return touched, row

    def shared_access(self, g, addr, mask, size, ins):
        """Count bank-conflict passes of a shared access (addr: bytes, int64)."""
        pc, lanes = ins.pc, g.n if mask is None else int(mask.sum())
        self.lanes[pc] += lanes
        self.bytes[pc] += lanes * size
        rows = g.warp_rows(addr, mask, SENTINEL)
        repeat, sm = 1, g.row_sm()
        per_cta = g.m.warps_per_cta
        if rows.shape[0] > per_cta and g.whole_ctas():
            pattern = rows.reshape(-1, per_cta * 32)
            if (pattern == pattern[0]).all():  # every CTA uses the same addresses
                repeat, rows = pattern.shape[0], pattern[0].reshape(-1, 32)
        words_per_lane = max(1, size // 4)
        phases = {1: 1, 2: 2, 4: 4}[words_per_lane]
        self.requests[pc] += repeat * int((rows != SENTINEL).any(axis=1).sum())
        rows = rows.reshape(-1, 32 // phases)
        used = (rows != SENTINEL).any(axis=1)
        rows = rows[used]
        if not rows.size:
            return
        words = np.where(rows == SENTINEL, SENTINEL, rows >> 2)
        if words_per_lane > 1:
            words = np.where(
                words[:, :, None] == SENTINEL,
                SENTINEL,
                words[:, :, None] + np.arange(words_per_lane),
            ).reshape(words.shape[0], -1)
        words = np.sort(words, axis=1)
        new = np.ones(words.shape, bool)
        np.not_equal(words[:, 1:], words[:, :-1], out=new[:, 1:])
        new &= words != SENTINEL
        row = np.nonzero(new)[0]
        bank = words[new] & 31
        ways = (
            np.bincount(row * 32 + bank, minlength=32 * words.shape[0]).reshape(-1, 32).max(axis=1)
        )
        if repeat > 1:
            self.sm_wavefronts += int(ways.sum()) * self.per_sm(sm[::per_cta])
        else:
            self.sm_wavefronts += np.bincount(np.repeat(sm, phases)[used], ways, self.sms).astype(
                np.int64
            )
        self.wavefronts[pc] += repeat * int(ways.sum())
        self.ideal_wavefronts[pc] += repeat * words.shape[0]
        self.max_ways[pc] = max(self.max_ways[pc], int(ways.max()))


@dataclass
class AccessSite:
    """Counts of one memory instruction of the kernel."""

    where: str
    kind: str
    requests: int
    bytes: int
    sectors: int
    bytes_per_lane: int

    @property
    def efficiency(self):
        """Requested bytes over bytes of touched sectors; 1.0 is fully coalesced (broadcast can
        exceed it)."""
        return self.bytes / (32 * self.sectors) if self.sectors else 1.0


@dataclass
class Report:
    """Counters of one launch.  All counts are of PTX instructions, before ptxas."""

    kernel: str
    device: object
    grid: tuple
    block: tuple
    cluster: tuple
    ctas: int
    resident_ctas: int
    ctas_per_sm: int
    shared_bytes: int
    registers: int  # from ptxas, 0 when unknown
    spill_bytes: int = 0  # spill loads and stores per thread, from ptxas
    instructions: Counter = field(default_factory=Counter)  # warp instructions by class
    warp_instructions: int = 0
    thread_instructions: int = 0
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    global_load_sectors: int = 0
    global_store_sectors: int = 0
    load_widths: Counter = field(default_factory=Counter)  # bytes per lane -> lane accesses
    store_widths: Counter = field(default_factory=Counter)
    atomic_requests: int = 0  # warp-level atom/red on global memory
    atomic_lane_ops: int = 0
    atomic_max_same_address: int = 0  # lane operations on the busiest 4-byte word
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_ideal_wavefronts: int = 0
    shared_max_ways: int = 0
    l1_hit_sectors: int = 0  # load sectors that did not go to the L2
    l2_read_sectors: int = 0
    l2_read_hits: int = 0
    l2_write_sectors: int = 0
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0  # written back during the launch
    l2_dirty_bytes: int = 0  # left dirty in the caller's L2 object
    sm_issued: int = 0  # the busiest SM's: warp instructions that take an issue slot,
    sm_read_bytes: int = 0  # bytes from the L2 (of the SM with the most read and written),
    sm_written_bytes: int = 0  # bytes to the L2 (of the same SM),
    sm_wavefronts: int = 0  # shared-memory passes
    latency_cycles: int = 0  # critical path, with latency=True
    l2_policies: dict = field(
        default_factory=dict
    )  # eviction priority -> (read sectors, hits, written sectors)
    sites: list = field(default_factory=list)
    printed: list = field(default_factory=list)
    instruction_profile: list = field(default_factory=list)  # (warp executions, instruction)
    wall_seconds: float = 0.0
    footprint: object = field(
        default=None, repr=False
    )  # what it touched, if launched with overlap=

    @property
    def num_warps(self):
        return -(-int(np.prod(self.block)) // 32)

    @property
    def load_efficiency(self):
        return (
            self.global_load_bytes / (32 * self.global_load_sectors)
            if self.global_load_sectors
            else 1.0
        )

    @property
    def store_efficiency(self):
        return (
            self.global_store_bytes / (32 * self.global_store_sectors)
            if self.global_store_sectors
            else 1.0
        )

    @property
    def bank_conflict_ratio(self):
        """Shared-memory passes over the conflict-free number of passes."""
        return (
            self.shared_wavefronts / self.shared_ideal_wavefronts
            if self.shared_ideal_wavefronts
            else 1.0
        )

    @property
    def l2_hit_rate(self):
        return self.l2_read_hits / self.l2_read_sectors if self.l2_read_sectors else 0.0

    def worst_sites(self, n=5):
        """The global accesses with the most wasted sector bytes."""
        return sorted(self.sites, key=lambda s: s.bytes - 32 * s.sectors)[:n]

    def hottest(self, n=10):
        """The most executed PTX instructions."""
        executed = sorted(self.instruction_profile, key=lambda e: -e[0])[:n]
        return [(count, instr.where()) for count, instr in executed]

    def roofline(self, device=None):
        """Lower bounds (microseconds) from counted work divided by peak rates.

        This is a bound, not a timing: launch overhead, contention, instruction scheduling and the
        PTX-to-SASS translation are not modelled.  Moves, parameter loads and address-space casts
        are not charged as issue slots, because ptxas removes most of them.  Returns a dict with one
        entry per resource, plus ``bound_us``, the largest, and ``binds``, its name.  ``sm_*``: the
        busiest SM, with the CTAs as this launch's device got them.  ``latency_us``, of launches
        with ``latency=True``: the longest chain of dependent instructions on the launch's device
        (see ``latency``)."""
        d = device or self.device
        clock = d.clock_mhz * 1e6
        sms = min(d.sms, self.ctas)  # a small grid cannot use every SM
        issued = self.warp_instructions - sum(self.instructions[kind] for kind in UNCHARGED)
        times = {
            "dram": (self.dram_read_bytes + self.dram_write_bytes) / (d.dram_gbps * 1e9),
            "l2": 32 * (self.l2_read_sectors + self.l2_write_sectors) / (d.l2_gbps * 1e9),
            "issue": issued / (sms * d.issue_per_clock * clock),
            "fp32": 32 * self.instructions["fp32"] / (sms * d.fp32_lanes * clock),
            "sfu": 32 * self.instructions["sfu"] / (sms * d.sfu_lanes * clock),
            "shared": self.shared_wavefronts * 128 / (sms * d.lsu_bytes_per_clock * clock),
            "l1": 32
            * (self.global_load_sectors + self.global_store_sectors)
            / (sms * d.lsu_bytes_per_clock * clock),
            "sm_issue": self.sm_issued / (d.issue_per_clock * clock),
            "sm_l2": (self.sm_read_bytes + self.sm_written_bytes)
            / (d.sm_l2_bytes_per_clock * clock),
            "sm_shared": self.sm_wavefronts / (d.wavefronts_per_clock * clock),
        }
        if self.latency_cycles:
            times["latency"] = self.latency_cycles / (self.device.clock_mhz * 1e6)
        out = {f"{k}_us": 1e6 * v for k, v in times.items()}
        bound = max(times.values())
        out["binds"] = next(k for k, v in times.items() if v >= bound * (1 - 1e-9))
        out["bound_us"] = 1e6 * bound
        return out

    def __str__(self):
        rows = [
            f"{self.kernel}: grid {self.grid} block {self.block} cluster {self.cluster} on "
            f"{self.device.name}"
            f" ({self.ctas} CTAs, {self.resident_ctas} resident, {self.ctas_per_sm}/SM)",
            f"  warp instructions {self.warp_instructions:,}: "
            + ", ".join(f"{k} {v:,}" for k, v in self.instructions.most_common()),
            f"  global loads  {self.global_load_bytes:,} B in {self.global_load_sectors:,} sectors"
            f" ({100 * self.load_efficiency:.0f}% efficient), widths {dict(self.load_widths)}",
            f"  global stores {self.global_store_bytes:,} B in {self.global_store_sectors:,} "
            "sectors"
            f" ({100 * self.store_efficiency:.0f}% efficient), widths {dict(self.store_widths)}",
            f"  atomics {self.atomic_requests:,} requests, {self.atomic_lane_ops:,} lane ops,"
            f" busiest word {self.atomic_max_same_address:,}",
            f"  shared {self.shared_requests:,} requests, {self.shared_wavefronts:,} passes"
            f" ({self.bank_conflict_ratio:.2f}x ideal, worst {self.shared_max_ways}-way)",
            f"  L1 hits {self.l1_hit_sectors:,} sectors; L2 reads {self.l2_read_sectors:,} sectors "
            f"({100 * self.l2_hit_rate:.0f}% hit), writes"
            f" {self.l2_write_sectors:,}; DRAM read {self.dram_read_bytes:,} B, written "
            f"{self.dram_write_bytes:,} B"
            + (f", {self.l2_dirty_bytes:,} B left dirty" if self.l2_dirty_bytes else ""),
        ]
        if set(self.l2_policies) - {"evict_normal"}:
            rows.append(
                "  L2 by priority: "
                + "; ".join(
                    f"{name} {reads:,} reads ({100 * hits / max(1, reads):.0f}% hit), {writes:,} "
                    "writes"
                    for name, (reads, hits, writes) in self.l2_policies.items()
                )
            )
        r = self.roofline()
        rows.append(f"  lower bound {r['bound_us']:.2f} us ({r['binds']})")
        return "\n".join(rows)
