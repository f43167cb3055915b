"""Counters exist at 0 from the start, with every label value that can be known."""

from __future__ import annotations

import ast
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.zoo import TINY
from ditserve.service.errors import ERRORS
from ditserve.service.telemetry import metrics
from tests.test_end_to_end import Service

# The values of the counters' labels, of one service with one model.
RUNGS = {rung.name for rung in Bundle.open(TINY, verify=False).manifest.ladder}
FORMATS = {"png", "webp", "jpeg", "gif", "apng", "mp4", "npz"}
CACHES = {"embedding", "modulation"}
KNOWN = {
    "dit_refused": set(ERRORS),
    "dit_admitted_degraded": RUNGS,
    "dit_degraded": RUNGS,
    "dit_jobs": {"done", "failed", "cancelled", "lost", "handed-back"},
    "dit_images": FORMATS,
    "dit_cache_hits": CACHES,
    "dit_cache_misses": CACHES,
    "dit_cache_bypass": CACHES,
    "dit_cache_evictions": CACHES,
    "dit_unreadable": {"job", "result", "error", "event", "report"},
    "dit_batch_rows": {"cap", "idle"},
    "dit_encode_seconds": FORMATS,
    "dit_delivered_quality": {"asked", "drawn"},
}
# Loops of the API, of a worker and of its engine's thread.
ACTIVITIES = {"claiming", "keeping leases", "publishing events", "engine thread", "working on jobs"}
ACTIVITIES |= {"engine command", "observing a step", "following the clock", "watching the engine"}
OUTCOMES = {"ok", "accepted", "invalid", "quota", "cancelled", "overloaded", "deadline", "failed"}
ROUTES = {"/generate", "/v1/images/generations", "/jobs/{job_id}", "/models", "/livez", "unmatched"}


def counters() -> set[str]:
    """Return the names of all counters that the module of the metrics defines."""
    tree = ast.parse(Path(metrics.__file__).read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        call.args[0].value
        for call in calls
        if ast.unparse(call.func) == "Counter"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def test_a_service_that_has_done_nothing_shows_all_counters(tmp_path: Path) -> None:
    service = Service(tmp_path / "log.txt", "--bundle", str(TINY), "--canary-s=0")
    try:
        families = {
            family.name: family.samples
            for family in text_string_to_metric_families(service.client.get("/metrics").text)
        }
    finally:
        service.stop()
    assert counters() <= {name for name, samples in families.items() if samples} | {"dit_canary"}
    for name, values in KNOWN.items():
        found = {value for sample in families[name] for key, value in sample.labels.items() if key != "le"}
        assert found == values, name
        assert {sample.value for sample in families[name]} == {0.0}, name
    assert {sample.labels["activity"] for sample in families["dit_faults"]} >= ACTIVITIES
    requests = {(sample.labels["route"], sample.labels["outcome"]) for sample in families["dit_requests"]}
    assert {(route, outcome) for route in ROUTES for outcome in OUTCOMES} <= requests
    assert {outcome for _, outcome in requests} == OUTCOMES


def test_the_canary_counts_from_zero_where_there_is_one(tmp_path: Path) -> None:
    service = Service(tmp_path / "log.txt", "--bundle", str(TINY))
    try:
        text = service.client.get("/metrics").text
    finally:
        service.stop()
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    assert {sample.labels["outcome"] for sample in families["dit_canary"]} == {"same", "drifted", "skipped"}
