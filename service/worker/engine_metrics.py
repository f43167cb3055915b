"""The metrics that a worker takes of its engine: steps, batches, caches, degradations."""

from __future__ import annotations

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
        conditions = engine.conditions
        self._caches: dict[str, CacheCounters] = {
            "embedding": conditions.embeddings,
            "modulation": conditions.modulations,
        }
        if conditions.texts is not None:
            self._caches |= {"text": conditions.texts, "shared-text": shared}
        self._counted = dict.fromkeys(self._caches, (0, 0, 0, 0))
        for counter in _CACHE_COUNTERS:
            for name in self._caches:
                counter.labels(name)
        for rung in engine.ladder.rungs:
            metrics.DEGRADED.labels(rung.name)

    def __call__(self, report: StepReport) -> None:
        if report.rows:
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
            for name, cache in self._caches.items():
                self._count_cache(name, cache)

    def _count_cache(self, name: str, cache: CacheCounters) -> None:
        totals = (cache.hits, cache.misses, cache.bypasses, cache.evictions)
        for counter, total, counted in zip(_CACHE_COUNTERS, totals, self._counted[name], strict=True):
            counter.labels(name).inc(total - counted)
        self._counted[name] = totals
        metrics.CACHE_BYTES.labels(name).set(cache.bytes)


def _count_steps(finished: Finished) -> None:
    metrics.STEPS_EXECUTED.inc(finished.steps_used)
    if finished.degraded:
        metrics.DEGRADED.labels(finished.rung.name).inc()
