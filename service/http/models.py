"""The models of one API process: how each is asked, and how a new version replaces the old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from ditserve.commands import command_line
from ditserve.model.spec.bundle import PIPELINE
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.prompt_limit import PromptLimit
from ditserve.service.errors import QueueUnavailable
from ditserve.service.fleet import WorkerState
from ditserve.service.formats import EXTRAS, FORMATS, MediaFormat, kind_of
from ditserve.service.http.canary import Canary
from ditserve.service.http.media import check_format, written_formats
from ditserve.service.http.picture_reader import PictureReader
from ditserve.service.http.submission import Submissions
from ditserve.service.queue.queue_client import QueueClient
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from ditserve.service.telemetry import metrics

VERSION = "0.1.0"
_log = structlog.get_logger("service.models")


@dataclass(frozen=True, slots=True)
class Model:
    """One version of one model. All versions of a model share one queue client."""

    served: ServedModel
    submissions: Submissions
    queue_client: QueueClient
    canary: Canary | None

    @classmethod
    def of(
        cls, served: ServedModel, settings: Settings, queue_client: QueueClient, pictures: PictureReader
    ) -> Model:
        """Build a model of its opened bundle. Raises `BundleError` for a part that cannot be read."""
        bundle, manifest = served.bundle, served.bundle.manifest
        if not manifest.ladder:
            _log.warning(
                "no quality ladder: under load requests are refused, never drawn in fewer steps",
                model=manifest.name,
                remedy=f"{command_line('bench.ladder')} {served.folder} --write",
            )
        prompts = PromptLimit(manifest.config, bundle.path / PIPELINE)
        submissions = Submissions(
            manifest,
            settings,
            queue_client.queue,
            prompts=prompts,
            pictures=pictures,
            bundle=served.digest,
        )
        golden = manifest.golden
        canary = Canary(bundle.path, golden, submissions, queue_client.listener) if golden else None
        metrics.BUILD_INFO.labels(VERSION, manifest.name, manifest.version).set(1)
        for rung in manifest.ladder:
            metrics.ADMITTED_DEGRADED.labels(rung.name)
        return cls(served, submissions, queue_client, canary)

    @property
    def manifest(self) -> Manifest:
        return self.served.bundle.manifest

    async def workers(self) -> Sequence[WorkerState]:
        """Return the workers as they are known, without waiting long for Redis."""
        await self.submissions.load.refresh()
        load = self.submissions.load.last()
        return () if load is None else load.workers

    async def written_formats(self, asked: MediaFormat | None) -> tuple[MediaFormat, ...]:
        """Return the formats that the workers write, of which `asked` must be one if it is named.

        Raises `InvalidRequest`, `Overloaded`.
        """
        kind = kind_of(self.manifest)
        # All workers write what needs no package of its own, so Redis need not be asked.
        workers = await self.workers() if EXTRAS.keys() & FORMATS[kind] else ()
        check_format(asked, kind, workers)
        return written_formats(kind, workers)


async def reloaded(models: Mapping[str, Model], settings: Settings) -> dict[str, Model]:
    """Return the models as their folders hold them now.

    A model whose new bundle cannot be used, or that no worker has loaded, stays as it is.
    """
    current = dict(models)
    for name, model in models.items():
        try:
            served = model.served.reopened(verify=False)
            if served.digest == model.served.digest:
                continue
            await _check_served(served, model.queue_client)
            pictures = model.submissions.pictures
            current[name] = Model.of(served, settings, model.queue_client, pictures)
        except (BundleError, OSError, QueueUnavailable, ValueError) as error:
            _log.error("bundle not reloaded, the old one serves on", model=name, reason=str(error))
        else:
            _log.info("bundle reloaded", model=name, version=served.bundle.manifest.version)
            _clear_build_info(model.manifest, new=served.bundle.manifest)
    return current


async def _check_served(served: ServedModel, queue_client: QueueClient) -> None:
    """Raise `BundleError` where there are workers and none of them has loaded this bundle."""
    workers = (await queue_client.queue.load()).workers
    if workers and served.digest not in {worker.bundle for worker in workers}:
        raise BundleError(
            f"none of the workers has loaded {served.folder} as it is now: start new ones first"
        )


def _clear_build_info(old: Manifest, *, new: Manifest) -> None:
    if old.version != new.version:
        metrics.BUILD_INFO.labels(VERSION, old.name, old.version).set(0)
