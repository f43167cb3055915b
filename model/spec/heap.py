"""The memory of the machine, and the heap of the C library, made to give memory back to the system.

Opening a graph of 300 MB leaves as much again in the heap of glibc, free but held, and so does tracing one.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# glibc's number of the setting, the size from which blocks are given back when they are freed, and the
# largest such size. By itself glibc raises it up to that, which is faster for a network's activations.
_MMAP_THRESHOLD, _SMALL, _LARGEST = -3, 1 << 20, 32 << 20


@contextmanager
def compact_heap() -> Iterator[None]:
    """Give large blocks back as they are freed, and in the end all that is free.

    Nothing happens where the C library cannot do it.
    """
    _call("mallopt", _MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        _call("mallopt", _MMAP_THRESHOLD, _LARGEST)
        release_memory()


def release_memory() -> None:
    """Collect objects that refer to each other, and give the free heap back."""
    gc.collect()
    _call("malloc_trim", 0)


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _call(function: str, *arguments: int) -> None:
    with suppress(AttributeError, OSError):
        getattr(ctypes.CDLL(None), function)(*arguments)
