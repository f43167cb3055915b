"""The files of `deploy/`, the compose file and the Dockerfile, read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"

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


COMPOSE = read(ROOT / "docker-compose.yml")
ALERTS = [rule for group in read(DEPLOY / "prometheus/alerts.yml")["groups"] for rule in group["rules"]]
PANELS = json.loads((DEPLOY / "grafana/dashboards/service.json").read_text())["panels"]
WORKLOADS = {"api": "Deployment", "worker": "StatefulSet"}


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
