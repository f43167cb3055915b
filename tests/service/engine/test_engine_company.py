"""The property the design rests on: whatever company a sample keeps, its image is the one it makes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditserve.model.spec.source import SourceLatent
from ditserve.model.spec.stretches import Stretch
from ditserve.model.spec.windows import window_count
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.samples import SampleRequest, StepReport
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.admission import AdmissionRequest
from ditserve.service.rung import Consent, Rung

Make = Callable[..., Any]


@dataclass(frozen=True)
class Visit:
    """One sample's stay: when it arrives, and when it is cancelled, in steps of the engine."""

    arrives: int
    cancelled: int | None
    request: dict[str, Any]


OWN = (4, 6)
SHAPES: list[dict[str, Any]] = [
    {},
    {},
    {"size": (2, 2)},
    {"size": (8, 6)},
    {"size": (8, 6), "windows": True},
    {"size": (5, 13), "windows": True},
]
_rungs = st.builds(
    Rung,
    name=st.just("any"),
    solver=st.sampled_from(["ddim", "ddpm", "euler", "dpmpp-2m"]),
    steps=st.integers(1, 9),
    grid=st.sampled_from(["leading", "trailing", "uniform-t"]),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.2, 0.7), (0.5, 0.5), (0.0, 0.3)]),
    quality=st.just(0.0),
    guidance_decay=st.sampled_from([0.0, 0.0, 1.5, -0.5]),
    stretches=st.sampled_from(
        [
            (),
            (),
            (Stretch(0.0, "student", guided=False),),
            (Stretch(0.6, "light"),),
            (Stretch(0.7, "student", guided=False), Stretch(0.3, "light")),
            (Stretch(0.0, "every-2"),),
            (Stretch(0.6, "light"), Stretch(0.1, "every-3")),
        ]
    ),
)
CONDITIONS: list[dict[str, Any]] = [
    *({"condition": (ConditionTerm((colour,)),)} for colour in (0, 1, 2, None)),
    {"condition": (ConditionTerm((0,), 2.0), ConditionTerm((1,), -0.5)), "mix": "compose"},
    {"condition": tuple(ConditionTerm((colour,)) for colour in (2, None, 0, 1)), "mix": "compose"},
]
_requests = st.fixed_dictionaries(
    {
        "picture": st.sampled_from(["none", "none", "whole", "masked"]),
        "strength": st.sampled_from([0.2, 0.55, 1.0]),
        "conditions": st.sampled_from(CONDITIONS),
        "seed": st.integers(0, 3),
        "rung": _rungs,
        "guidance_scale": st.sampled_from([0.0, 1.0, 2.5]),
        "previews": st.sampled_from([0, 1, 2]),
        "deadline_at": st.sampled_from([None, 2e9, 3e9]),
        "shape": st.sampled_from(SHAPES),
    }
)
_visits = st.lists(
    st.builds(Visit, st.integers(0, 12), st.one_of(st.none(), st.none(), st.integers(0, 15)), _requests),
    min_size=1,
    max_size=7,
)
_buckets = st.sampled_from([None, (1, 2, 4, 8), (3, 5), (8,)])


def asked(visit: Visit) -> dict[str, Any]:
    """The fields of a request, those of its shape, its conditions and its picture among them."""
    fields = dict(visit.request)
    shape, conditions = fields.pop("shape"), fields.pop("conditions")
    picture, strength = fields.pop("picture"), fields.pop("strength")
    if picture != "none":
        fields["rung"] = replace(fields["rung"], strength=strength)
        fields["source"] = source(shape.get("size", OWN), masked=picture == "masked")
    return {**fields, **shape, **conditions}


def source(size: tuple[int, int], *, masked: bool) -> SourceLatent[Any]:
    random = np.random.default_rng(size)
    mask = random.choice(np.array([0.0, 0.25, 1.0], np.float32), (1, *size))
    return SourceLatent(random.standard_normal((3, *size), np.float32), mask if masked else None)


