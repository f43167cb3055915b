"""The worker process: builds a worker from settings, and turns signals into an orderly end."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from functools import partial

import structlog
import uvloop

from ditserve.model.spec.bundle import Bundle, BundleError, Manifest
from ditserve.model.spec.network_config import negative_mark
from ditserve.model.spec.text_encoder import text_encoder_name
from ditserve.service.backends import (
    Backend,
    BackendUnavailable,
    SentenceEncoder,
    load_backend,
    load_text_encoder,
)
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.forward import Backbone
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.text_cache import SharedCache, TextCache
from ditserve.service.errors import QueueUnavailable, ServiceError
from ditserve.service.exit_statuses import DONE, FAILED, refuse
from ditserve.service.identity import bundle_digest, vocabulary_digest
from ditserve.service.jobs import Network
from ditserve.service.launch.engine_build import build_engines
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.embeddings import Embeddings
from ditserve.service.queue.namespace import refuse_other_models
from ditserve.service.queue.patience import until_answered
from ditserve.service.served_models import ServedModel, open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import hold_signals, stop_signals, unless
from ditserve.service.telemetry import logs, metrics
from ditserve.service.telemetry.tracing import Tracing, open_tracing
from ditserve.service.worker.agreement import load_agreed
from ditserve.service.worker.backend_choice import backend_options, with_backend
from ditserve.service.worker.engine_metrics import EngineMetrics
from ditserve.service.worker.engine_monitor import WorkerIdentity
from ditserve.service.worker.engine_thread import ProcessorWaits
from ditserve.service.worker.handoff import checkpoint_origin
from ditserve.service.worker.heartbeat import starting
from ditserve.service.worker.previews import LARGE_DECODERS, PreviewDecoder
from ditserve.service.worker.reload import Reload, begin_anew
from ditserve.service.worker.room import RESERVED_SAMPLES
from ditserve.service.worker.worker import Worker, WorkerParts

WARM_UP_S = 0.8

Report = Callable[[str], None]  # takes the worker's current activity
Opener = Callable[[Report, asyncio.Event, Broker], Awaitable[dict[str, Backend] | None]]

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Work until told to stop; return the exit status.

    An error that no restart can mend is one sentence on stderr and status 2. Status 1: another start may
    help. While Redis is away the worker waits for it.
    """
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        if settings.redis_url is None:
            raise ValueError("REDIS_URL is not set: name the Redis that the API and its workers share")
        model = only_model(settings)
        if settings.worker_metrics_port:
            metrics.serve(settings.worker_metrics_port)
        # A setting that does not fit is refused before Redis is asked.
        backend_options(settings, model.bundle.manifest)
        opener = partial(open_backends, settings, model.bundle)
        reload = Reload(model, verify=settings.verify)
        orderly = uvloop.run(serve(settings, model.name, opener, reload))
    except QueueUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except (BundleError, BackendUnavailable, ServiceError, ValueError) as error:
        return refuse(error)
    if orderly and reload.wanted:
        begin_anew()
    return DONE if orderly else FAILED


def only_model(settings: Settings) -> ServedModel:
    """Return the model of the settings. Raise `BundleError`, and `ValueError` if they name several."""
    models = open_served_models(settings, verify=settings.verify)
    if len(models) > 1:
        flags = " and ".join(f"--bundle {model.folder} --namespace {model.namespace}" for model in models)
        raise ValueError(f"a worker serves one bundle: start workers with {flags}")
    return models[0]


async def open_backend(
    settings: Settings, bundle: Bundle, report: Report, stop: asyncio.Event, broker: Broker
) -> Backend | None:
    """Build the engines that are missing, if the settings say so, and open the backend.

    It computes in the precision on which the workers of the bundle agree.

    Return None if stopped meanwhile.

    Raises:
        BackendUnavailable, BundleError: see `load_backend` and `build_engines`.
    """
    options = backend_options(settings, bundle.manifest)
    if settings.export_on_start:
        report("looking for engines")
        if not await build_engines(
            bundle.path,
            precision=settings.precision,
            engines=options.get("engines"),
            on_progress=lambda progress: report(str(progress)),
            stop=stop,
        ):
            return None
    report("loading the network")
    backend = with_backend(settings, bundle.manifest).backend
    return await load_agreed(backend, bundle, options, broker, load=load_backend)


