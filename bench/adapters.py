"""How each kind of server is asked for an image, and how its answer is read.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ditserve.bench.workload import Asked, Kind

GUIDANCE = 2.0  # of guided requests
SOLVER, GRID = "dpmpp-2m", "trailing"


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer says of how its image was made."""

    steps: int
    rung: str
    degraded: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """`body` of a request, given when it must be answered (seconds; None: whenever); `told` by the headers of a success. `counters`:
    where rows and passes can be read, if anywhere."""

    path: str
    body: Callable[[Asked, float | None], Mapping[str, Any]]
    told: Callable[[Asked, Mapping[str, str]], Told]
    headers: Mapping[str, str]
    ready: str
    counters: str | None = None


def asked_rung(kind: Kind) -> str:
    """The operating point that a request names."""
    return f"{SOLVER}-{kind.steps}"


def _service(deadlines: bool, degrade: bool) -> Adapter:
    def body(asked: Asked, within_s: float | None) -> Mapping[str, Any]:
        plain = {
            "condition": {"label": asked.label},
            "steps": asked.kind.steps,
            "sampler": SOLVER,
            "grid": GRID,
            "guidance_scale": GUIDANCE if asked.kind.guided else 1.0,
            "seed": asked.seed,
            "allow_degraded": degrade,
        }
        return plain | (
            {"deadline_ms": max(1, round(1000 * within_s))} if deadlines and within_s is not None else {}
        )

    def told(asked: Asked, headers: Mapping[str, str]) -> Told:
        return Told(int(headers["x-steps-used"]), headers["x-rung"], headers["x-degraded"] == "true")

    return Adapter("/generate", body, told, {"accept": "image/png"}, "/readyz", "/metrics")


def _wish(asked: Asked, within_s: float | None) -> Mapping[str, Any]:
    return {
        "label": asked.label,
        "steps": asked.kind.steps,
        "guidance": GUIDANCE if asked.kind.guided else 1.0,
        "seed": asked.seed,
    }


def _as_asked(asked: Asked, headers: Mapping[str, str]) -> Told:
    return Told(asked.kind.steps, asked_rung(asked.kind), False)


def _peer(ready: str) -> Adapter:
    return Adapter("/generate", _wish, _as_asked, {}, ready)


# The service is asked with deadlines and consent to be degraded, with deadlines alone, or plainly.
ADAPTERS: Mapping[str, Adapter] = {
    "service": _service(deadlines=True, degrade=True),
    "service-undegraded": _service(deadlines=True, degrade=False),
    "service-undated": _service(deadlines=False, degrade=False),
    "peer": _peer("/health"),
    "bentoml": Adapter(
        "/generate",
        lambda asked, within_s: {"wishes": [_wish(asked, within_s)]},
        _as_asked,
        {},
        "/readyz",
    ),
    "ray": _peer("/-/healthz"),
}
