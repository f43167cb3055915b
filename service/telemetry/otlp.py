"""OpenTelemetry's SDK: spans are sent as OTLP over HTTP, in batches, by a thread of its own."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def provider(endpoint: str, service: str) -> TracerProvider:
    """Return the source of spans of `service` that go to the collector at `endpoint`."""
    spans = TracerProvider(resource=Resource.create({"service.name": service}))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    spans.add_span_processor(BatchSpanProcessor(exporter))
    return spans
