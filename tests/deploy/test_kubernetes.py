"""The manifests and overlays of Kubernetes: schemas, references, probes, network policies."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import (
    ALERTS,
    DEPLOY,
    ROOT,
    WORKLOADS,
    Document,
    manifest,
    manifests,
    read,
)

KUBERNETES = "1.34"
# Kinds of operators, which kubernetes-validate does not know.
FOREIGN = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
OVERLAYS = ("cpu", "gpu", "ingress", "monitoring", "autoscaling")


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
    """The documents that `kubectl kustomize` makes of a folder."""
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
