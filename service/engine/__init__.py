"""The engine: rows of many samples through one forward pass a step. Synchronous, one thread, no network."""
