"""A kernel compiled for execution: basic blocks, liveness and one closure per instruction.

Closures are made when a block is first executed: much of a kernel is not, on a small map.
"""

from functools import cached_property

from . import ops_arith, ops_async, ops_memory, ops_warp  # noqa: F401  (they register their instructions)
from .counters import UNCHARGED, classify
from .errors import GpuLabError
from .operands import OPS, reader, unsupported
from .parser import TYPE_BYTES

WARP_SYNC = {"shfl", "vote", "match", "redux", "elect", "mma", "ldmatrix", "stmatrix"}
STRONG = {"volatile", "acquire", "relaxed", "release", "acq_rel", "mmio", "cv"}


def is_warp_sync(ins):
    return ins.op in WARP_SYNC or (ins.op in ("bar", "barrier") and "warp" in ins.mods)


def is_barrier(ins):
    return ins.op in ("bar", "barrier") and "warp" not in ins.mods


def ends_block(ins):
    return ins.op in ("bra", "ret", "exit", "brx") or is_barrier(ins)


class Block:
    """Instructions start..end-1; ``last`` is the terminator instruction or None (fall through)."""

    def __init__(self, index, instrs, start, end):
        self.index, self.start, self.end = index, start, end
        self.last = None
        self._instrs = instrs
        self.overwritten = frozenset()  # registers that are set here and needed afterwards
        self.converge = None  # first instruction, when it is a warp-level sync
        self.spin = False  # ends with the back edge of a loop that polls memory
        self.polls = []  # ... with these instructions
        self.guard = None

    @cached_property
    def code(self):
        """A closure for each instruction but the terminator."""
        end = self.end if self.last is None else self.end - 1
        return [_guarded(ins) for ins in self._instrs[self.start : end]]


class Program:
    def __init__(self, kernel):
        self.kernel = kernel
        self.instrs = kernel.instrs
        self._make_blocks()
        self._liveness()
        for block in self.blocks:
            self._terminator(block)
        self._classify()
        self.kinds = [classify(ins) for ins in self.instrs]
        self.block_issued = [
            sum(kind not in UNCHARGED for kind in self.kinds[b.start : b.end]) for b in self.blocks
        ]

    def _make_blocks(self):
        instrs = self.instrs
        leaders = {0}
        for ins in instrs:
            if ins.op == "bra":
                leaders.add(ins.target)
            if ends_block(ins):
                leaders.add(ins.pc + 1)
        synced = False
        for ins in instrs:  # split before the first warp-level sync of a block
            if ins.pc in leaders:
                synced = False
            if is_warp_sync(ins) and not synced:
                leaders.add(ins.pc)
                synced = True
        starts = sorted(p for p in leaders if p < len(instrs))
        self.blocks, self.block_at = [], {}
        for i, start in enumerate(starts):
            end = starts[i + 1] if i + 1 < len(starts) else len(instrs)
            block = Block(i, instrs, start, end)
            if ends_block(instrs[end - 1]):
                block.last = instrs[end - 1]
            if is_warp_sync(instrs[start]):
                block.converge = instrs[start]
            self.blocks.append(block)
            self.block_at[start] = block

    def successors(self, block):
        last, nxt = block.last, block.end
        out = []
        if last is not None and last.op == "bra":
            out.append(last.target)
            if not last.guard:
                nxt = None
        if last is not None and last.op in ("ret", "exit") and not last.guard:
            nxt = None
        if nxt is not None and nxt < len(self.instrs):
            out.append(nxt)
        return [self.block_at[p] for p in out if p in self.block_at]

    def _liveness(self):
        for block in self.blocks:
            use = defs = 0
            for ins in self.instrs[block.start : block.end]:
                for r in ins.reads():
                    if not defs >> r.slot & 1:
                        use |= 1 << r.slot
                for r in ins.writes():
                    defs |= 1 << r.slot
            block.use, block.defs, block.live_in_bits, block.live_out_bits = use, defs, use, 0
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                out = 0
                for s in self.successors(block):
                    out |= s.live_in_bits
                live_in = block.use | (out & ~block.defs)
                if out != block.live_out_bits or live_in != block.live_in_bits:
                    block.live_out_bits, block.live_in_bits = out, live_in
                    changed = True
        for block in self.blocks:
            bits = block.live_out_bits
            needed = bits
            if block.last is not None and is_barrier(
                block.last
            ):  # reads its operands after the flush
                needed |= sum(1 << slot for slot in {r.slot for r in block.last.reads()})
            needed &= block.defs
            written = {r.slot for ins in self.instrs[block.start : block.end] for r in ins.writes()}
            block.overwritten = frozenset(slot for slot in written if needed >> slot & 1)
            for ins in reversed(self.instrs[block.start : block.end]):
                written = ins.writes()
                ins.result_unused = all(not bits >> r.slot & 1 for r in written)
                for r in written:
                    bits &= ~(1 << r.slot)
                for r in ins.reads():
                    bits |= 1 << r.slot

    def _terminator(self, block):
        last = block.last
        if last is not None and last.guard:
            reg, negated = last.guard
            block.guard = (reg.slot, negated)
        if last is not None and last.op == "bra" and last.target <= last.pc:
            loop = self.instrs[last.target : last.pc]
            block.polls = [
                i.pc for i in loop if i.op == "atom" or (i.op == "ld" and STRONG & set(i.mods))
            ]
            block.spin = bool(block.polls)
            if any(i.op == "mbarrier" and {"test_wait", "try_wait"} & set(i.mods) for i in loop):
                block.polls, block.spin = [], True  # not woken by changes of global memory

    def _classify(self):
        sizes_shared, sizes_global = {4}, {4}
        self.communicates = False  # CTAs may wait for or order against each other
        self.uses_envreg = False
        for ins in self.instrs:
            spaces = {m.split("::")[0] for m in ins.mods}
            if ins.op in ("ld", "st", "atom", "red") and ins.types and "param" not in spaces:
                size = min(4, TYPE_BYTES[ins.type])
                if "shared" in spaces or "global" not in spaces:
                    sizes_shared.add(size)
                if "shared" not in spaces:
                    sizes_global.add(size)
                if "shared" not in spaces and (ins.op in ("atom", "red") or STRONG & set(ins.mods)):
                    self.communicates = True
            self.uses_envreg |= "%envreg" in ins.text
        self.shared_granule, self.global_granule = min(sizes_shared), min(sizes_global)


def _guarded(ins):
    """What executes an instruction, under its predicate."""
    try:
        if ins.op not in OPS:
            raise unsupported(ins)
        if OPS[ins.op].__module__ == ops_arith.__name__:
            ops_arith.check_form(ins)
        run = OPS[ins.op](ins)
    except Exception as error:  # raised only if the instruction is reached
        wrapped = error if isinstance(error, GpuLabError) else unsupported(ins, repr(error))

        def run(g, wrapped=wrapped):
            raise wrapped.with_traceback(None)

    if not ins.guard:
        return run
    slot, negated = ins.guard[0].slot, ins.guard[1]

    def guarded(g):
        p = g.get(slot)
        if negated:
            p = ~p
        if p.size == 1:
            if p[0]:
                run(g)
        elif p.all():
            run(g)
        elif p.any():
            g.mask = p
            run(g)
            g.mask = None

    return guarded


def operand_value(operand, g, ins):
    """Evaluate an integer operand of a terminator instruction."""
    return reader(operand, "u32", ins)(g)
