"""All steps in one launch: a sample's second pass follows its first while the map is still in L2.

The grid has about as many programs as the device runs at once. They take their work from a queue. A
program draws a number from a counter, the ticket t, and does strip t of the first pass, then strip
t - lag of the second. So a strip is read again when only its own sample and a few more strips have
passed through L2. The program that finishes the last strip of a sample's first pass forms the
sample's gates (in the backward: the gradients before them). The parameters' gradients follow the
first pass.

Nothing deadlocks, however few programs run at once. A strip of the second pass waits for its
sample. The sample's strips of the first pass have lower tickets, or this very one, as lag is a
sample's strips at least. Programs that drew lower tickets run already, and the lowest unfinished
one waits for nobody.

No result depends on which program does what: each strip has its partial sums, and they are added in
a fixed order. So results are those of three launches to the last bit.

`counters` must be zeros. The first counts the tickets. Then each sample has one: its finished
strips of the first pass, plus one when its excitation is done. In the backward the last one counts
the finished samples. A barrier stands between the stores of a program's threads and the atomic
operation that announces them, and another one between seeing an announcement and reading. Triton
sets none there.

Loop-invariant code stays inside of the loop over tickets (`disable_licm`). Else the addresses of
all steps would occupy registers during each step.
"""

import triton
import triton.language as tl

from .apply import apply_backward_tile, apply_tile
from .combine import SPATIAL, by_gates
from .excite import excite_backward_sample, excite_sample
from .parameters import parameter_gradients
from .primitives import SIZES
from .reduce import reduce_strip
from .squeeze import squeeze_strip

# The caches' policy where a map is read for the last time, and for what is written: neither need
# stay in L2.
EVICT_FIRST = tl.constexpr("evict_first")

if triton.knobs.runtime.interpret:

    def condition(more, disable_licm):
        """The interpreter's `while` is Python's, for which every tl.condition is true."""
        return more

else:
    condition = tl.condition


@triton.jit
def draw(tickets_ptr):
    """This program's next ticket."""
    return tl.atomic_add(tickets_ptr, 1, sem="relaxed")


