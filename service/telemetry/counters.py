"""What a cache counts. Pure."""

from __future__ import annotations


class CacheCounters:
    """What a cache did so far, in entries; `bytes` is what it holds now."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.bypasses = 0  # computed without asking the cache, because it is off or too small for the batch
        self.prefetches = 0
        self.evictions = 0
        self.bytes = 0
