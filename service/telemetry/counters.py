"""The counters of a cache. Pure."""

from __future__ import annotations


class CacheCounters:
    """Counts of a cache since it was created, in entries.

    `bypasses` are entries computed without asking the cache, because it is off or too small for the batch.
    `bytes` is the memory that the cache holds now.
    """

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.bypasses = 0
        self.prefetches = 0
        self.evictions = 0
        self.bytes = 0
