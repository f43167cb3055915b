"""The worker process: the parts of a worker put together from settings, and signals turned into an orderly end."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from typing import Any, Final

import structlog

from model.bundle import Bundle, BundleError, Manifest
from service import logs, metrics
from service.backends import Backend, BackendUnavailable, load_backend, load_text_encoder
from service.engine.conditions import Conditions
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.engine.texts import SharedCache, TextEncodings
from service.errors import QueueUnavailable, ServiceError
from service.jobs import Network
from service.limits import WorkerPolicy
from service.planning.costs import CostModel
from service.planning.planner import Planner
from service.planning.rungs import Ladder
from service.queue.broker import Broker
from service.queue.embeddings import Embeddings
from service.settings import Settings
from service.signals import stop_signals
from service.tracing import open_tracing
from service.worker.checkpoints import origin
from service.worker.observing import Observing
from service.worker.worker import Worker

CONFIG_ERROR, BROKEN = 2, 1
WARM_UP_S = 0.5

# Backend → the settings it takes, besides threads.
OPTIONS: Final = {
    "onnx": ("precision", "providers"),
    "torch": ("device", "compile"),
    "tensorrt": ("precision",),
}

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Work until told to stop; returns the exit status. What cannot work is one sentence on stderr and status 2, or 1 where
    trying again may help."""
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        if settings.redis_url is None:
            raise ValueError("REDIS_URL is not set: name the Redis that the API and its workers share")
        bundle = Bundle.open(settings.bundle, verify=settings.verify)
        backend = load_backend(settings.backend, bundle, **backend_options(settings))
        orderly = asyncio.run(serve(settings, backend))
    except (BundleError, BackendUnavailable, ServiceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BROKEN if isinstance(error, QueueUnavailable) else CONFIG_ERROR
    return 0 if orderly else BROKEN


async def serve(settings: Settings, backend: Backend) -> bool:
    assert settings.redis_url is not None
    url = settings.redis_url.get_secret_value()
    tracing = open_tracing(settings.otlp_endpoint, "dit-worker")
    broker = await Broker.connect(
        url,
        namespace=settings.namespace,
        queue_limit=settings.queue_limit,
        result_ttl_s=settings.result_ttl_s,
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
    )
    embeddings = Embeddings(url, namespace=settings.namespace, max_bytes=settings.embedding_cache_bytes)
    try:
        engine = build_engine(backend, settings, embeddings)
        await asyncio.to_thread(engine.warm_up, WARM_UP_S)
        if settings.worker_metrics_port:
            metrics.serve(settings.worker_metrics_port)
        worker = Worker(
            broker=broker,
            engine=engine,
            decoder=backend,
            ladder=engine.ladder,
            name=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
            model=backend.manifest.name,
            policy=WorkerPolicy(
                max_rows=engine.scheduler.max_rows,
                lookahead_rows=settings.lookahead_rows,
                drain_s=settings.drain_s,
                hang_s=settings.hang_s,
            ),
            origin=origin(backend.manifest, f"{backend.name} {backend.precision}"),
            network=Network(backend.name, backend.precision, backend.size_multiple),
            observe=Observing(engine, embeddings),
            tracing=tracing,
        )
        metrics.NETWORK_INFO.labels(backend.name, backend.precision).set(1)
        log.info(
            "worker ready",
            worker=worker.name,
            model=worker.model,
            backend=backend.name,
            precision=backend.precision,
        )
        return await worker.run(*stop_signals())
    finally:
        await embeddings.aclose()
        await broker.aclose()
        tracing.close()
        backend.close()


def backend_options(settings: Settings) -> dict[str, Any]:
    """What the chosen backend is opened with: the settings that were set, and the backend's own choice of the others.

    Raises:
        BackendUnavailable: one is set that this backend does not take.
    """
    chosen: dict[str, Any] = {"threads": settings.threads}
    for name in dict.fromkeys(option for options in OPTIONS.values() for option in options):
        value = getattr(settings, name)
        if value == Settings.model_fields[name].default:
            continue
        if name not in OPTIONS[settings.backend]:
            takers = " and ".join(backend for backend, options in OPTIONS.items() if name in options)
            raise BackendUnavailable(
                f"--{name} is for the {takers} backend, not for {settings.backend}: leave it out"
            )
        chosen[name] = tuple(value.split(",")) if name == "providers" else value
    return chosen


def open_texts(manifest: Manifest, settings: Settings, shared: SharedCache | None) -> TextEncodings | None:
    """What encodes sentences for a model that takes text; None for one that does not.

    Raises:
        BackendUnavailable: there is no such encoder here, or it is not the model's.
    """
    wanted = manifest.config.text_size
    if not wanted:
        return None
    data = manifest.provenance.get("training", {}).get("data", {})
    encoder = load_text_encoder(settings.text_encoder or data.get("text") or "minilm")
    if encoder.size != wanted:
        raise BackendUnavailable(
            f"the text encoder gives {encoder.size} numbers and the model takes {wanted}: name the right one with --text-encoder"
        )
    return TextEncodings(encoder, shared, capacity=settings.embedding_cache_bytes)


def build_engine(backend: Backend, settings: Settings, shared: SharedCache | None = None) -> Engine:
    """An engine for a bundle; its slots hold what may run, what is claimed ahead, and one job more."""
    ladder = Ladder.from_manifest(backend.manifest)
    return Engine(
        backend=backend,
        conditions=Conditions(
            backend,
            modulation_bytes=settings.modulation_cache_bytes,
            embedding_bytes=settings.embedding_cache_bytes,
            texts=open_texts(backend.manifest, settings, shared),
        ),
        scheduler=Scheduler(
            max_rows=settings.strict_rows or settings.max_rows,
            buckets=backend.buckets,
            strict=settings.strict_rows > 0,
        ),
        planner=Planner(ladder),
        ladder=ladder,
        costs=CostModel(),
        schedule=backend.manifest.diffusion.noise_schedule(),
        clock=time.time,
        slots=settings.max_rows + settings.lookahead_rows + settings.max_images,
    )
