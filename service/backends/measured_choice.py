"""Choices between two ways to run a network, by their time here and by the bundle's record of its quality."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ditserve.model.spec.manifest import Manifest

# The relative growth of the Fréchet distance that "auto" accepts of a precision.
QUALITY_BUDGET = 0.01
# The most seconds, and the most pairs of steps, for timing two ways.
TIMING_S, TIMED = 3.0, 25
# Precision → how many times as fast as the one below it must be. Less than the least of them would be noise,
# and pictures would change from start to start.
FASTER: Final = 1.05
FASTER_FP8: Final = 1.2


def quality_objection(manifest: Manifest, precision: str) -> str | None:
    """Return why the bundle's own record does not allow a precision, or None if it does."""
    loss = manifest.metrics.get(f"{precision}_quality_loss")
    if loss is None:
        return "its cost in quality is not on record"
    return None if loss <= QUALITY_BUDGET else f"it costs {loss:.1%} of quality"


def speedup(one: Callable[[], object], other: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return how many times as fast `other` is, by the least time of several by `clock`.

    Both take turns. What disturbs them is least in the least of many. The first pair does not count. If a
    call takes longer than `TIMING_S`, one more pair is timed.
    """

    def seconds(run: Callable[[], object]) -> float:
        before = clock()
        run()
        return clock() - before

    began, pairs = time.perf_counter(), list[tuple[float, float]]()
    while len(pairs) <= TIMED and (len(pairs) < 2 or time.perf_counter() - began < TIMING_S):
        pairs.append((seconds(one), seconds(other)))
    return min(first for first, _ in pairs[1:]) / min(second for _, second in pairs[1:])
