"""Simulated global memory: allocations with red zones, bounds and initialisation checks.

Address windows (64-bit generic addresses):
  global   GLOBAL_BASE ...          one allocation per argument, red zones in between
  shared   SHARED_WINDOW + offset   offset 0 is the start of the CTA's shared memory;
                                    bits 24.. of the offset hold rank+1 after ``mapa``
  local    LOCAL_WINDOW + offset    private to each thread
"""

import bisect
import ctypes

import numpy as np

from . import poison
from .errors import MisalignedAccess, OutOfBounds, UninitialisedRead
from .poison import POISON

GLOBAL_BASE = 1 << 36
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57
RED_ZONE = 4096


class DeviceArray(np.ndarray):
    """An ndarray made by ``gpulab.empty``: elements still holding the poison pattern count as
    never written, and reading one in a kernel is an error."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        plain = np.asarray(array)  # results of arithmetic are ordinary arrays
        return plain[()] if return_scalar else plain


def empty(shape, dtype=np.float32):
    """An uninitialised array whose never-written elements must not be read by a kernel."""
    array = np.empty(shape, dtype).view(DeviceArray)
    array.view(np.ndarray).reshape(-1).view(np.uint8)[:] = POISON
    return array


class HostBuffer:
    """The memory of one array argument."""

    def __init__(self, array, name):
        self.array, self.name = array, name
        if isinstance(array, np.ndarray):
            low, high = (
                np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data,) * 2
            )
            root = array
            while isinstance(root.base, np.ndarray):
                root = root.base
            origin, end = np.lib.array_utils.byte_bounds(root) if root.size else (low, high)
            self.tracked, self.root_phase = None, 0
            self.pointer, self.itemsize = array.ctypes.data, array.itemsize
            self.writeable, self.poisoned = array.flags.writeable, isinstance(array, DeviceArray)
            self.kind = f"{array.dtype}{list(array.shape)}"
        else:  # a torch CPU tensor
            storage = array.untyped_storage()
            origin = storage.data_ptr()
            self.pointer, self.itemsize, extent = array.data_ptr(), array.element_size(), 0
            if array.numel():
                spans = zip(array.shape, array.stride(), strict=True)
                extent = sum((n - 1) * stride for n, stride in spans) + 1
            else:
                self.pointer = origin  # of an empty tensor torch says 0, wherever its storage is
            low, high = self.pointer, self.pointer + extent * self.itemsize
            end, self.root_phase = origin + storage.nbytes(), origin % 16
            self.tracked = poison.find(array) if high > low else None
            self.changed = self.tracked is not None and poison.changed_on_host(array)
            self.writeable, self.poisoned = True, self.tracked is not None
            self.kind = f"{str(array.dtype).replace('torch.', '')}{list(array.shape)}"
        self.low, self.high = low, high
        self.root = (min(low, origin), max(high, end))  # the whole allocation
        self.phase = (
            low - self.root[0] + self.root_phase
        ) % 256  # allocations start 256-byte aligned


def host_bytes(low, high):
    if high <= low:
        return np.empty(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)


class AddressSpace:
    """Remembers the device address given to each host allocation, so that a sequence of launches
    sharing an L2 model sees stable addresses.  Ranges of dead allocations are used again."""

    def __init__(self):
        self.ranges = []  # (low, high, device address)
        self.free = []  # (size, device address, 256-byte aligned)
        self.next = GLOBAL_BASE + RED_ZONE

    def place(self, low, high, phase=0):
        for lo, hi, address in self.ranges:
            if lo <= low and high <= hi and (address + low - lo - phase) % 256 == 0:
                return address + low - lo
        dead = [r for r in self.ranges if r[0] < high and low < r[1]]
        self.ranges = [r for r in self.ranges if r not in dead]
        self.free += [(hi - lo, address // 256 * 256) for lo, hi, address in dead]
        fits = [f for f in self.free if high - low <= f[0] <= 2 * (high - low)]
        if fits:
            best = min(fits)
            self.free.remove(best)
            address = best[1] + phase
        else:
            address = -(-self.next // 256) * 256 + phase
            self.next = address + (high - low) + RED_ZONE
        self.ranges.append((low, high, address))
        return address


class Region:
    """One allocation (overlapping argument arrays share one)."""

    def __init__(self, low, high, address, buffers):
        self.low, self.high, self.address, self.buffers = low, high, address, buffers
        self.end = address + high - low
        self.offset = address - GLOBAL_BASE
        self.dirty = False
        self.init = None
        self.shift = 0  # sectors from here to the home of the allocation

    def describe(self):
        return " / ".join(f"'{b.name}' ({b.kind})" for b in self.buffers)


class GlobalMemory:
    def __init__(self, buffers, space):
        self.regions = []
        for b in sorted(buffers, key=lambda b: (b.low, b.high)):
            last = self.regions[-1] if self.regions else None
            if last and b.low < last[1]:
                last[1] = max(last[1], b.high)
                last[2].append(b)
            else:
                self.regions.append([b.low, b.high, [b]])
        self.regions = self._place(space)
        self.regions.sort(key=lambda r: r.address)
        self.starts = [r.address for r in self.regions]
        shifts = np.array([r.shift for r in self.regions], np.int64)
        self._shifts = shifts if shifts.any() else None
        self._start_sectors = np.array([r.offset >> 5 for r in self.regions], np.int64)
        self.data = np.zeros(self.size, np.uint8)
        self._views = {}
        for r in self.regions:
            self.data[r.offset : r.offset + r.high - r.low] = host_bytes(r.low, r.high)
            if any(b.poisoned for b in r.buffers):
                r.init = self._initialised(r)

    def _place(self, space):
        """One Region per stretch of memory.  Disjoint stretches of one allocation are moved apart,
        to have red zones between them; ``home`` gives the caches the sectors of the real layout."""
        placed, used = [], set()
        for lo, hi, buffers in self.regions:
            low, high = min(b.root[0] for b in buffers), max(b.root[1] for b in buffers)
            home = space.place(low, high, buffers[0].root_phase) + lo - low
            placed.append((lo, hi, buffers, home, home - (lo - low)))
        out, end = [], space.next
        for lo, hi, buffers, home, root in placed:
            address = home
            if root in used:
                address = -(-end // 256) * 256 + home % 256
                end = address + (hi - lo) + RED_ZONE
            used.add(root)
            region = Region(lo, hi, address, buffers)
            region.shift = (home - address) // 32
            out.append(region)
        self.size = -(-(end - GLOBAL_BASE + 64) // 64) * 64
        return out

    def home(self, sectors):
        """Sectors as the caches see them."""
        if self._shifts is None or not sectors.size:
            return sectors
        return (
            sectors + self._shifts[np.searchsorted(self._start_sectors, sectors, side="right") - 1]
        )

    def _initialised(self, r):
        init = np.ones(r.high - r.low, bool)
        raw = host_bytes(r.low, r.high)
        for b in r.buffers:
            if b.poisoned:
                part = raw[b.low - r.low : b.high - r.low]
                if b.tracked is not None:
                    mask = b.tracked.initialised(part, b.low, b.itemsize, b.changed)
                else:
                    mask = np.repeat(
                        (part.reshape(-1, b.itemsize) != POISON).any(axis=1), b.itemsize
                    )
                init[b.low - r.low : b.high - r.low] = mask
        return init

    def address_of(self, buffer):
        for r in self.regions:
            if r.low <= buffer.low and buffer.high <= r.high:
                return r.address + buffer.pointer - r.low
        raise KeyError(buffer.name)

    def write_back(self):
        for r in self.regions:
            if r.dirty:
                for b in r.buffers:
                    if not b.writeable:
                        raise OutOfBounds(f"kernel wrote to read-only array '{b.name}'")
                host_bytes(r.low, r.high)[:] = self.data[r.offset : r.offset + r.high - r.low]
                for b in r.buffers:
                    if b.tracked is not None:
                        b.tracked.mark(b.low, r.init[b.low - r.low : b.high - r.low])

    def view(self, nbytes, count=1):
        """The memory as (rows of ``count``) unsigned integers of ``nbytes``."""
        v = self._views.get((nbytes, count))
        if v is None:
            v = self.data[: self.size // (nbytes * count) * nbytes * count].view(f"u{nbytes}")
            v = self._views[nbytes, count] = v.reshape(-1, count) if count > 1 else v
        return v

    # ---- checks -----------------------------------------------------------
    def check(self, addr, size, ins, who):
        """Verify alignment and bounds of the accesses; returns the Region if there is only one."""
        if size > 1 and int(np.bitwise_or.reduce(addr)) & (size - 1):
            bad = int(np.flatnonzero(addr & np.uint64(size - 1))[0])
            raise MisalignedAccess(
                f"{size}-byte access to address {int(addr[bad]):#x} by {who(bad)}", ins
            )
        low, high = int(addr.min()), int(addr.max()) + size
        i = bisect.bisect_right(self.starts, low) - 1
        if i >= 0 and high <= self.regions[i].end:
            return self.regions[i]
        self._check_each(addr, size, ins, who)
        return None

    def region_indices(self, addr):
        return np.searchsorted(np.array(self.starts, np.uint64), addr, side="right") - 1

    def _check_each(self, addr, size, ins, who):
        index = self.region_indices(addr)
        ends = np.array([r.end for r in self.regions], np.uint64)
        bad = (
            (index < 0) | (addr + np.uint64(size) > ends[np.maximum(index, 0)])
            if len(ends)
            else np.ones(addr.size, bool)
        )
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            a = int(addr[lane])
            raise OutOfBounds(
                f"{size}-byte access out of bounds: address {a:#x}, {self._nearest(a)}, by "
                f"{who(lane)}; "
                f"{int(bad.sum())} lane(s) affected",
                ins,
            )

    def _nearest(self, a):
        best = min(self.regions, default=None, key=lambda r: max(r.address - a, a - r.end + 1, 0))
        if best is None or not (best.address - (1 << 30) < a < best.end + (1 << 30)):
            return "not near any allocation"
        if a < best.address:
            return f"{best.address - a} bytes before {best.describe()}"
        return f"{a - best.end} bytes past the end of {best.describe()}"

    def name_of(self, offset):
        """Human name of a byte offset into the simulated memory."""
        for r in self.regions:
            if r.offset <= offset < r.offset + r.high - r.low:
                return f"byte {offset - r.offset} of {r.describe()}"
        return f"address {GLOBAL_BASE + offset:#x}"

    def _each_region(self, addr, region):
        if region is not None:
            yield region, slice(None)
            return
        index = self.region_indices(addr)
        for i in np.unique(index):
            yield self.regions[i], index == i

    def check_initialised(self, addr, size, ins, who, region):
        for r, sel in self._each_region(addr, region):
            if r.init is None:
                continue
            at = (addr[sel] - np.uint64(r.address)).astype(np.int64)
            ok = r.init[at[:, None] + np.arange(size)].all(axis=1)
            if not ok.all():
                lane = int(np.flatnonzero(~ok)[0])
                lane_all = lane if isinstance(sel, slice) else int(np.flatnonzero(sel)[lane])
                raise UninitialisedRead(
                    f"read of never-written memory: byte {int(at[lane])} of {r.describe()}, "
                    f"by {who(lane_all)}",
                    ins,
                )

    def mark_written(self, addr, size, region):
        for r, sel in self._each_region(addr, region):
            r.dirty = True
            if r.init is not None:
                at = (addr[sel] - np.uint64(r.address)).astype(np.int64)
                r.init[at[:, None] + np.arange(size)] = True
