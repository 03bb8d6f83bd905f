"""Cache models, in 32-byte sectors.

``L2Cache``: LRU over 128-byte lines with 32-byte sectors, write-back.  Accesses are
processed in small batches (at most 1/16 of the capacity), within which the order does
not matter; across batches replacement is exact LRU.  Stores allocate without reading
DRAM (byte-masked write-back).

Eviction priorities: a line has the priority of its latest access (``unchanged`` keeps the one
it has).  ``evict_first`` lines are the first victims and ``evict_last`` lines the last, LRU among
equals.  This is a simplification: hardware limits the share of evict_last lines, demotes them
over time and chooses victims within a set.  ``no_allocate`` reads that miss leave no line behind.

``L1Filter``: a direct-mapped, write-through L1 per SM that only decides which plain loads
reach the L2.  It starts empty in every launch.
"""

import numpy as np

from .memory import AddressSpace

SECTOR, LINE = 32, 128
FIRST, NORMAL, LAST = 0, 1, 2  # victims are taken in this order
UNCHANGED, NO_ALLOCATE = 3, 4
POLICY_NAMES = ("evict_first", "evict_normal", "evict_last", "evict_unchanged", "no_allocate")


class L2Cache:
    def __init__(self, nbytes):
        self.capacity = max(1, int(nbytes) // LINE)
        self.batch = max(1, self.capacity // 16)
        self.space = AddressSpace()
        self.read_sectors = self.read_hits = self.write_sectors = 0
        self.dram_read = self.dram_written = 0  # bytes
        self._clock, self._resident = 1, 0
        self._valid = np.zeros((0, 4), bool)
        self._dirty = np.zeros((0, 4), bool)
        self._last = np.zeros(0, np.int64)  # time of last use; 0 = absent
        self._mark = np.zeros(0, np.int64)  # scratch, one per sector
        self._class = np.zeros(0, np.int8)  # FIRST, NORMAL or LAST
        self._queues, self._queued = ([], [], []), 0  # per class: (lines, times), oldest first
        self.policies = np.zeros(
            (len(POLICY_NAMES), 3), np.int64
        )  # read sectors, read hits, written sectors

    def access(self, sectors, write, policy=NORMAL):
        """Sector indices (relative to the address space) in the order of the accesses."""
        if not sectors.size:
            return
        self._grow(int(sectors.max()) // 4 + 1)
        for i in range(0, sectors.size, self.batch):
            self._access(sectors[i : i + self.batch], write, policy)

    def prefetch(self, sectors):
        """Reads them from DRAM; nothing goes to an SM, so it is no read of the cache."""
        before = self.read_sectors, self.read_hits, self.policies.copy()
        self.access(sectors, False)
        self.read_sectors, self.read_hits, self.policies = before

    def present(self, sectors):
        """Mask of the sectors that are in the cache."""
        valid = self._valid.reshape(-1)
        known = sectors < valid.size
        return known & valid[np.where(known, sectors, 0)] if valid.size else known

    def _grow(self, lines):
        have = self._last.size
        if lines > have:
            more = max(lines, 2 * have) - have
            self._valid = np.concatenate([self._valid, np.zeros((more, 4), bool)])
            self._dirty = np.concatenate([self._dirty, np.zeros((more, 4), bool)])
            self._last = np.concatenate([self._last, np.zeros(more, np.int64)])
            self._class = np.concatenate([self._class, np.full(more, NORMAL, np.int8)])
            self._mark = np.zeros(4 * self._last.size, np.int64)

    def _access(self, sectors, write, policy):
        valid, dirty = self._valid.reshape(-1), self._dirty.reshape(-1)
        if write:
            self.write_sectors += sectors.size
            self.policies[policy, 2] += sectors.size
            valid[sectors] = True
            dirty[sectors] = True
        else:
            self.read_sectors += sectors.size
            miss = sectors[~valid[sectors]]
            count = self._distinct(miss)
            self.read_hits += sectors.size - count
            self.policies[policy, :2] += sectors.size, sectors.size - count
            self.dram_read += SECTOR * count
            if policy == NO_ALLOCATE:
                sectors = sectors[self._last[sectors >> 2] != 0]
                miss = miss[self._last[miss >> 2] != 0]
            valid[miss] = True
        lines = sectors >> 2
        if lines.size > 1:
            lines = lines[np.concatenate([lines[1:] != lines[:-1], [True]])]
        self._resident += self._distinct(lines[self._last[lines] == 0])
        times = self._clock + np.arange(lines.size)
        self._clock += lines.size
        self._last[lines] = times  # of repeated lines the last wins
        if policy <= LAST:
            self._class[lines] = policy
            self._queues[policy].append((lines, times))
        else:
            for c in np.unique(self._class[lines]):
                of_class = self._class[lines] == c
                self._queues[c].append((lines[of_class], times[of_class]))
        self._queued += lines.size
        if self._resident > self.capacity:
            self._evict(self._resident - self.capacity)
        if self._queued > 4 * self.capacity + (1 << 16):
            self._compact()

    def _distinct(self, values):
        """Number of different values (without sorting)."""
        order = np.arange(values.size)
        self._mark[values] = order
        return int(np.count_nonzero(self._mark[values] == order))

    def _evict(self, count):
        while count > 0:
            queue = next(q for q in self._queues if q)
            lines, times = queue[0]
            live = np.flatnonzero(self._last[lines] == times)[:count]
            victims = lines[live]
            self._drop(victims)
            count -= victims.size
            used = int(live[-1]) + 1 if count == 0 and live.size else lines.size
            self._queued -= used
            if used == lines.size:
                queue.pop(0)
            else:
                queue[0] = (lines[used:], times[used:])

    def _drop(self, lines):
        self.dram_written += SECTOR * int(self._dirty[lines].sum())
        self._valid[lines] = False
        self._dirty[lines] = False
        self._last[lines] = 0
        self._class[lines] = NORMAL
        self._resident -= lines.size

    def _compact(self):
        lines = np.flatnonzero(self._last)
        lines = lines[np.argsort(self._last[lines])]
        self._queued = lines.size
        self._queues = tuple(
            [(mine, self._last[mine])] if mine.size else []
            for mine in (lines[self._class[lines] == c] for c in (FIRST, NORMAL, LAST))
        )

    @property
    def dirty_bytes(self):
        """Bytes that still have to be written to DRAM."""
        return SECTOR * int(self._dirty.sum())

    def flush(self):
        """Write all dirty sectors back (they stay resident); returns the bytes written."""
        n = self.dirty_bytes
        self._dirty[:] = False
        self.dram_written += n
        return n

    def clear(self):
        """Write back and drop everything (a cold cache)."""
        n = self.flush()
        self._drop(np.flatnonzero(self._last))
        self._queues, self._queued = ([], [], []), 0
        return n

    def snapshot(self):
        return (
            self.read_sectors,
            self.read_hits,
            self.write_sectors,
            self.dram_read,
            self.dram_written,
        )


class L1Filter:
    def __init__(self, sms, nbytes):
        self.entries = max(1, int(nbytes) // SECTOR)
        self.table = np.full(sms * self.entries, -1, np.int32)
        self.mark = np.zeros(self.table.size, np.int32)
        self.hits = 0

    def misses(self, sm, sectors, allocate=True):
        """Mask of the accesses that go to the L2 (several misses on one sector go once)."""
        at = sm * self.entries + sectors % self.entries
        miss = self.table[at] != sectors
        if allocate and miss.any():
            where = np.flatnonzero(miss)
            entry, sector = at[where], sectors[where]
            order = np.arange(where.size)
            self.table[entry] = sector
            self.mark[entry] = order
            miss[where] = (self.mark[entry] == order) | (self.table[entry] != sector)
        self.hits += sectors.size - int(np.count_nonzero(miss))
        return miss
