"""Traces of requests and jobs: HTTP → queue → denoise → decode → encode, in the trace of the client.

Tracing is off unless `--otlp-endpoint` names a collector; then the extra `otel` (OpenTelemetry's SDK) must be
installed. When it is off, OpenTelemetry's API gives spans that record nothing and pass the client's trace on.
A worker reports a job after it has ended, from times that it measured anyway: the engine pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from opentelemetry.trace import (
    NoOpTracerProvider,
    Span,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ditserve.service.jobs import Job, JobResult

PHASES = ("queue", "denoise", "decode", "encode")
_W3C = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class RequestSpan:
    """The span of one HTTP request. `carrier` (W3C Trace Context) is what its job takes along."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.carrier: dict[str, str] = {}
        _W3C.inject(self.carrier, set_span_in_context(span))

    def end(self, name: str, attributes: Mapping[str, str | int | float]) -> None:
        self._span.update_name(name)
        self._span.set_attributes(dict(attributes))
        if int(attributes.get("http.response.status_code", 0)) >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Tracing:
    """The spans of one process.

    Without a `provider` they record nothing; `shutdown` sends what is pending.
    """

    def __init__(
        self, provider: TracerProvider | None = None, *, shutdown: Callable[[], None] | None = None
    ) -> None:
        self._tracer = (provider or NoOpTracerProvider()).get_tracer("dit")
        self._shutdown = shutdown

    def request(self, carrier: Mapping[str, str]) -> RequestSpan:
        """Begin the span of a request that came with `carrier` (a `traceparent`, or nothing)."""
        return RequestSpan(
            self._tracer.start_span("request", context=_W3C.extract(carrier), kind=SpanKind.SERVER)
        )

    def job(self, job: Job, result: JobResult, ended_at: float) -> None:
        """Record a job that ended at `ended_at` (seconds since the epoch).

        One span covers the job's life. Inside it each phase has a span; they lie end to end before
        `ended_at`, as long as they were measured. The queue's begins at the job's creation.
        """
        attributes: dict[str, str | int | float | bool] = {
            "dit.job": job.id,
            "dit.worker": result.worker,
            "dit.rung": result.rung,
            "dit.steps": result.steps_used,
            "dit.steps_requested": result.steps_requested,
            "dit.images": len(result.images),
            "dit.attempt": result.attempt,
            "dit.degraded": result.degraded,
        }
        whole = self._tracer.start_span(
            "job",
            context=_W3C.extract(job.trace),
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            start_time=round(job.created_at * _NS),
        )
        inside = set_span_in_context(whole)
        end = round(ended_at * _NS)
        for phase in reversed(PHASES):
            start = end - round(result.timings_ms.get(phase, 0.0) * _NS / 1000)
            if phase == "queue":
                start = round(job.created_at * _NS)
            self._tracer.start_span(phase, context=inside, start_time=min(start, end)).end(end)
            end = start
        whole.end(round(ended_at * _NS))

    def close(self) -> None:
        """Send what is pending."""
        if self._shutdown is not None:
            self._shutdown()


def open_tracing(endpoint: str | None, service: str) -> Tracing:
    """Return the tracing of the process `service`, sent to the collector at `endpoint`; None turns it off.

    `endpoint` speaks OTLP over HTTP, such as http://collector:4318.

    Raises:
        ValueError: the extra `otel` is not installed.
    """
    if endpoint is None:
        return Tracing()
    try:
        module: Any = import_module("ditserve.service.telemetry.otlp")
    except ImportError:
        raise ValueError("--otlp-endpoint needs the extra otel: pip install 'ditserve[otel]'") from None
    provider = module.provider(endpoint, service)
    return Tracing(provider, shutdown=provider.shutdown)
