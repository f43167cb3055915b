"""What a worker measures of its engine, put into metrics."""

from __future__ import annotations

from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import Finished, StepReport
from ditserve.service.errors import NumericalError
from ditserve.service.telemetry import metrics
from ditserve.service.telemetry.counters import CacheCounters


class Observing:
    """Called with every step's report, in the engine's thread. `shared` is the cache of encodings that workers share."""

    def __init__(self, engine: Engine, shared: CacheCounters) -> None:
        backend = engine.backend.name
        self._seconds = metrics.STEP_SECONDS.labels(backend)
        conditions = engine.conditions
        self._caches: dict[str, CacheCounters] = {
            "embedding": conditions.embeddings,
            "modulation": conditions.modulations,
        }
        if conditions.texts is not None:
            self._caches |= {"text": conditions.texts, "shared-text": shared}
        self._seen = dict.fromkeys(self._caches, (0, 0, 0, 0))

    def __call__(self, report: StepReport) -> None:
        if report.rows:
            self._seconds.observe(report.seconds)
            metrics.BATCH_ROWS.labels(report.stop_reason).observe(report.rows)
            if report.predicted_s > 0:
                metrics.PREDICTION_RATIO.observe(report.seconds / report.predicted_s)
        for finished in report.finished:
            _count(finished)
        numerical = sum(isinstance(failed.error, NumericalError) for failed in report.failed)
        if numerical:
            metrics.NUMERICAL_ERRORS.inc(numerical)
        if report.finished:
            for name, cache in self._caches.items():
                self._count_cache(name, cache)

    def _count_cache(self, name: str, cache: CacheCounters) -> None:
        now = (cache.hits, cache.misses, cache.bypasses, cache.evictions)
        counters = (
            metrics.CACHE_HITS,
            metrics.CACHE_MISSES,
            metrics.CACHE_BYPASS,
            metrics.CACHE_EVICTIONS,
        )
        for counter, total, seen in zip(counters, now, self._seen[name], strict=True):
            counter.labels(name).inc(total - seen)
        self._seen[name] = now
        metrics.CACHE_BYTES.labels(name).set(cache.bytes)


def _count(finished: Finished) -> None:
    metrics.STEPS_EXECUTED.inc(finished.steps_used)
    if finished.degraded:
        metrics.DEGRADED.labels(finished.rung.name).inc()
