"""The adapters of the servers: how each is asked for an image, and how its answer is read.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ditserve.bench.load.workload import OfferedRequest, RequestKind

GUIDANCE = 2.0  # of guided requests
SOLVER, GRID = "dpmpp-2m", "trailing"


@dataclass(frozen=True, slots=True)
class DrawnWith:
    """The operating point that an answer names for its image."""

    steps: int
    rung: str
    degraded: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """The HTTP dialect of a kind of server.

    Args:
        path: of the endpoint.
        body: returns the JSON body of a request and its deadline in seconds (None: no deadline).
        read: returns the operating point of a success, from the request and the answer's headers.
        headers: of every request.
        ready: path that answers 2xx when the server is ready.
        counters: path of the metrics with rows and passes, if there are any.
    """

    path: str
    body: Callable[[OfferedRequest, float | None], Mapping[str, Any]]
    read: Callable[[OfferedRequest, Mapping[str, str]], DrawnWith]
    headers: Mapping[str, str]
    ready: str
    counters: str | None = None


def requested_rung(kind: RequestKind) -> str:
    """Return the name of the operating point that a request asks for."""
    return f"{SOLVER}-{kind.steps}"


def _service(deadlines: bool, degrade: bool) -> Adapter:
    def body(request: OfferedRequest, within_s: float | None) -> Mapping[str, Any]:
        fields = {
            "condition": {"label": request.label},
            "steps": request.kind.steps,
            "sampler": SOLVER,
            "grid": GRID,
            "guidance_scale": GUIDANCE if request.kind.guided else 1.0,
            "seed": request.seed,
            "allow_degraded": degrade,
        }
        if deadlines and within_s is not None:
            fields["deadline_ms"] = max(1, round(1000 * within_s))
        return fields

    def read(request: OfferedRequest, headers: Mapping[str, str]) -> DrawnWith:
        return DrawnWith(int(headers["x-steps-used"]), headers["x-rung"], headers["x-degraded"] == "true")

    return Adapter("/generate", body, read, {"accept": "image/png"}, "/readyz", "/metrics")


def _peer_body(request: OfferedRequest, within_s: float | None) -> Mapping[str, Any]:
    return {
        "label": request.label,
        "steps": request.kind.steps,
        "guidance": GUIDANCE if request.kind.guided else 1.0,
        "seed": request.seed,
    }


def _bentoml_body(request: OfferedRequest, within_s: float | None) -> Mapping[str, Any]:
    return {"wishes": [_peer_body(request, within_s)]}


def _as_requested(request: OfferedRequest, headers: Mapping[str, str]) -> DrawnWith:
    return DrawnWith(request.kind.steps, requested_rung(request.kind), False)


# The service is asked with deadlines and consent to be degraded, with deadlines alone, or with neither.
ADAPTERS: Mapping[str, Adapter] = {
    "service": _service(deadlines=True, degrade=True),
    "service-undegraded": _service(deadlines=True, degrade=False),
    "service-undated": _service(deadlines=False, degrade=False),
    "peer": Adapter("/generate", _peer_body, _as_requested, {}, "/health"),
    "bentoml": Adapter("/generate", _bentoml_body, _as_requested, {}, "/readyz"),
    "ray": Adapter("/generate", _peer_body, _as_requested, {}, "/-/healthz"),
}