def others(make_backend: Make, make_caching_backend: Make, **options: Any) -> dict[str, tuple[Any, float]]:
    networks = {
        name: (make_backend(weights=seed, **options), 1.0)
        for seed, name in enumerate(("light", "student"), 2)
    }
    return networks | {f"every-{k}": (make_caching_backend(every=k, **options), 1.0) for k in (2, 3)}


def planned_rows(request: SampleRequest, engine: Engine) -> float:
    """Return the rows of the whole image as admission and the planner count them."""
    unconditional = [term.labels for term in request.condition] == [(None,)]
    composed = len(request.condition) if request.mix == "compose" else 1
    windows = window_count(request.size or OWN, OWN) if request.windows else 1
    admission = AdmissionRequest(
        rung=request.rung,
        guidance_scale=1.0 if unconditional else request.guidance_scale,
        samples=1,
        deadline_at=None,
        allow_degraded=True,
        consent=Consent(),
        row_cost=windows,
        conditions=composed,
    )
    return admission.rows(engine.ladder, request.rung)


def follow(engine: Engine, visits: list[Visit], make_request: Make) -> list[StepReport]:
    reports: list[StepReport] = []
    for step in range(200):
        for k, visit in enumerate(visits):
            if visit.arrives == step:
                engine.add(make_request(f"{k}/0", **asked(visit)))
            if visit.cancelled == step:
                engine.cancel(f"{k}/0")
        if engine.idle and step > 15:
            return reports
        reports.append(engine.step())
    pytest.fail("the engine never became idle")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    visits=_visits,
    buckets=_buckets,
    max_rows=st.integers(5, 9),
    strict=st.booleans(),
    modulation_bytes=st.sampled_from([0, 900, 1 << 20]),
    memory_rows=st.sampled_from([3, 5, 10**9]),
)
def test_a_sample_equals_its_solo_run(
    visits: list[Visit],
    buckets: tuple[int, ...] | None,
    max_rows: int,
    strict: bool,
    modulation_bytes: int,
    memory_rows: int,
    make_backend: Make,
    make_caching_backend: Make,
    make_engine: Make,
    make_request: Make,
) -> None:
    max_rows = max(max_rows, buckets[0]) if buckets else max_rows
    memory_rows = max(memory_rows, buckets[0]) if buckets else memory_rows
    engine = make_engine(
        make_backend(buckets=buckets, memory_rows=memory_rows, size_multiple=2),
        max_rows=max_rows,
        strict=strict,
        modulation_bytes=modulation_bytes,
        backbones=others(
            make_backend, make_caching_backend, buckets=buckets, memory_rows=memory_rows, size_multiple=2
        ),
    )
    reports = follow(engine, visits, make_request)
    made = {sample.id: sample.latent for report in reports for sample in report.finished}
    shown = [preview for report in reports for preview in report.previews]
    for k, visit in enumerate(visits):
        if f"{k}/0" not in made:
            assert visit.cancelled is not None
            continue
        request: SampleRequest = make_request(f"{k}/0", **asked(visit))
        solo = make_engine(
            make_backend(size_multiple=2),
            backbones=others(make_backend, make_caching_backend, size_multiple=2),
        )
        solo.add(request)
        alone = [solo.step() for _ in range(request.rung.walked)]
        assert sum(report.rows for report in alone) == planned_rows(request, solo)
        np.testing.assert_array_equal(made[f"{k}/0"], alone[-1].finished[0].latent)
        expected = [preview for report in alone for preview in report.previews]
        own = [preview for preview in shown if preview.id == f"{k}/0"]
        assert [preview.step for preview in own] == [preview.step for preview in expected]
        for one, other in zip(own, expected, strict=True):
            np.testing.assert_array_equal(one.latent, other.latent)
    assert engine.free_samples == 16
    assert not any(report.failed for report in reports)
