"""Device presets and the occupancy rules.

Figures come from NVIDIA's published data sheets and architecture white papers
unless a comment says otherwise.  Bandwidths are peaks; nothing here is measured
by gpulab.  L2 bandwidth is not on most data sheets: where NVIDIA gives bytes per
clock it is used, elsewhere the value is an assumption marked as such - override it
with ``device.scaled(l2_gbps=...)`` if you have a measurement.

What one SM can do per clock: 4 warp instructions (4 schedulers), one shared-memory wavefront of
128 bytes (white papers), and 64 bytes from and to the L2 (assumption for all presets: it is the
width commonly reported for Volta and later; NVIDIA publishes only the sum of all SMs).

Latencies (``*_cycles``) are of an idle device.  NVIDIA does not publish them; sources:
  Luo     Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture"
          (arXiv:2402.13499), A100, H100 and RTX 4090; quoted from memory, not looked up
  mt4g    pointer chases of github.com/caps-tum/mt4g, sample_results, H100 80GB HBM3 and
          A100-PCIE-40GB
  AI      pointer chases of github.com/markdewing/AI_kernels, latency/README.md, GH200, RTX 4090
          and B200
  Ampere  Abdelkhalik et al. 2022, "Demystifying the Nvidia Ampere Architecture ..."
          (arXiv:2208.11174), likewise
They differ by where a line lives in the L2 and by TLB misses, DRAM most of all: H100 479 (Luo),
GH200 690 (AI), H100 834 (mt4g).  The presets take the lower ones, as they are used for lower
bounds.  4 cycles of dependent arithmetic are of Ampere and Luo; special functions, shuffles, tensor
cores and barriers are assumptions.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    name: str
    arch: int  # compute capability * 10
    sms: int
    clock_mhz: int  # maximum boost clock
    l2_bytes: int
    dram_gbps: float  # 10^9 bytes per second
    l2_gbps: float  # 10^9 bytes per second
    shared_per_sm: int  # bytes available to CTAs on one SM
    shared_per_cta: int  # opt-in maximum for one CTA
    l1_bytes: int  # L1 data cache and shared memory of one SM together
    max_threads_per_sm: int = 2048
    max_ctas_per_sm: int = 32
    registers_per_sm: int = 65536
    max_registers_per_thread: int = 255
    issue_per_clock: int = 4  # warp instructions per clock and SM (4 schedulers)
    fp32_lanes: int = 128  # fp32 lanes per clock and SM
    sfu_lanes: int = 16  # ex2, rcp, rsqrt, ... results per clock and SM
    lsu_bytes_per_clock: int = 128  # shared memory / L1 bandwidth per SM
    sm_l2_bytes_per_clock: int = (
        64  # between one SM and the L2, both directions together (assumption)
    )
    wavefronts_per_clock: int = 1  # shared-memory passes per clock and SM
    alu_cycles: int = 4  # from here on: from issue to a dependent instruction's issue
    sfu_cycles: int = 20  # ex2, rcp, ..., and at least this for div, rem (assumption)
    mma_cycles: int = 18  # assumption
    shuffle_cycles: int = 24  # shfl (assumption)
    shared_cycles: int = 29
    l1_cycles: int = 38
    l2_cycles: int = 219
    dram_cycles: int = 479
    dsmem_cycles: int = 180  # shared memory of another SM of the cluster (Luo)
    barrier_cycles: int = 20  # from the last arrival on (assumption)
    cluster_barrier_cycles: int = 180  # from the last arrival on: as dsmem_cycles (assumption)

    def scaled(self, **changes):
        """A copy with some fields changed, e.g. ``H100.scaled(l2_bytes=1 << 20)``."""
        return replace(self, **changes)

    def ctas_per_sm(self, threads, registers=0, shared_bytes=0):
        """Resident CTAs per SM allowed by threads, warps, registers and shared memory."""
        warps = -(-threads // 32)
        limits = [self.max_ctas_per_sm, (self.max_threads_per_sm // 32) // warps]
        if registers:
            per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
            limits.append((self.registers_per_sm // 4 // per_warp) * 4 // warps)
        # cc 8.0 and later reserve 1 KiB of shared memory per CTA, allocated in units of 128 B
        reserved = 1024 if self.arch >= 80 else 0
        limits.append(self.shared_per_sm // max(1, -(-(shared_bytes + reserved) // 128) * 128))
        return max(0, min(limits))


KIB, MIB = 1024, 1024 * 1024

# NVIDIA A100 80GB SXM data sheet (2039 GB/s); A100 white paper: 108 SMs, 40 MB L2,
# 1410 MHz boost, 164 KB shared per SM of 192 KB with the L1, L2 read bandwidth 5120 B/clk.
A100 = Device(
    "A100-SXM-80GB",
    80,
    108,
    1410,
    40 * MIB,
    2039.0,
    5120 * 1.410,
    164 * KIB,
    163 * KIB,
    192 * KIB,
    fp32_lanes=64,
    l1_cycles=35,
    l2_cycles=200,
    dram_cycles=466,
)  # mt4g (read-only path), Ampere, Luo

# NVIDIA H100 SXM5 data sheet (3.35 TB/s); H100 white paper: 132 SMs, 50 MB L2, 228 KB shared per
# SM; 1980 MHz is the maximum boost clock, that of the data sheet's 67 TFLOPS (1755 MHz is quoted as
# well). L2 bandwidth is not published: assumed the A100's 5120 B/clk at a sustained clock of about
# 1.7 GHz.
H100 = Device(
    "H100-SXM",
    90,
    132,
    1980,
    50 * MIB,
    3350.0,
    5120 * 1.7,
    228 * KIB,
    227 * KIB,
    256 * KIB,
    l1_cycles=38,
    l2_cycles=219,
    dram_cycles=479,
)  # mt4g, mt4g, Luo

# NVIDIA Ada white paper, GeForce RTX 4090: 128 SMs, 72 MB L2, 1008 GB/s, 2520 MHz boost,
# 100 KB shared per SM, 48 warps and 24 CTAs per SM.  L2 bandwidth assumed 2048 B/clk.
RTX4090 = Device(
    "RTX 4090",
    89,
    128,
    2520,
    72 * MIB,
    1008.0,
    2048 * 2.52,
    100 * KIB,
    99 * KIB,
    128 * KIB,
    max_threads_per_sm=1536,
    max_ctas_per_sm=24,
    shared_cycles=30,
    l1_cycles=40,
    l2_cycles=273,
    dram_cycles=541,
)  # Luo, AI, Luo, Luo

# NVIDIA Blackwell data sheet, HGX B200: up to 8 TB/s of HBM3e.  148 SMs and clock as reported by
# the device; L2 size (126 MB) and L2 bandwidth are not on the data sheet: assumed.
B200 = Device(
    "B200",
    100,
    148,
    1965,
    126 * MIB,
    8000.0,
    2 * 5120 * 1.7,
    228 * KIB,
    227 * KIB,
    256 * KIB,
    l1_cycles=40,
    l2_cycles=295,
    dram_cycles=860,
)  # AI

PRESETS = {d.name: d for d in (A100, H100, RTX4090, B200)}
