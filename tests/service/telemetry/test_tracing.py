"""Traces: one from the client through the API to the worker's phases, sent to a collector, off by default."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ditserve.service.jobs import Job, JobResult
from ditserve.service.telemetry import tracing
from ditserve.service.telemetry.tracing import Tracing, open_tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider, shutdown=provider.shutdown)
    yield tracing
    tracing.close()


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def own(span: ReadableSpan) -> int:
    assert span.context
    name: int = span.context.span_id
    return name


def parent(span: ReadableSpan) -> int:
    assert span.parent
    name: int = span.parent.span_id
    return name


def test_a_job_lies_in_the_trace_of_its_request(
    traces: Tracing,
    exporter: InMemorySpanExporter,
    make_job: Callable[..., Job],
    make_result: Callable[..., JobResult],
) -> None:
    request = traces.request({"traceparent": PARENT})
    job = make_job(trace=dict(request.carrier), created_at=100.0)
    result = make_result(timings_ms={"queue": 500.0, "denoise": 2000.0, "decode": 30.0, "encode": 20.0})
    traces.job(job, result, 103.0)
    request.end("POST /generate", {"http.response.status_code": 200})
    ended = spans(exporter)
    assert set(ended) == {"POST /generate", "job", "queue", "denoise", "decode", "encode"}
    assert {format(span.context.trace_id, "032x") for span in ended.values() if span.context} == {
        PARENT.split("-")[1]
    }
    assert parent(ended["job"]) == own(ended["POST /generate"])
    assert {parent(ended[phase]) for phase in ("queue", "denoise", "decode", "encode")} == {own(ended["job"])}
    seconds = {
        name: ((span.start_time or 0) / 1e9, (span.end_time or 0) / 1e9) for name, span in ended.items()
    }
    assert seconds["job"] == (100.0, 103.0)
    assert seconds["queue"] == pytest.approx((100.0, 100.95))
    assert seconds["denoise"] == pytest.approx((100.95, 102.95))
    assert seconds["encode"] == pytest.approx((102.98, 103.0))


def test_a_request_without_a_trace_begins_one(traces: Tracing) -> None:
    one, other = traces.request({}), traces.request({})
    assert one.carrier["traceparent"] != other.carrier["traceparent"]


def test_failures_are_marked(traces: Tracing, exporter: InMemorySpanExporter) -> None:
    traces.request({}).end("fine", {"http.response.status_code": 422})
    traces.request({}).end("not fine", {"http.response.status_code": 503})
    ended = spans(exporter)
    assert ended["fine"].status.is_ok or ended["fine"].status.is_unset
    assert not ended["not fine"].status.is_unset


def test_off_means_that_the_clients_trace_is_passed_on() -> None:
    quiet = open_tracing(None, "test")
    assert quiet.request({}).carrier == {}
    assert quiet.request({"traceparent": PARENT}).carrier == {"traceparent": PARENT}


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(tracing, "import_module", missing)
    with pytest.raises(ValueError, match="extra otel"):
        open_tracing("http://localhost:4318", "test")


def test_a_collector_receives_the_spans() -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        sending = open_tracing(f"http://127.0.0.1:{server.server_port}", "dit-test")
        sending.request({}).end("POST /generate", {"http.response.status_code": 200})
        sending.close()
        server.shutdown()
        thread.join()
    (message,) = (ExportTraceServiceRequest.FromString(body) for body in received)
    (resource,) = message.resource_spans
    assert resource.scope_spans[0].spans[0].name == "POST /generate"
    assert any(attribute.value.string_value == "dit-test" for attribute in resource.resource.attributes)
