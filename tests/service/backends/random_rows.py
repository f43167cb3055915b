"""Random inputs of a backend's network."""

from __future__ import annotations

import numpy as np

from ditserve.service.backends import Backend, Floats


def random_rows(backend: Backend, rng: np.random.Generator, count: int) -> tuple[Floats, tuple[Floats, ...]]:
    """Return `count` random latents, and the condition state of random timesteps and classes."""
    config = backend.manifest.config
    labels = rng.integers(0, [classes + 1 for classes in config.classes], (count, len(config.classes)))
    timesteps = rng.integers(0, 1000, count).astype(np.float32)
    x = rng.standard_normal((count, config.in_channels, *config.image_size), np.float32)
    return x, backend.modulate(timesteps, backend.embed(labels))
