"""Traces of requests and jobs: HTTP → queue → denoise → decode → encode, one trace from the client's `traceparent` on.

Off unless `--otlp-endpoint` names a collector; then the extra `otel` must be installed. What a worker did is told when the job has
ended, from the times it measured anyhow, so tracing costs the engine nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from ditserve.service.jobs import Job, JobResult


class Span(Protocol):
    """The span of one HTTP request. `carrier` (W3C Trace Context) is what a job takes along."""

    carrier: Mapping[str, str]

    def end(self, name: str, attributes: Mapping[str, str | int | float]) -> None: ...


class Tracing(Protocol):
    def request(self, carrier: Mapping[str, str]) -> Span:
        """Begin the span of a request that came with `carrier` (a `traceparent`, or nothing)."""
        ...

    def job(self, job: Job, result: JobResult, ended_at: float) -> None:
        """Tell what became of a job; `ended_at` in seconds since the epoch."""
        ...

    def close(self) -> None:
        """Send what is pending."""
        ...


class NoSpan:
    """Passes the client's trace on."""

    def __init__(self, carrier: Mapping[str, str]) -> None:
        self.carrier = carrier

    def end(self, name: str, attributes: Mapping[str, str | int | float]) -> None:
        pass


class NoTracing:
    def request(self, carrier: Mapping[str, str]) -> Span:
        return NoSpan(carrier)

    def job(self, job: Job, result: JobResult, ended_at: float) -> None:
        pass

    def close(self) -> None:
        pass


def open_tracing(endpoint: str | None, service: str) -> Tracing:
    """Traces of the process `service` to the collector at `endpoint` (OTLP over HTTP, such as http://collector:4318); None is off.

    Raises:
        ValueError: the extra `otel` is not installed.
    """
    if endpoint is None:
        return NoTracing()
    try:
        module: Any = import_module("ditserve.service.telemetry.otlp")
    except ImportError:
        raise ValueError("--otlp-endpoint needs the extra otel: pip install '.[otel]'") from None
    tracing: Tracing = module.open_tracing(endpoint, service)
    return tracing
