"""The compose file and the images: structure, hardening, profiles, bundles, settings that are accepted."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import jsonschema
import pytest

from ditserve.service.settings import Settings
from tests.deploy.files import (
    COMPOSE,
    DEPLOY,
    ROOT,
    WORKLOADS,
    interpolated,
    manifest,
    read,
    stages,
)


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


@pytest.mark.parametrize("target", ["api", "worker-cpu", "worker"])
def test_images_are_installed_from_the_lock_of_the_extras_that_are_the_default(target: str) -> None:
    lines = stages()[f"packages-{target}"]
    (install,) = (line for line in lines if "--require-hashes" in line)
    assert f"--require-hashes --requirement locks/{target}.txt" in install
    (default,) = {line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS=")}
    assert f'if [ "${{EXTRAS}}" = {default} ]' in install
    # Without any, `.[]` would be no requirement.
    assert re.search(r'constraints\.txt "\.(\$\{EXTRAS:\+\[|\[\w+\$\{EXTRAS:\+,)', install)
    own = {"api": set[str](), "worker-cpu": {"cpu", "minilm"}, "worker": {"gpu", "minilm"}}[target]
    (made,) = re.findall(rf"call LOCK,{target},([\w -]+)\)", (ROOT / "Makefile").read_text())
    assert set(made.split()) == own | set(default.split(","))


def test_the_api_image_holds_neither_torch_nor_a_runtime() -> None:
    lock = (DEPLOY / "locks/api.txt").read_text()
    assert not re.findall(r"^(?:torch|onnx|tensorrt)\S*==", lock, re.MULTILINE)


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
    for stage in ("packages", "packages-worker"):
        assert any("--without-pip /venv" in line for line in stages()[stage])
    assert "RUN python -m compileall -q ." in stages()[target]


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
