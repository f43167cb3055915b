"""The models of one API process: what each is asked through, and how a new version of one takes the place of the old."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from ditserve.model.spec.bundle import BundleError, Manifest
from ditserve.service.errors import QueueUnavailable
from ditserve.service.http.canary import Canary
from ditserve.service.http.intake import Intake
from ditserve.service.queue.queue_client import QueueClient
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

VERSION = "0.1.0"
_log = structlog.get_logger("service.models")


@dataclass(frozen=True, slots=True)
class Model:
    """One version of one model; the backplane is that of its lane, whatever the version."""

    lane: ServedModel
    intake: Intake
    backplane: QueueClient
    canary: Canary | None

    @classmethod
    def of(cls, lane: ServedModel, settings: Settings, backplane: QueueClient) -> Model:
        """Raises `OSError` where the golden image cannot be read."""
        bundle, manifest = lane.bundle, lane.bundle.manifest
        intake = Intake(manifest, settings, backplane.queue)
        golden = manifest.golden
        canary = Canary(bundle.path, golden, intake, backplane.listener) if golden else None
        metrics.BUILD_INFO.labels(VERSION, manifest.name, manifest.version).set(1)
        return cls(lane, intake, backplane, canary)

    @property
    def manifest(self) -> Manifest:
        return self.lane.bundle.manifest


async def renewed(models: Mapping[str, Model], settings: Settings) -> dict[str, Model]:
    """The models with what their folders hold now; one that cannot be used, or that no worker has loaded, stays as it is."""
    found = dict(models)
    for name, model in models.items():
        try:
            lane = model.lane.reopened(verify=False)
            if lane.digest == model.lane.digest:
                continue
            await _served(lane, model.backplane)
            found[name] = Model.of(lane, settings, model.backplane)
        except (BundleError, OSError, QueueUnavailable, ValueError) as error:
            _log.error("bundle not reloaded, the old one serves on", model=name, reason=str(error))
        else:
            _log.info("bundle reloaded", model=name, version=lane.bundle.manifest.version)
            _forget(model.manifest, beside=lane.bundle.manifest)
    return found


async def _served(lane: ServedModel, backplane: QueueClient) -> None:
    """Raises `BundleError` where there are workers and none has this bundle."""
    workers = (await backplane.queue.load()).workers
    if workers and lane.digest not in {worker.bundle for worker in workers}:
        raise BundleError(f"none of the workers has loaded {lane.folder} as it is now: start new ones first")


def _forget(old: Manifest, *, beside: Manifest) -> None:
    if old.version != beside.version:
        metrics.BUILD_INFO.labels(VERSION, old.name, old.version).set(0)
