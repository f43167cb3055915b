"""The engine: one forward pass at a time over rows of many samples. Synchronous, one thread, no network."""