@triton.jit
def announce(counter_ptr):
    """Adds one to a counter, after all that this program's threads did. Returns the count
    before."""
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def wait(counter_ptr, count):
    """Returns when others have brought the counter to that count."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_ptr,  # [N, C, S]
    w1_ptr,  # [Cr, C]; the parameters may be None
    b1_ptr,  # [Cr]
    w2_ptr,  # [C, Cr]
    b2_ptr,  # [C]
    ws_ptr,  # [C]
    bs_ptr,  # [1]
    partial_ptr,  # [N, strips, C], scratch
    spatial_gate_ptr,  # [N, S], scratch
    pooled_ptr,  # [N, C]
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    y_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    counters_ptr,  # [1 + N], zeros
    N,
    C,
    Cr,
    S,
    strips,
    lag,
    stride_xn,
    pitch_x,
    stride_yn,
    pitch_y,
    half_y,
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HOLD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EXCITE_C: tl.constexpr,
    EXCITE_J: tl.constexpr,
    TERMS_C: tl.constexpr,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    EXCITE_TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GATE: tl.constexpr,
):
    """Reads x twice, the second time from L2; writes y."""
    HAS_CHANNEL: tl.constexpr = COMBINE != SPATIAL
    items = N * strips
    blocks_s = tl.cdiv(S, BLOCK_S)
    blocks_c = tl.cdiv(C, BLOCK_C)
    done_ptr = counters_ptr + 1
    ticket = draw(counters_ptr)
    while condition(ticket < items + lag, disable_licm=True):
        if ticket < items:
            n = ticket // strips
            squeeze_strip(
                ticket, x_ptr, ws_ptr, bs_ptr, partial_ptr, spatial_gate_ptr,
                C, S, strips, stride_xn, pitch_x,
                COMBINE, CHANNELS_LAST, ALIGN, WIDE, HOLD, TILES, BLOCK_C, BLOCK_S, GATE,
            )  # fmt: skip
            before = announce(done_ptr + n)
            if HAS_CHANNEL:  # noqa: SIM102 (one is known when compiling, the other when running)
                if before == strips - 1:
                    excite_sample(
                        n, N, partial_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
                        pooled_ptr, hidden_ptr, channel_gate_ptr, C, Cr, S, strips,
                        EXCITE_C, EXCITE_J, TERMS_C, TERMS_J, TERMS_STRIPS, EXCITE_TILE,
                        SEGMENT, ACTIVATION, SLOPE, GATE,
                    )  # fmt: skip
                    announce(done_ptr + n)
        item = ticket - lag
        if item >= 0:
            n = item // strips
            strip = item % strips
            wait(done_ptr + n, strips + HAS_CHANNEL)
            begin = (n * blocks_s + strip * TILES) * blocks_c
            end = (n * blocks_s + tl.minimum((strip + 1) * TILES, blocks_s)) * blocks_c
            for tile in range(begin, end):
                apply_tile(
                    tile, x_ptr, channel_gate_ptr, spatial_gate_ptr, y_ptr,
                    C, S, blocks_s, stride_xn, pitch_x, stride_yn, pitch_y, half_y,
                    COMBINE, RESIDUAL, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C, BLOCK_S, EVICT_FIRST,
                    False,
                )  # fmt: skip
        ticket = draw(counters_ptr)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    dy_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    x_ptr,  # [N, C, S]
    w1_ptr,  # [Cr, C]; the parameters may be None
    w2_ptr,  # [C, Cr]
    ws_ptr,  # [C]
    bs_ptr,  # [1]
    pooled_ptr,  # [N, C]
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    partial_ptr,  # [N, strips, C], from here to sample_bs_ptr scratch, None where not needed
    partial_ws_ptr,  # [N, strips, C]
    partial_bs_ptr,  # [N, strips]
    spatial_gate_ptr,  # [N, S]
    dq_ptr,  # [N, S]
    d_excited_ptr,  # [N, C]
    d_hidden_ptr,  # [N, Cr]
    d_mean_ptr,  # [N, C]
    sample_ws_ptr,  # [N, C]
    sample_bs_ptr,  # [N]
    dx_ptr,  # [N, C, S]; the results are None where not needed
    dw1_ptr,  # [Cr, C]
    db1_ptr,  # [Cr]
    dw2_ptr,  # [C, Cr]
    db2_ptr,  # [C]
    dws_ptr,  # [C]
    dbs_ptr,  # [1]
    counters_ptr,  # [2 + N], zeros
    N,
    C,
    Cr,
    S,
    strips,
    lag,
    tasks,  # of the parameters' gradients, behind the first pass in the queue
    stride_dyn,
    pitch_dy,
    half_dy,
    stride_xn,
    pitch_x,
    stride_dxn,
    pitch_dx,
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    SUM_CHANNEL: tl.constexpr,
    SUM_SPATIAL: tl.constexpr,
    WEIGH: tl.constexpr,
    STORE_GATES: tl.constexpr,
    NEED_DX: tl.constexpr,
    HOLD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    EXCITE_C: tl.constexpr,
    EXCITE_J: tl.constexpr,
    TERMS_C: tl.constexpr,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    EXCITE_TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    GATE: tl.constexpr,
):
    """Reads dy twice, the second time from L2, and x once, twice where dx depends on it; writes dx
    and the parameters' gradients."""
    POLICY_X: tl.constexpr = "" if by_gates(COMBINE) else EVICT_FIRST
    items = N * strips
    blocks_s = tl.cdiv(S, BLOCK_S)
    blocks_c = tl.cdiv(C, BLOCK_C)
    done_ptr = counters_ptr + 1
    samples_ptr = done_ptr + N
    tickets = items + tl.maximum(tasks, lag * NEED_DX)
    ticket = draw(counters_ptr)
    while condition(ticket < tickets, disable_licm=True):
        if ticket < items:
            n = ticket // strips
            reduce_strip(
                ticket, dy_ptr, x_ptr, ws_ptr, bs_ptr, channel_gate_ptr,
                partial_ptr, partial_ws_ptr, partial_bs_ptr, spatial_gate_ptr, dq_ptr,
                C, S, strips, stride_dyn, pitch_dy, half_dy, stride_xn, pitch_x,
                COMBINE, CHANNELS_LAST, ALIGN, WIDE, SUM_CHANNEL, SUM_SPATIAL, WEIGH, STORE_GATES,
                HOLD, TILES, BLOCK_C, BLOCK_S, GATE, POLICY_X,
            )  # fmt: skip
            if announce(done_ptr + n) == strips - 1:
                excite_backward_sample(
                    n, N, True, True, partial_ptr, partial_ws_ptr, partial_bs_ptr, w1_ptr, w2_ptr,
                    hidden_ptr, channel_gate_ptr, d_excited_ptr, d_hidden_ptr, d_mean_ptr,
                    sample_ws_ptr, sample_bs_ptr, C, Cr, S, strips,
                    EXCITE_C, EXCITE_J, TERMS_C, TERMS_J, TERMS_STRIPS, EXCITE_TILE, SEGMENT, GATE,
                )  # fmt: skip
                announce(done_ptr + n)
                announce(samples_ptr)
        elif ticket < items + tasks:
            wait(samples_ptr, N)
            parameter_gradients(
                ticket - items, d_excited_ptr, d_hidden_ptr, pooled_ptr, hidden_ptr,
                sample_ws_ptr, sample_bs_ptr,
                dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, dws_ptr, dbs_ptr, N, C, Cr, BLOCK,
            )  # fmt: skip
        if NEED_DX:
            item = ticket - lag
            if (item >= 0) & (item < items):
                n = item // strips
                strip = item % strips
                wait(done_ptr + n, strips + 1)
                begin = (n * blocks_s + strip * TILES) * blocks_c
                end = (n * blocks_s + tl.minimum((strip + 1) * TILES, blocks_s)) * blocks_c
                for tile in range(begin, end):
                    apply_backward_tile(
                        tile, dy_ptr, x_ptr, channel_gate_ptr, spatial_gate_ptr, dq_ptr, d_mean_ptr,
                        ws_ptr, dx_ptr, C, S, blocks_s, stride_dyn, pitch_dy, half_dy,
                        stride_xn, pitch_x, stride_dxn, pitch_dx,
                        COMBINE, RESIDUAL, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C, BLOCK_S,
                        EVICT_FIRST, False,
                    )  # fmt: skip
        ticket = draw(counters_ptr)
