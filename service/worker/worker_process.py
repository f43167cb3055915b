"""The worker process: the parts of a worker put together from settings, and signals turned into an orderly end."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import structlog
import uvloop

from ditserve.model.spec.bundle import Bundle, BundleError, Manifest
from ditserve.service.backends import Backend, BackendUnavailable, load_backend, load_text_encoder
from ditserve.service.engine.conditions import Conditions
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.texts import SharedCache, TextEncodings
from ditserve.service.errors import QueueUnavailable, ServiceError
from ditserve.service.identity import bundle_digest, vocabulary_digest
from ditserve.service.jobs import Network
from ditserve.service.launch.engine_build import build_engines
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.embeddings import Embeddings
from ditserve.service.served_models import open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import stop_signals
from ditserve.service.telemetry import logs, metrics
from ditserve.service.telemetry.tracing import Tracing, open_tracing
from ditserve.service.worker.checkpoints import origin
from ditserve.service.worker.observing import Observing
from ditserve.service.worker.starting import starting
from ditserve.service.worker.worker import Worker

CONFIG_ERROR, BROKEN = 2, 1
WARM_UP_S = 0.5

# Backend → the settings it takes, besides threads.
OPTIONS: Final = {
    "onnx": ("precision", "providers"),
    "torch": ("device", "compile"),
    "tensorrt": ("precision", "engines"),
}

# Setting → the option it stands for.
READ: Final[dict[str, Callable[[Any, Manifest], Any]]] = {
    "providers": lambda value, _: tuple(value.split(",")),
    "engines": lambda value, manifest: value / manifest.name,
}

Tell = Callable[[str], None]
Opener = Callable[[Tell, asyncio.Event], Awaitable[Backend | None]]

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Work until told to stop; returns the exit status. What cannot work is one sentence on stderr and status 2, or 1 where
    trying again may help."""
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        if settings.redis_url is None:
            raise ValueError("REDIS_URL is not set: name the Redis that the API and its workers share")
        bundle = only_bundle(settings)
        opener = partial(open_backend, settings, bundle, backend_options(settings, bundle.manifest))
        orderly = uvloop.run(serve(settings, bundle.manifest.name, opener))
    except (BundleError, BackendUnavailable, ServiceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BROKEN if isinstance(error, QueueUnavailable) else CONFIG_ERROR
    return 0 if orderly else BROKEN


def only_bundle(settings: Settings) -> Bundle:
    """The bundle of the settings. Raises `BundleError`, and `ValueError` where they name several."""
    lanes = open_served_models(settings, verify=settings.verify)
    if len(lanes) > 1:
        ways = " and ".join(f"--bundle {each.folder} --namespace {each.namespace}" for each in lanes)
        raise ValueError(f"a worker serves one bundle: start workers with {ways}")
    return lanes[0].bundle


async def open_backend(
    settings: Settings, bundle: Bundle, options: Mapping[str, Any], tell: Tell, stop: asyncio.Event
) -> Backend | None:
    """The backend of the settings, after the engines that it lacks were built if they are to be; None if stopped meanwhile.

    Raises:
        BackendUnavailable, BundleError: see `load_backend` and `build_engines`.
    """
    if settings.export_on_start:
        tell("looking for engines")
        if not await build_engines(
            bundle.path,
            precision=settings.precision,
            engines=options.get("engines"),
            told=lambda building: tell(str(building)),
            stop=stop,
        ):
            return None
    tell("loading the network")
    return await asyncio.to_thread(load_backend, settings.backend, bundle, **options)


async def serve(settings: Settings, model: str, opener: Opener) -> bool:
    """Work until told to stop, on the backend that `opener` opens. False if it ended because the engine is broken."""
    assert settings.redis_url is not None
    stop, hurry = stop_signals()
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
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
    backend: Backend | None = None
    try:
        if settings.worker_metrics_port:
            metrics.serve(settings.worker_metrics_port)
        async with starting(broker, name, model) as tell:
            backend = await opener(tell, stop)
            if backend is None:
                return True
            tell("warming up")
            engine = build_engine(backend, settings, embeddings)
            await asyncio.to_thread(engine.warm_up, WARM_UP_S)
        worker = build_worker(settings, name, backend, broker, engine, Observing(engine, embeddings), tracing)
        metrics.NETWORK_INFO.labels(backend.name, backend.precision).set(1)
        log.info(
            "worker ready",
            worker=worker.name,
            model=worker.model,
            backend=backend.name,
            precision=backend.precision,
        )
        return await worker.run(stop, hurry)
    finally:
        await embeddings.aclose()
        await broker.aclose()
        tracing.close()
        if backend is not None:
            backend.close()


def backend_options(settings: Settings, manifest: Manifest) -> dict[str, Any]:
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
        chosen[name] = READ[name](value, manifest) if name in READ else value
    if settings.export_on_start and settings.backend != "tensorrt":
        raise BackendUnavailable(
            f"--export-on-start is for the tensorrt backend, not for {settings.backend}: leave it out"
        )
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


def build_worker(
    settings: Settings,
    name: str,
    backend: Backend,
    broker: Broker,
    engine: Engine,
    observe: Observing,
    tracing: Tracing,
) -> Worker:
    """The worker of an engine that is warm."""
    manifest = backend.manifest
    return Worker(
        broker=broker,
        engine=engine,
        decoder=backend,
        factors=manifest.factors,
        ladder=engine.ladder,
        name=name,
        model=manifest.name,
        policy=WorkerPolicy(
            max_rows=engine.scheduler.max_rows,
            lookahead_rows=settings.lookahead_rows,
            drain_s=settings.drain_s,
            hang_s=settings.hang_s,
        ),
        origin=origin(manifest, f"{backend.name} {backend.precision}"),
        bundle=bundle_digest(manifest),
        vocabulary=vocabulary_digest(manifest),
        network=Network(backend.name, backend.precision, backend.size_multiple),
        observe=observe,
        tracing=tracing,
    )


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
