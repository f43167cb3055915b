"""Alerts, dashboard and scraping agree with the metrics of the service."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import promql_parser
import pytest
from prometheus_client.metrics import MetricWrapperBase

from ditserve.service.fleet import LoadSnapshot
from ditserve.service.http.middleware import outcome
from ditserve.service.http.routes import generate, jobs, models, openai, pages, probes
from ditserve.service.telemetry import metrics
from tests.deploy.files import (
    ALERTS,
    COMPOSE,
    DEPLOY,
    PANELS,
    ROOT,
    manifest,
    read,
)

TARGET_LABELS = {"job", "instance", "namespace", "le"}
ROUTED = (generate, jobs, models, openai, pages, probes)
# Told for people who look for them, and drawn nowhere.
LOOKED_UP = {"dit_build_info", "dit_network_info", "dit_gpu_memory_total_bytes"}
LOOKED_UP |= {"dit_cache_bypass", "dit_cache_evictions", "dit_cache_bytes"}


def exposed() -> dict[str, set[str]]:
    """Series name → labels, of everything the service measures."""
    series: dict[str, set[str]] = {}
    for instrument in vars(metrics).values():
        if isinstance(instrument, MetricWrapperBase):
            (family,) = instrument.describe()
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            suffixes["summary"] = ["_sum", "_count"]
            for suffix in suffixes.get(family.type, [""]):
                series[family.name + suffix] = set(instrument._labelnames)
    load = LoadSnapshot(queued_jobs=0, queued_rows=0, oldest_age_s=0.0, workers=(), taken_at=0.0)
    read = metrics.LoadCollector({"emoji": load}, redis_up=True).collect()
    return series | {sample.name: set(sample.labels) for family in read for sample in family.samples}


def queries() -> Iterator[Any]:
    """Every expression, with the labels that the text beside it fills in."""
    for rule in ALERTS:
        said = " ".join(rule["annotations"].values())
        yield pytest.param(rule["expr"], re.findall(r"\$labels\.(\w+)", said), id=rule["alert"])
    for panel in PANELS:
        for target in panel.get("targets", []):
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            yield pytest.param(target["expr"], shown, id=f"{panel['id']}-{panel['title']}-{target['refId']}")
    for trigger in manifest("ScaledObject", "worker")["spec"]["triggers"]:
        yield pytest.param(trigger["metadata"]["query"], [], id="autoscaling")


OUTCOMES = {
    "dit_requests_total": {outcome(status) for status in range(200, 600)},
    "dit_canary_total": {"same", "drifted", "skipped"},
    "dit_jobs_total": {"cancelled", "done", "failed", "handed-back", "lost"},
    "dit_promises_total": {"kept", "broken"},
}


def values(series: str, label: str) -> set[str] | None:
    """The values a label may have; None if that is not known here."""
    if label == "outcome":
        return OUTCOMES[series]
    if label == "route":
        return {route.path for module in ROUTED for route in module.router.routes} | {"/metrics"}
    if label == "job":
        return {job["job_name"] for job in read(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]}
    return None


def unknown_names(query: str, shown: Sequence[str] = ()) -> list[str]:
    """Return the series, labels and values of labels in a PromQL expression that nothing exposes.

    Labels in `shown` that the expression's result does not have are returned too.
    """
    series, wrong, allowed = exposed(), [], set(TARGET_LABELS)
    selectors: list[promql_parser.VectorSelector] = []
    groupings: list[str] = []
    aggregated = False

    def visit(node: promql_parser.Expr) -> bool:
        nonlocal aggregated
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append(node)
        if isinstance(node, promql_parser.AggregateExpr):
            aggregated = True
            groupings.extend(node.modifier.labels if node.modifier else ())
        return True

    promql_parser.walk(promql_parser.parse(query.replace("$__rate_interval", "1m")), visit)
    assert selectors
    for selector in selectors:
        name = selector.name or ""
        labels = series.get(name, set())
        allowed |= labels
        if name not in series and name != "up":
            wrong.append(name)
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels | TARGET_LABELS:
                wrong.append(matcher.name)
            elif (known := values(name, matcher.name)) is not None:
                wrong += [value for value in matcher.value.split("|") if value not in known]
    wrong += [label for label in groupings if label not in allowed]
    return wrong + [label for label in shown if label not in (groupings if aggregated else allowed)]


@pytest.mark.parametrize(("query", "shown"), list(queries()))
def test_every_query_uses_names_that_exist(query: str, shown: list[str]) -> None:
    assert unknown_names(query, shown) == []


def test_a_query_with_a_wrong_name_is_noticed() -> None:
    assert unknown_names("rate(dit_requests_totals[5m])") == ["dit_requests_totals"]
    assert unknown_names('sum by (rung) (dit_queue_depth{user="x"})') == ["user", "rung"]
    assert unknown_names('dit_requests_total{outcome="late",route="/gen"}') == ["late", "/gen"]
    assert unknown_names('up{job="api"}') == ["api"]
    assert unknown_names("sum by (le) (dit_step_seconds_bucket)", ["backend"]) == ["backend"]


def test_every_instrument_is_used_and_shown() -> None:
    """Somebody observes into it, and it is on the dashboard or in an alert, or is asked for by people."""
    source = "".join(path.read_text() for path in (ROOT / "service").rglob("*.py"))
    queried = " ".join(each.values[0] for each in queries())
    for name, instrument in vars(metrics).items():
        if isinstance(instrument, MetricWrapperBase):
            (family,) = instrument.describe()
            assert len(re.findall(rf"\b{name}\b", source)) > 1, f"nothing observes {name}"
            assert family.name in queried or family.name in LOOKED_UP, f"{family.name} is shown nowhere"


def test_alerts_tell_people_what_to_do() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]


def test_the_manual_says_what_each_alert_wants() -> None:
    manual = (ROOT / "docs/operations.md").read_text().partition("| alert |")[2]
    rows = re.findall(r"^\| ([A-Z][A-Za-z, ]+) \|", manual, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} == {rule["alert"] for rule in ALERTS}


def test_the_dashboard_is_drawn_from_the_provisioned_source() -> None:
    (source,) = read(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    (provider,) = read(DEPLOY / "grafana/provisioning/dashboards/service.yml")["providers"]
    mounts = dict(volume.split(":")[1::-1] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounts[provider["options"]["path"]] == "./deploy/grafana/dashboards"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == source["uid"]


def test_prometheus_scrapes_what_is_there() -> None:
    jobs = read(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    targets = {
        job["job_name"]: (*discovery["names"], discovery["port"])
        for job in jobs
        for discovery in job["dns_sd_configs"]
    }
    services = COMPOSE["services"]
    assert targets == {"dit-api": ("api", 8000), "dit-worker": ("workers", 9100)}
    for worker in (services["worker"], services["worker-cpu"]):
        assert "workers" in worker["networks"]["metrics"]["aliases"]
        assert worker["environment"]["DIT_WORKER_METRICS_PORT"] == "9100"
    for service in (services["prometheus"], services["api"]):
        assert "metrics" in service["networks"]
