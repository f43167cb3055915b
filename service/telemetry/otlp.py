"""Tracing by OpenTelemetry, sent as OTLP over HTTP by a thread of its own."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OtelSpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ditserve.service.jobs import Job, JobResult

PHASES = ("queue", "denoise", "decode", "encode")
_W3C = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class RequestSpan:
    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        self.carrier: dict[str, str] = {}
        _W3C.inject(self.carrier, set_span_in_context(span))

    def end(self, name: str, attributes: Mapping[str, str | int | float]) -> None:
        self._span.update_name(name)
        self._span.set_attributes(dict(attributes))
        if int(attributes.get("http.response.status_code", 0)) >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class OtlpTracing:
    """`processor` takes the spans that have ended."""

    def __init__(self, processor: SpanProcessor, service: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("dit")

    def request(self, carrier: Mapping[str, str]) -> RequestSpan:
        return RequestSpan(
            self._tracer.start_span("request", context=_W3C.extract(carrier), kind=SpanKind.SERVER)
        )

    def job(self, job: Job, result: JobResult, ended_at: float) -> None:
        """One span over the job's life, and in it one for each phase, laid end to end before `ended_at` as they were measured."""
        facts: dict[str, str | int | float | bool] = {
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
            attributes=facts,
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
        self._provider.shutdown()


def open_tracing(endpoint: str, service: str) -> OtlpTracing:
    """Spans of `service` to a collector, in batches."""
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    return OtlpTracing(BatchSpanProcessor(exporter), service)
