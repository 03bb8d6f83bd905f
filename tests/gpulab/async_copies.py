"""mbarriers, bulk copies and asynchronous stores: what is in flight, and when it lands.

Completion is adversarial.  Data bound to an mbarrier lands when somebody waits on that
mbarrier and nothing but the data is missing; a bulk group's source is read, and its
destination written, when the group is waited for (or the thread exits).  With a seed,
each copy may instead land at once.
"""

import numpy as np

from .errors import AsyncError, UninitialisedRead


class Mbarrier:
    def __init__(self, count):
        self.expected = self.pending = count
        self.tx = 0  # bytes expected less bytes landed
        self.phase = 0
        self.completed_at = 0  # race-checker time of the last completion
        self.time = self.completed_time = (
            0  # cycles: latest arrival of this phase, of the last (latency=True)
        )
        self.landings = []  # data in flight
        self.deferred = []  # cp.async.mbarrier.arrive: (lanes, copy number)

    def describe(self):
        return (
            f"phase {self.phase}: {self.pending} of {self.expected} arrivals and {self.tx} bytes "
            "missing"
            if self.tx >= 0
            else f"phase {self.phase}: {-self.tx} more bytes have landed than were expected"
        )


class Landing:
    """Bytes on their way into shared memory: row i of ``data`` goes to ``flat[i]``."""

    def __init__(self, flat, data, ins, time=0):
        self.flat, self.data, self.ins = flat, data, ins
        self.time = time  # cycles (latency=True)


class BulkStore:
    """A bulk copy from shared to global memory."""

    def __init__(self, flat, nbytes, before, write, ins):
        self.flat, self.nbytes, self.before, self.write, self.ins = flat, nbytes, before, write, ins
        self.data = None  # None until the source has been read
        self.done = False
        self.read_time = self.time = 0  # cycles (latency=True)