async def open_backends(
    settings: Settings, bundle: Bundle, report: Report, stop: asyncio.Event, broker: Broker
) -> dict[str, Backend] | None:
    """Open the networks of a bundle by name: "" is its own, the others are its further backbones.

    Return None if stopped meanwhile. Raises as `open_backend`.
    """
    parts = {"": bundle, **{name: bundle.backbone(name) for name in bundle.manifest.backbones}}
    opened: dict[str, Backend] = {}
    with ExitStack() as stack:
        for name, part in parts.items():
            backend = await open_backend(settings, part, report, stop, broker)
            if backend is None:
                return None
            stack.callback(backend.close)
            opened[name] = backend
        stack.pop_all()
    return opened


async def serve(settings: Settings, model: str, opener: Opener, reload: Reload | None = None) -> bool:
    """Work until told to stop, on the backends that `opener` opens. Return False if the engine is broken.

    With `reload` the worker also drains once there is a new bundle; whoever tells it to stop then means it.
    """
    assert settings.redis_url is not None
    stop, force_stop = stop_signals()
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    url = settings.redis_url.get_secret_value()
    tracing = open_tracing(settings.otlp_endpoint, "dit-worker")
    broker = Broker.open(
        url,
        namespace=settings.namespace,
        queue_limit=settings.queue_limit,
        result_ttl_s=settings.result_ttl_s,
        lease_s=settings.lease_s,
        max_run_s=settings.max_run_s,
        max_attempts=settings.max_attempts,
    )
    embeddings = Embeddings(
        url, namespace=settings.namespace, max_bytes=settings.embedding_cache_bytes, clock=broker.clock
    )
    backends: dict[str, Backend] | None = None
    watching = asyncio.create_task(reload.watch(stop)) if reload is not None else None
    try:
        if not await unless(stop, _join_queue(broker, settings.namespace, model)):
            return True
        async with starting(broker, name, model) as report:
            backends = await opener(report, stop, broker)
            if backends is None:
                return True
            report("warming up")
            engine = build_engine(backends, settings, embeddings)
            await asyncio.to_thread(engine.warm_up, WARM_UP_S)
        backend = backends[""]
        parts = worker_parts(backend, engine, broker, embeddings, tracing)
        identity = worker_identity(name, backends)
        worker = Worker(parts, identity, worker_policy(settings, engine))
        metrics.NETWORK_INFO.labels(backend.name, backend.precision).set(1)
        log.info(
            "worker ready",
            worker=name,
            model=identity.model,
            backend=backend.name,
            precision=backend.precision,
        )
        return await worker.run(stop, force_stop)
    finally:
        if watching is not None:
            watching.cancel()
        if reload is not None and reload.wanted:
            hold_signals()
            reload.wanted = not force_stop.is_set()
        await embeddings.aclose()
        await broker.aclose()
        tracing.close()
        for backend in (backends or {}).values():
            backend.close()


async def _join_queue(broker: Broker, namespace: str, model: str) -> None:
    """Wait for Redis. Raise `ValueError` where workers of another model serve the namespace."""
    await until_answered(broker.start)
    check = partial(
        refuse_other_models,
        broker.load,
        namespace=namespace,
        model=model,
        patience_s=broker.limits.report_ttl_s,
    )
    await until_answered(check)


