"""The adapters of the servers: how each is asked for an image, and how its answer is read.

Pure: values in, values out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from ditserve.bench.load.workload import OfferedRequest, RequestKind
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Drawing:
    """The way pictures of a bundle are asked for: its default solver, grid and guidance, and conditions.

    A request of class k has condition k, as `POST /generate` takes it.
    """

    solver: str
    grid: str
    guidance: float
    conditions: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, manifest: Manifest, prompts: Sequence[str] = ()) -> Self:
        """Return it for a bundle: of the prompts if there are any, else of the classes of its first factor.

        Raises:
            ModelError: prompts for a model that takes no text, or none for one that has no classes.
        """
        if prompts and not manifest.config.text_width:
            raise ModelError(f"{manifest.name} takes no text: leave --prompts out")
        if not prompts and not manifest.factors:
            raise ModelError(f"{manifest.name} draws from texts: name prompts, one a line, with --prompts")
        conditions: list[Mapping[str, Any]] = [{"text": prompt} for prompt in prompts]
        for factor in () if prompts else manifest.factors[:1]:
            conditions = [{factor.name: index} for index in range(len(factor.classes))]
        defaults = manifest.defaults
        return cls(defaults.solver, defaults.grid, defaults.guidance_scale, tuple(conditions))

    def rung(self, kind: RequestKind) -> str:
        """Return the name of the operating point that a request asks for."""
        return f"{self.solver}-{kind.steps}"

    def guidance_of(self, kind: RequestKind) -> float:
        return self.guidance if kind.guided else 1.0


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


def _service(drawing: Drawing, *, deadlines: bool, degrade: bool) -> Adapter:
    def body(request: OfferedRequest, within_s: float | None) -> Mapping[str, Any]:
        fields = {
            "condition": drawing.conditions[request.label],
            "steps": request.kind.steps,
            "sampler": drawing.solver,
            "grid": drawing.grid,
            "guidance_scale": drawing.guidance_of(request.kind),
            "seed": request.seed,
            "allow_degraded": degrade,
        }
        if deadlines and within_s is not None:
            fields["deadline_ms"] = max(1, round(1000 * within_s))
        return fields

    def read(request: OfferedRequest, headers: Mapping[str, str]) -> DrawnWith:
        return DrawnWith(int(headers["x-steps-used"]), headers["x-rung"], headers["x-degraded"] == "true")

    return Adapter("/generate", body, read, {"accept": "image/png"}, "/readyz", "/metrics")


def _peer(drawing: Drawing, *, ready: str, in_list: bool = False) -> Adapter:
    def body(request: OfferedRequest, within_s: float | None) -> Mapping[str, Any]:
        fields = {
            "condition": drawing.conditions[request.label],
            "steps": request.kind.steps,
            "guidance": drawing.guidance_of(request.kind),
            "seed": request.seed,
        }
        return {"wishes": [fields]} if in_list else fields

    def read(request: OfferedRequest, headers: Mapping[str, str]) -> DrawnWith:
        return DrawnWith(request.kind.steps, drawing.rung(request.kind), False)

    return Adapter("/generate", body, read, {}, ready)


# The service is asked with deadlines and consent to be degraded, with deadlines alone, or with neither.
ADAPTERS: Mapping[str, Callable[[Drawing], Adapter]] = {
    "service": partial(_service, deadlines=True, degrade=True),
    "service-undegraded": partial(_service, deadlines=True, degrade=False),
    "service-undated": partial(_service, deadlines=False, degrade=False),
    "peer": partial(_peer, ready="/health"),
    "bentoml": partial(_peer, ready="/readyz", in_list=True),
    "ray": partial(_peer, ready="/-/healthz"),
}