class AsyncCopies:
    def __init__(self, machine):
        self.m = machine
        self.barriers = {}  # index into shared memory -> Mbarrier
        self.open, self.groups = {}, {}  # lane -> BulkStores not committed / list of groups

    def barrier(self, flat, ins):
        found = self.barriers.get(flat)
        if found is None:
            m = self.m
            raise AsyncError(
                f"no mbarrier has been initialised at shared address {flat % m.shared_stride:#x} "
                "of "
                f"{m.cta_name(flat // m.shared_stride)}",
                ins,
            )
        return found

    def at_once(self):
        return self.m.rng is not None and self.m.rng.random() < 0.5

    # ---- mbarriers ------------------------------------------------------------
    def arrive(self, flat, count, ins):
        b = self.barrier(flat, ins)
        if count > b.pending:
            raise AsyncError(
                f"{count} arrival(s) at an mbarrier that waits for {b.pending} ({b.describe()})",
                ins,
            )
        b.pending -= count
        self.m.progressed = True
        self.settle(b)

    def expect(self, flat, nbytes, ins):
        b = self.barrier(flat, ins)
        b.tx += nbytes
        self.m.progressed = True

    def settle(self, b):
        if b.pending == 0 and b.tx == 0:
            races = self.m.shared_races
            races.time += 1
            b.completed_at = races.time
            b.phase, b.pending = b.phase + 1, b.expected
            b.completed_time, b.time = b.time, 0
            self.m.progressed = True

    def poll(self, flat, ins):
        """Somebody waits: land what alone is missing.  Returns the Mbarrier."""
        b = self.barrier(flat, ins)
        late = sum(lanes.size for lanes, _ in b.deferred)
        if b.deferred and b.pending == late:
            deferred, b.deferred = b.deferred, []
            for lanes, number in deferred:
                self.m.finish_copies(lanes, 0, True, ins, before=number)
                if self.m.latency is not None:
                    b.time = max(b.time, int(self.m.latency.landed[lanes >> 5].max()))
            b.pending -= late
            self.settle(b)
        if b.pending == 0 and b.landings:
            landings, b.landings = b.landings, []
            for landing in landings:
                self.land(landing, b)
            self.settle(b)
        return b

    def start(self, flat, landing, ins):
        b = self.barrier(flat, ins)
        self.m.progressed = True
        if self.at_once():
            self.land(landing, b)
            self.settle(b)
        else:
            b.landings.append(landing)

    def hide(self, landing, warps):
        """The destination is unusable from the start of the copy until it lands."""
        m, flat, size = self.m, landing.flat, landing.data.shape[1]
        m.shared_view(1, 1)[flat[:, None] + np.arange(size)] = 0xCB
        if m.checks:
            m.shared_races.write(flat, size, warps, landing.ins, np.ones(flat.size, bool))
            m.shared_races.forget(flat, size)

    def land(self, landing, b):
        m, size = self.m, landing.data.shape[1]
        m.shared_view(1, 1)[landing.flat[:, None] + np.arange(size)] = landing.data
        m.shared_races.landed(landing.flat, size)
        b.tx -= landing.data.size
        b.time = max(b.time, landing.time)

    # ---- bulk groups ----------------------------------------------------------
    def add(self, lane, store):
        self.open.setdefault(lane, []).append(store)
        if self.at_once():
            self.read(store)
            self.finish(store)

    def commit(self, lanes):
        for lane in lanes:
            self.groups.setdefault(lane, []).append(self.open.pop(lane, []))

    def wait(self, lanes, keep, read_only):
        for lane in lanes:
            groups = self.groups.get(lane, [])
            for group in groups[: len(groups) - keep]:
                for store in group:
                    if self.m.latency is not None:
                        self.m.latency.land(
                            np.array([lane]), store.read_time if read_only else store.time
                        )
                    self.read(store)
                    if not read_only:
                        self.finish(store)
            if not read_only and groups:
                self.groups[lane] = groups[len(groups) - keep :] if keep else []

    def read(self, store):
        if store.data is None:
            store.data = self.m.shared_view(1, 1)[store.flat : store.flat + store.nbytes].copy()
            if self.m.checks and (store.data != store.before).any():
                raise AsyncError(
                    "the shared-memory source of a bulk copy was overwritten before the copy had "
                    "read it "
                    "(no cp.async.bulk.wait_group.read in between)",
                    store.ins,
                )

    def finish(self, store):
        if not store.done:
            store.done = True
            store.write(store.data)

    # ---- the end of a thread or CTA ----------------------------------------------
    def exit(self, lanes):
        m = self.m
        if self.open or self.groups:
            for lane in (int(v) for v in lanes):
                for store in [s for g in self.groups.pop(lane, []) for s in g] + self.open.pop(
                    lane, []
                ):
                    if store.data is None and m.checks:
                        raise AsyncError(
                            f"a thread of {m.cta_name(lane // m.cta_lanes)} exits while its bulk "
                            "copy may "
                            "still read shared memory (no cp.async.bulk.wait_group.read)",
                            store.ins,
                        )
                    self.read(store)
                    self.finish(store)
        if self.barriers:
            gone = {int(s) for s in np.unique(lanes // m.cta_lanes) if m.alive_count[s] == 0}
            for flat in [f for f in self.barriers if f // m.shared_stride in gone]:
                b = self.barriers.pop(flat)
                if b.landings and m.checks:
                    raise AsyncError(
                        f"{m.cta_name(flat // m.shared_stride)} exits while data is still on its "
                        "way into "
                        "shared memory: nothing waited on the mbarrier",
                        b.landings[0].ins,
                    )

    def check_source(self, flat, nbytes, warp, ins):
        """A bulk copy reads shared memory: everything there must be written and fenced to the async
        proxy."""
        races, m = self.m.shared_races, self.m
        bad, why = races.unfenced(flat, nbytes, warp)
        if bad is None:
            return
        where = f"byte {bad % m.shared_stride} of {m.cta_name(bad // m.shared_stride)}"
        if why is None:
            raise UninitialisedRead(f"bulk copy of never-written shared memory: {where}", ins)
        raise AsyncError(
            f"bulk copy reads shared memory {where}, stored by warp {why} with no "
            "fence.proxy.async since",
            ins,
        )
