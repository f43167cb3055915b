"""The metrics that a worker takes of its engine: steps, batches, caches, degradations."""

from __future__ import annotations

from collections.abc import Sequence

from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import Finished, StepReport
from ditserve.service.errors import NumericalError
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.counters import CacheCounters

# As `CacheCounters` counts them.
_CACHE_COUNTERS = (
    metrics.CACHE_HITS,
    metrics.CACHE_MISSES,
    metrics.CACHE_BYPASS,
    metrics.CACHE_EVICTIONS,
)


class EngineMetrics:
    """The observer of an engine, called with the report of every step, in the engine's thread.

    Args:
        shared: the counters of the text encodings that workers share through Redis.
    """

    def __init__(self, engine: Engine, shared: CacheCounters) -> None:
        self._seconds = metrics.STEP_SECONDS.labels(engine.backend.name)
        backbones = engine.condition_caches
        self._caches: dict[str, list[CacheCounters]] = {
            "embedding": [conditions.embeddings for conditions in backbones],
            "modulation": [conditions.modulations for conditions in backbones],
        }
        # All backbones share one cache of texts.
        texts = engine.conditions.texts
        if texts is not None:
            self._caches |= {"text": [texts], "shared-text": [shared]}
        self._counted = dict.fromkeys(self._caches, (0, 0, 0, 0))
        for counter in _CACHE_COUNTERS:
            for name in self._caches:
                counter.labels(name)
        for rung in engine.ladder.rungs:
            metrics.DEGRADED.labels(rung.name)

    def __call__(self, report: StepReport) -> None:
        if report.rows:
            for _ in range(report.steps):
                self._seconds.observe(report.seconds)
                metrics.BATCH_ROWS.labels(report.stop_reason).observe(report.rows)
            if report.predicted_s > 0:
                metrics.PREDICTION_RATIO.observe(report.seconds / report.predicted_s)
        for finished in report.finished:
            _count_steps(finished)
        numerical = sum(isinstance(failed.error, NumericalError) for failed in report.failed)
        if numerical:
            metrics.NUMERICAL_ERRORS.inc(numerical)
        if report.finished:
            for name, caches in self._caches.items():
                self._count_caches(name, caches)

    def _count_caches(self, name: str, caches: Sequence[CacheCounters]) -> None:
        totals = (
            sum(cache.hits for cache in caches),
            sum(cache.misses for cache in caches),
            sum(cache.bypasses for cache in caches),
            sum(cache.evictions for cache in caches),
        )
        for counter, total, counted in zip(_CACHE_COUNTERS, totals, self._counted[name], strict=True):
            counter.labels(name).inc(total - counted)
        self._counted[name] = totals
        metrics.CACHE_BYTES.labels(name).set(sum(cache.bytes for cache in caches))


def _count_steps(finished: Finished) -> None:
    metrics.STEPS_EXECUTED.inc(finished.steps_used)
    if finished.degraded:
        metrics.DEGRADED.labels(finished.rung.name).inc()
