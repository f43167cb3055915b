"""Random inputs of a backend's network."""

from __future__ import annotations

import numpy as np

from ditserve.service.backends import Backend, Floats


def random_rows(backend: Backend, rng: np.random.Generator, count: int) -> tuple[Floats, tuple[Floats, ...]]:
    """Return `count` random latents, and the condition state of random timesteps and classes."""
    labels = rng.integers(0, [6, 3], (count, 2))
    timesteps = rng.integers(0, 1000, count).astype(np.float32)
    x = rng.standard_normal((count, 3, 8, 8), np.float32)
    return x, backend.modulate(timesteps, backend.embed(labels))
