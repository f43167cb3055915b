"""The speed reference: how fast the machine is just now.

A shared machine drifts by half within minutes, so figures that are taken at different times need a common
clock.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from ditserve.model.spec.bundle import Bundle
from ditserve.service.backends import load_backend

ROWS, MEASURE_S = 8, 1.5


class SpeedReference:
    """Passes of `ROWS` rows through a bundle's graphs, timed in this process while nothing else runs."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        self._backend = load_backend("onnx", bundle, threads=threads, precision="fp32")
        config = bundle.manifest.config
        labels = np.zeros((ROWS, len(config.classes)), np.int64)
        self._state = self._backend.modulate(np.full(ROWS, 500.0, np.float32), self._backend.embed(labels))
        self._x = np.zeros((ROWS, config.in_channels, *config.image_size), np.float32)

    def pass_s(self) -> float:
        """Return the seconds of a pass, the median over `MEASURE_S`."""
        times, until = [], time.perf_counter() + MEASURE_S
        while (began := time.perf_counter()) < until:
            self._backend.denoise(self._x, self._state)
            times.append(time.perf_counter() - began)
        return median(times)
