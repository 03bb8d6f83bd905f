"""Which bytes of a torch storage nothing has written yet.

A tracked storage is filled with POISON when it is allocated.  A byte counts as written
once a kernel has stored to it, or when its element no longer holds the pattern at the next
launch (a host write).  Kernel writes are exact.  Host writes of exactly the pattern are
missed: 0xFEFE is a NaN in fp16 and about -1.7e38 in bf16 and fp32.  For 1-byte dtypes, where
the pattern is an ordinary value, any in-place torch operation marks the whole tensor written.
"""

import ctypes
import threading

import numpy as np

POISON = 0xFE
_tracked = {}  # storage id -> Tracked; the weak reference keeps the id unique
_lock = threading.Lock()


class Tracked:
    def __init__(self, reference, low, nbytes):
        self.reference, self.low, self.nbytes = reference, low, nbytes
        self.written = np.zeros(nbytes, bool)

    def initialised(self, raw, low, itemsize, changed):
        """Mask for the bytes ``raw`` at host address ``low``."""
        if itemsize == 1 and changed:
            return np.ones(raw.size, bool)
        touched = np.repeat((raw.reshape(-1, itemsize) != POISON).any(axis=1), itemsize)
        return touched | self.written[low - self.low : low - self.low + raw.size]

    def mark(self, low, mask):
        self.written[low - self.low : low - self.low + mask.size] |= mask


def track(tensor):
    """Fill the storage of a fresh CPU tensor with the pattern and remember it."""
    from torch.multiprocessing.reductions import StorageWeakRef

    storage = tensor.untyped_storage()
    low, nbytes = storage.data_ptr(), storage.nbytes()
    if not low or not nbytes:
        return
    ctypes.memset(low, POISON, nbytes)
    with _lock:
        if len(_tracked) % 64 == 63:
            for key in [k for k, t in _tracked.items() if t.reference.expired()]:
                del _tracked[key]
        _tracked[storage._cdata] = Tracked(StorageWeakRef(storage), low, nbytes)


def find(tensor):
    """The Tracked record of a tensor's storage, or None."""
    if not _tracked:
        return None
    storage = tensor.untyped_storage()
    found = _tracked.get(storage._cdata)
    return (
        found
        if found and (found.low, found.nbytes) == (storage.data_ptr(), storage.nbytes())
        else None
    )


def changed_on_host(tensor):
    try:
        return tensor._version > 0
    except RuntimeError:  # inference tensors do not count
        return True


def forget():
    with _lock:
        _tracked.clear()
