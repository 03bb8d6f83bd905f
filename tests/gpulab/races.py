"""Data-race checkers for shared and global memory, between warps."""

import numpy as np

from .errors import GlobalRace, SharedRace, UninitialisedRead

ID_BITS = 24
ID_MASK = (1 << ID_BITS) - 1
MANY, ATOMIC, ASYNC = ID_MASK, ID_MASK - 1, ID_MASK - 2  # pseudo warp ids


class SharedRaces:
    """Last writer and last reader of every granule of shared memory, stamped with barrier time.

    ``time`` advances whenever a barrier completes; a warp is ordered after everything
    stamped before its own last barrier.  Stores of the value already there do not race
    with other stores (compilers let several warps store the same result).  A wait on an mbarrier
    orders a warp after everything before the completion of the phase.  A granule without a
    write stamp has never been written.
    """

    def __init__(self, machine, granule, check_written=True):
        self.m, self.granule, self.check_written = machine, granule, check_written
        words = machine.smem.size // granule
        self.write_stamp = np.zeros(words, np.int64)
        self.read_stamp = np.zeros(words, np.int64)
        warps = machine.slots * machine.warps_per_cta
        self.time = 1
        self.synced = np.zeros(warps, np.int64)  # time of the warp's last CTA barrier
        self.cluster_synced = np.zeros(warps, np.int64)  # ... of its last cluster barrier
        self.accessed = np.zeros(machine.slots, np.int64)  # time of the last access by another CTA
        self.fenced = np.zeros(warps, np.int64)  # time of the warp's last fence.proxy.async

    def barrier(self, warps, cluster=False):
        self.time += 1
        self.synced[warps] = self.time
        if cluster:
            self.cluster_synced[warps] = self.time

    def acquire(self, warps, time):
        """The warps have seen an mbarrier phase that completed at ``time``."""
        self.synced[warps] = np.maximum(self.synced[warps], time)
        if self.m.cluster_size > 1:
            self.cluster_synced[warps] = np.maximum(self.cluster_synced[warps], time)

    def proxy_fence(self, warps):
        self.time += 1
        self.fenced[warps] = self.time

    def forget(self, flat, size):
        """The contents become undefined (an asynchronous copy is under way)."""
        self.write_stamp[self._cells(flat, size)] = 0

    def mark(self, flat, size):
        """Written, by an access that is not checked for races."""
        cells = self._cells(flat, size)
        stamp = self.write_stamp[cells]
        self.write_stamp[cells] = np.where(stamp == 0, ATOMIC, stamp)

    def landed(self, flat, size):
        """An asynchronous copy has arrived: only waiting on its mbarrier orders a warp after it."""
        self.write_stamp[self._cells(flat, size)] = self.time << ID_BITS | ASYNC

    def unfenced(self, flat, nbytes, warp):
        """First byte that the async proxy may not read yet, and the warp that stored it (None:
        nobody did)."""
        first = flat // self.granule
        stamp = self.write_stamp[first : first + nbytes // self.granule]
        if self.check_written and not stamp.all():
            return (first + int(np.flatnonzero(stamp == 0)[0])) * self.granule, None
        who, time = (stamp & ID_MASK) - 1, stamp >> ID_BITS
        plain = (stamp != 0) & (who < ASYNC - 1)
        late = plain & (self.fenced[np.where(plain, who, 0)] <= time) & (self.fenced[warp] <= time)
        if not late.any():
            return None, None
        i = int(np.flatnonzero(late)[0])
        return (first + i) * self.granule, int(who[i]) % self.m.warps_per_cta

    def reset(self, first_slot, end_slot):
        start, end = first_slot * self.m.shared_stride, end_slot * self.m.shared_stride
        warps = slice(first_slot * self.m.warps_per_cta, end_slot * self.m.warps_per_cta)
        self.accessed[first_slot:end_slot] = 0
        self.write_stamp[start // self.granule : end // self.granule] = 0
        self.read_stamp[start // self.granule : end // self.granule] = 0
        self.synced[warps] = self.cluster_synced[warps] = self.time

    def _cells(self, flat, size):
        cell = flat // self.granule
        k = max(1, size // self.granule)
        return cell[:, None] if k == 1 else cell[:, None] + np.arange(k)

    def _unordered(self, stamp, me, since):
        """Stamps of other warps not separated from warp ``me`` by a barrier."""
        who = stamp & ID_MASK
        hit = (stamp != 0) & (who != me + 1) & ((stamp >> ID_BITS) >= since)
        if self.m.cluster_size > 1:  # another CTA: only a cluster barrier orders
            per_cta = self.m.warps_per_cta
            other = (stamp != 0) & (who < ASYNC) & ((who - 1) // per_cta != me // per_cta)
            late = other & ((stamp >> ID_BITS) >= self.cluster_synced[me])
            hit = np.where(other, late, hit)
        return hit

    def _report(self, hit, stamp, cells, me, verb, previous, ins):
        i, j = (int(v[0]) for v in np.nonzero(hit))
        who = int(stamp[i, j] & ID_MASK)
        names = {MANY: "several warps", ATOMIC: "an atomic", ASYNC: "an asynchronous copy"}
        name = names.get(who, f"warp {(who - 1) % self.m.warps_per_cta}")
        byte = int(cells[i, j]) * self.granule % self.m.shared_stride
        mine = int(me[i, 0])
        cta = self.m.cta_name(mine // self.m.warps_per_cta)
        raise SharedRace(
            f"shared memory byte {byte} of {cta}: warp {mine % self.m.warps_per_cta} {verb} what "
            f"{name} {previous}, with no barrier in between",
            ins,
        )

    def _unwritten(self, stamp, cells, me, ins):
        i, j = (int(v[0]) for v in np.nonzero(stamp == 0))
        byte, warp = int(cells[i, j]) * self.granule, int(me[i, 0])
        reader, owner = (
            self.m.cta_name(v) for v in (warp // self.m.warps_per_cta, byte // self.m.shared_stride)
        )
        raise UninitialisedRead(
            f"warp {warp % self.m.warps_per_cta} of {reader} reads shared memory byte "
            f"{byte % self.m.shared_stride} of {owner}, which nothing has written (or to which an "
            "asynchronous copy is still under way)",
            ins,
        )

    def read(self, flat, size, warps, ins):
        cells, me = self._cells(flat, size), warps[:, None].astype(np.int64)
        since = self.synced[me]
        w = self.write_stamp[cells]
        if self.check_written and not w.all():
            self._unwritten(w, cells, me, ins)
        hit = self._unordered(w, me, since)
        if hit.any():
            self._report(hit, w, cells, me, "reads", "wrote", ins)
        r = self.read_stamp[cells]
        mine = (self.time << ID_BITS) | (me + 1)
        shared_read = (self.time << ID_BITS) | MANY
        stamp = np.where(self._unordered(r, me, since), shared_read, mine)
        self.read_stamp[cells] = stamp
        lost = self.read_stamp[cells] & ID_MASK
        several = (lost != me + 1) & (lost != MANY)
        if several.any():
            self.read_stamp[cells[several]] = shared_read

    def write(self, flat, size, warps, ins, changes=None, atomic=False):
        """``changes``: per lane, whether the store alters memory (for store/store conflicts)."""
        cells, me = self._cells(flat, size), warps[:, None].astype(np.int64)
        since = self.synced[me]
        r = self.read_stamp[cells]
        hit = self._unordered(r, me, since)
        if hit.any():
            self._report(hit, r, cells, me, "writes", "read", ins)
        w = self.write_stamp[cells]
        hit = self._unordered(w, me, since)
        if atomic:
            hit &= (w & ID_MASK) != ATOMIC
        elif changes is not None:
            hit &= changes[:, None]
        if hit.any():
            self._report(hit, w, cells, me, "writes", "wrote", ins)
        mine = (self.time << ID_BITS) | (ATOMIC if atomic else me + 1)
        self.write_stamp[cells] = mine

    def remote_access(self, target_slots):
        self.accessed[target_slots] = self.time

    def exit(self, slots):
        """A CTA must not exit while others of its cluster may still access its shared memory."""
        warps = slots[:, None] * self.m.warps_per_cta + np.arange(self.m.warps_per_cta)
        bad = (self.accessed[slots] > 0) & (
            self.accessed[slots] >= self.cluster_synced[warps].max(axis=1)
        )
        if bad.any():
            name = self.m.cta_name(int(slots[np.flatnonzero(bad)[0]]))
            raise SharedRace(
                f"{name} exits although another CTA of its cluster has accessed its shared memory, "
                "with no cluster barrier in between"
            )

    def same_instruction(self, flat, size, values_match, warps, ins):
        """Two warps storing different values to one place with the same instruction."""
        cells, me = self._cells(flat, size), warps[:, None].astype(np.int64)
        w = self.write_stamp[cells]
        hit = ((w & ID_MASK) != me + 1) & ~values_match[:, None]
        if hit.any():
            self._report(hit, w, cells, me, "writes", "wrote", ins)


class GlobalRaces:
    """Flags a plain load of data plainly stored by another warp of the launch, unless a barrier of
    their CTA, or a release (or fence) after the store and an acquire (or fence) before the load,
    stand between them.

    A release is for its warp's stores and for those of its CTA's other warps that a barrier has
    put before it; an acquire is for its warp's loads and, from the next barrier on, for its CTA's.
    Warps are numbered through the whole grid. Not tracked per lane, and no false races.
    """

    def __init__(self, machine, granule):
        self.m, self.granule = machine, granule
        self.stamp = None  # allocated on the first store
        self.low, self.high = 1 << 62, -1
        self.step = 1
        warps = machine.total_ctas * machine.warps_per_cta
        self.synced = np.zeros(warps, np.int64)  # step of the warp's last CTA barrier
        self.released = np.zeros(warps, np.int64)  # of its last release
        self.acquired = np.zeros(warps, np.int64)  # of what it has acquired, itself or by a barrier
        self.all_released = np.zeros(machine.total_ctas, np.int64)  # the CTA's stores before this

    def release(self, warps):
        self.step += 1
        self.released[warps] = self.step
        np.maximum.at(self.all_released, warps // self.m.warps_per_cta, self.synced[warps])

    def acquire(self, warps):
        self.step += 1
        self.acquired[warps] = self.step

    def barrier(self, warps):
        """Of the CTAs of these warps, whose other warps take no part."""
        self.step += 1
        self.synced[warps] = self.step
        ctas, index = np.unique(warps // self.m.warps_per_cta, return_inverse=True)
        latest = np.zeros(ctas.size, np.int64)
        np.maximum.at(latest, index, self.acquired[warps])
        self.acquired[warps] = latest[index]

    def ordered(self, warps):
        """The warps have seen an mbarrier phase complete: nothing in their CTA is later."""
        self.step += 1
        self.synced[warps] = self.step

    def _cells(self, offset, size):
        k = max(1, size // self.granule)
        cell = offset // self.granule
        return cell[:, None] if k == 1 else cell[:, None] + np.arange(k)

    def store(self, offset, size, warps):
        if self.stamp is None:
            self.stamp = np.zeros(self.m.gmem.size // self.granule + 16, np.int64)
        self.low, self.high = (
            min(self.low, int(offset.min())),
            max(self.high, int(offset.max()) + size),
        )
        self.step += 1
        self.stamp[self._cells(offset, size)] = ((self.step << ID_BITS) | (warps + 1))[:, None]

    def load(self, offset, size, warps, ins, who):
        if self.stamp is None or int(offset.max()) < self.low or int(offset.min()) >= self.high:
            return
        w = self.stamp[self._cells(offset, size)]
        writer, me = (w & ID_MASK) - 1, warps[:, None]
        other = (w != 0) & (writer != me)
        if not other.any():
            return
        t, writer = w >> ID_BITS, np.maximum(writer, 0)
        cta, mine = writer // self.m.warps_per_cta, me // self.m.warps_per_cta
        other &= (cta != mine) | (self.synced[me] <= t)
        unreleased = (self.released[writer] <= t) & (self.all_released[cta] <= t)
        bad = other & (unreleased | (self.acquired[me] <= t))
        if bad.any():
            lane, j = (int(v[0]) for v in np.nonzero(bad))
            where = self.m.gmem.name_of(int(offset[lane]))
            warp = int(writer[lane, j]) % self.m.warps_per_cta
            by = f"warp {warp} of CTA {self.m.cta_coords(int(cta[lane, j]))}"
            if cta[lane, j] == mine[lane, 0]:
                why = "no barrier in between"
            elif unreleased[lane, j]:
                why = (
                    "the writer has not released it (no fence or .release after the store, or no "
                    "barrier between the store and another warp's)"
                )
            else:
                why = (
                    "the reader has not acquired it (no fence or .acquire since the store, or no "
                    "barrier after another warp's)"
                )
            raise GlobalRace(
                f"{who(lane)} plainly loads {where}, stored in this launch by {by}: {why}", ins
            )