def open_texts(
    manifest: Manifest,
    settings: Settings,
    shared: SharedCache | None,
    encoder: SentenceEncoder | None = None,
) -> TextCache | None:
    """Return the text encodings of a model that takes text; None for one that does not.

    `encoder` is the model's own, which an imported pipeline has.

    Raises:
        BackendUnavailable: there is no such encoder here, or it is not the model's.
        BundleError: the model's is a class, which must be named in the settings.
    """
    wanted = manifest.config.text_width
    if not wanted:
        return None
    if encoder is not None:
        if settings.text_encoder:
            raise BackendUnavailable(
                f"{manifest.name} brings its own text encoders: leave out --text-encoder"
            )
        capacity = settings.embedding_cache_bytes
        negative = negative_mark(manifest.config)
        return TextCache(encoder, shared, capacity=capacity, encodes_nothing=True, negative=negative)
    name = text_encoder_name(manifest, settings.text_encoder, "--text-encoder")
    encoder = load_text_encoder(name, manifest.config.text_tokens)
    if encoder.size != wanted:
        raise BackendUnavailable(
            f"the text encoder gives {encoder.size} numbers and the model takes {wanted}: "
            "name the right one with --text-encoder"
        )
    return TextCache(encoder, shared, capacity=settings.embedding_cache_bytes)


def build_engine(
    backends: Mapping[str, Backend], settings: Settings, shared: SharedCache | None = None
) -> Engine:
    """Build an engine for the networks of a bundle, as `open_backends` gives them.

    Its slots hold what may run, what is claimed ahead, what is reserved for newcomers, and one job more.

    Raises:
        BackendUnavailable: the memory of this machine is too small.
    """
    try:
        return _engine(backends, settings, shared)
    except MemoryError as error:
        raise BackendUnavailable(
            f"too little memory ({error}): lower --modulation-cache-bytes, --max-rows or --lookahead-rows"
        ) from None


def _engine(backends: Mapping[str, Backend], settings: Settings, shared: SharedCache | None) -> Engine:
    backend = backends[""]
    manifest = backend.manifest
    ladder = Ladder.from_manifest(manifest)
    texts = open_texts(manifest, settings, shared, backend.text_encoder)
    caches = {
        name: ConditionCaches(
            each,
            modulation_bytes=settings.modulation_cache_bytes // len(backends),
            embedding_bytes=settings.embedding_cache_bytes // len(backends),
            texts=texts,
        )
        for name, each in backends.items()
    }
    return Engine(
        backend=backend,
        conditions=caches[""],
        scheduler=Scheduler(
            max_rows=settings.strict_rows or settings.max_rows,
            buckets=backend.buckets,
            strict=settings.strict_rows > 0,
        ),
        planner=Planner(ladder),
        ladder=ladder,
        costs=CostModel(),
        schedule=manifest.diffusion.noise_schedule(),
        clock=time.monotonic,
        waited=ProcessorWaits(),
        slots=settings.max_rows + settings.lookahead_rows + RESERVED_SAMPLES + settings.max_images,
        backbones={
            name: Backbone(backends[name], caches[name], spec.row_cost)
            for name, spec in manifest.backbones.items()
            if name in backends
        },
    )


def worker_parts(
    backend: Backend, engine: Engine, broker: Broker, embeddings: Embeddings, tracing: Tracing
) -> WorkerParts:
    """Return the parts of a worker whose engine is warm."""
    manifest, previews = backend.manifest, None
    if manifest.decoder in LARGE_DECODERS:
        previews = PreviewDecoder(backend, channels=manifest.config.in_channels, factor=manifest.upscale)
    return WorkerParts(
        broker=broker,
        engine=engine,
        decoder=backend,
        ladder=engine.ladder,
        factors=manifest.factors,
        unguided_scale=manifest.diffusion.unguided_scale,
        previews=previews,
        observe=EngineMetrics(engine, embeddings),
        tracing=tracing,
    )


def worker_identity(name: str, backends: Mapping[str, Backend]) -> WorkerIdentity:
    backend = backends[""]
    manifest = backend.manifest
    networks = "".join(f"{part} {each.name} {each.precision} " for part, each in backends.items())
    return WorkerIdentity(
        name=name,
        model=manifest.name,
        bundle=bundle_digest(manifest),
        vocabulary=vocabulary_digest(manifest),
        origin=checkpoint_origin(manifest, networks.strip()),
        network=Network(backend.name, backend.precision, backend.size_multiple),
    )


def worker_policy(settings: Settings, engine: Engine) -> WorkerPolicy:
    return WorkerPolicy(
        max_rows=engine.scheduler.max_rows,
        lookahead_rows=settings.lookahead_rows,
        drain_s=settings.drain_s,
        hang_s=settings.hang_s,
    )
