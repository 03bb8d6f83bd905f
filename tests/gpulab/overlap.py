"""Programmatic dependent launch: until ``griddepcontrol.wait``, earlier launches may still be
running.

``Overlap`` watches one launch.  It records which bytes the launch reads and writes (its
``Footprint``) and refuses accesses in conflict with the footprints of the launches that may be
running at the same time.  Launches still run one after the other: a conflict is an error, not a
wrong result."""

import numpy as np

from .errors import GpuLabError, OverlapError
from .memory import HostBuffer

READS, WRITES = 0, 1
VERBS = {READS: ("read", "read"), WRITES: ("write", "written")}


class ByteSet:
    """A set of bytes of the simulated memory, filled and tested by whole accesses."""

    def __init__(self, nbytes):
        self.bytes = np.zeros(nbytes, np.uint8)  # 0 or 255
        self._views = {}

    def _rows(self, size):
        if size not in self._views:
            self._views[size] = self.bytes.view(f"u{min(size, 8)}").reshape(-1, max(1, size // 8))
        return self._views[size]

    def add(self, offset, size):
        rows = self._rows(size)
        rows[offset // size] = ~rows.dtype.type(0)

    def hits(self, offset, size):
        return self._rows(size)[offset // size].any(axis=1)


class Footprint:
    """The bytes of the host's arrays that a launch has read and written."""

    def __init__(self, kernel, parts, arrays, pending=(), left=()):
        self.label = f" ({kernel})" if kernel else ""
        self.parts = parts  # [(address, end, packed bits read, packed bits written)]
        self.arrays = arrays  # kept alive, or their memory might be used again
        self.pending = pending  # launches that may be running when its dependents start
        self.left = left  # ... and even when it has ended

    def paint(self, gmem, kind, target):
        """Add the bytes read or written, as far as they are in ``gmem``, to ``target``."""
        for low, high, *bits in self.parts:
            for r in gmem.regions:
                first, end = max(low, r.low), min(high, r.high)
                if first < end:
                    mine = np.unpackbits(bits[kind], count=high - low)[first - low : end - low]
                    target[r.offset + first - r.low : r.offset + end - r.low] |= mine * np.uint8(
                        255
                    )

    def touches(self, gmem, kind, offset, size):
        target = np.zeros(gmem.size, np.uint8)
        self.paint(gmem, kind, target)
        return target[offset : offset + size].any()


def footprint_of(earlier):
    """Of a Report, or of an array that counts as read and written as a whole."""
    if isinstance(earlier, Footprint):
        return earlier
    if hasattr(earlier, "footprint"):
        if earlier.footprint is None:
            raise GpuLabError(
                f"overlap: {earlier.kernel} was launched without overlap=, so what it touched is "
                "unknown"
            )
        return earlier.footprint
    b = HostBuffer(earlier, "")
    bits = np.packbits(np.ones(b.high - b.low, bool))
    return Footprint(None, [(b.low, b.high, bits, bits)], [earlier])


class Overlap:
    def __init__(self, slots, gmem, earlier):
        self.gmem = gmem
        self.previous = [footprint_of(e) for e in earlier]
        self.running = tuple(dict.fromkeys(f for p in self.previous for f in (p, *p.pending)))
        self.left = tuple(dict.fromkeys(f for p in self.previous for f in p.left))
        self.before, self.after = self._sets(self.running), self._sets(self.left)
        self.mine = ByteSet(gmem.size), ByteSet(gmem.size)
        self.waited, self.triggered = np.zeros(slots, bool), np.zeros(slots, bool)
        self.awaited = self.in_time = (
            False  # some CTA has waited; ... before it let dependents start
        )

    def _sets(self, footprints):
        """What may not be read and what may not be written (None: there is nothing)."""
        if not footprints:
            return None
        reads, writes = ByteSet(self.gmem.size), ByteSet(self.gmem.size)
        for f in footprints:
            f.paint(self.gmem, WRITES, reads.bytes)
            f.paint(self.gmem, READS, writes.bytes)
        writes.bytes |= reads.bytes
        return reads, writes

    # ---- events -----------------------------------------------------------
    def start(self, slots):
        self.waited[slots] = self.triggered[slots] = False

    def wait(self, slots):
        self.waited[slots] = True
        self.awaited = True
        self.in_time |= not self.triggered[slots].all()

    def trigger(self, slots):
        self.triggered[slots] = True

    def access(self, kind, g, offset, size, ins, lane=None):
        """Of the active lanes of ``g``, or of one of them."""
        self.mine[kind].add(offset, size)
        if self.before is None:
            return
        slots = g.slots() if g.mask is None else g.slots()[g.mask]
        waited = self.waited[slots if lane is None else np.full(offset.size, slots[lane])]
        for lanes, sets in ((~waited, self.before), (waited, self.after)):
            if sets is not None and lanes.any():
                bad = lanes & sets[kind].hits(offset, size)
                if bad.any():
                    first = int(np.flatnonzero(bad)[0])
                    who = g.describe_lane(first if lane is None else lane)
                    self._report(kind, int(offset[first]), size, sets is self.before, ins, who)

    def finish(self, kernel):
        parts = []
        for r in self.gmem.regions:
            bits = [np.packbits(s.bytes[r.offset : r.offset + r.high - r.low]) for s in self.mine]
            parts.append((r.low, r.high, *bits))
        arrays = [b.array for r in self.gmem.regions for b in r.buffers]
        return Footprint(
            kernel,
            parts,
            arrays,
            self.left if self.in_time else self.running,
            self.left if self.awaited else self.running,
        )

    def _report(self, kind, offset, size, early, ins, who):
        """``kind`` of this launch at ``offset`` is in conflict with one of the footprints: say with
        which."""
        candidates = [
            (f, theirs)
            for f in (self.running if early else self.left)
            for theirs in (WRITES, READS)
            if WRITES in (kind, theirs)
        ]
        f, theirs = next((f, k) for f, k in candidates if f.touches(self.gmem, k, offset, size))
        which = (
            f"the previous launch{f.label}" if f in self.previous else f"an earlier launch{f.label}"
        )
        if not early:
            which += (
                "; a launch in between has not executed griddepcontrol.wait, "
                "so that its end is not enough"
            )
        elif f not in self.previous:
            which += (
                "; the previous launch lets its dependents start before it has waited for that one"
            )
        when = " before griddepcontrol.wait" if early else ""
        raise OverlapError(
            f"{VERBS[kind][0]}{when} of memory {VERBS[theirs][1]} by {which}: "
            f"{self.gmem.name_of(offset)}, by {who}",
            ins,
        )
