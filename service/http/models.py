"""The models of one API process: how each is asked, and how a new version replaces the old one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from ditserve.model.spec.bundle import BundleError, Manifest
from ditserve.service.errors import QueueUnavailable
from ditserve.service.http.canary import Canary
from ditserve.service.http.submission import Submissions
from ditserve.service.queue.backplane import Backplane
from ditserve.service.served_models import Lane
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

VERSION = "0.1.0"
_log = structlog.get_logger("service.models")


@dataclass(frozen=True, slots=True)
class Model:
    """One version of one model. Its backplane is that of its lane, and stays the same from version to version."""

    lane: Lane
    submissions: Submissions
    backplane: Backplane
    canary: Canary | None

    @classmethod
    def of(cls, lane: Lane, settings: Settings, backplane: Backplane) -> Model:
        """Build a model of the bundle of a lane. Raises `OSError` where the golden image cannot be read."""
        bundle, manifest = lane.bundle, lane.bundle.manifest
        submissions = Submissions(manifest, settings, backplane.queue)
        golden = manifest.golden
        canary = Canary(bundle.path, golden, submissions, backplane.listener) if golden else None
        metrics.BUILD_INFO.labels(VERSION, manifest.name, manifest.version).set(1)
        return cls(lane, submissions, backplane, canary)

    @property
    def manifest(self) -> Manifest:
        return self.lane.bundle.manifest


async def reloaded(models: Mapping[str, Model], settings: Settings) -> dict[str, Model]:
    """Return the models as their folders hold them now.

    A model whose new bundle cannot be used, or that no worker has loaded, stays as it is.
    """
    current = dict(models)
    for name, model in models.items():
        try:
            lane = model.lane.reopened(verify=False)
            if lane.digest == model.lane.digest:
                continue
            await _check_served(lane, model.backplane)
            current[name] = Model.of(lane, settings, model.backplane)
        except (BundleError, OSError, QueueUnavailable, ValueError) as error:
            _log.error("bundle not reloaded, the old one serves on", model=name, reason=str(error))
        else:
            _log.info("bundle reloaded", model=name, version=lane.bundle.manifest.version)
            _clear_build_info(model.manifest, new=lane.bundle.manifest)
    return current


async def _check_served(lane: Lane, backplane: Backplane) -> None:
    """Raise `BundleError` where there are workers and none of them has loaded this bundle."""
    workers = (await backplane.queue.load()).workers
    if workers and lane.digest not in {worker.bundle for worker in workers}:
        raise BundleError(f"none of the workers has loaded {lane.folder} as it is now: start new ones first")


def _clear_build_info(old: Manifest, *, new: Manifest) -> None:
    if old.version != new.version:
        metrics.BUILD_INFO.labels(VERSION, old.name, old.version).set(0)
