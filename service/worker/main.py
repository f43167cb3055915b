"""The worker process: builds a worker from settings, and turns signals into an orderly end."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import structlog
import uvloop

from ditserve.model.spec.adapters import AdapterFile
from ditserve.model.spec.bundle import DECODER, Bundle
from ditserve.model.spec.errors import BundleError
from ditserve.service.backends import (
    CONDITIONER_ROWS_GPU,
    Backend,
    BackendUnavailable,
    BlockCaching,
    load_backend,
)
from ditserve.service.engine.engine import Engine
from ditserve.service.errors import QueueUnavailable, ServiceError
from ditserve.service.exit_statuses import DONE, FAILED, refuse
from ditserve.service.garbage import keep_what_is_there
from ditserve.service.launch.engine_build import build_engines
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.embeddings import Embeddings
from ditserve.service.queue.namespace import refuse_other_models
from ditserve.service.queue.patience import until_answered
from ditserve.service.served_models import ServedModel, open_served_models
from ditserve.service.settings import Settings
from ditserve.service.signals import hold_signals, stop_signals, unless
from ditserve.service.telemetry import logs, metrics
from ditserve.service.telemetry.gpus import gpus
from ditserve.service.telemetry.tracing import open_tracing
from ditserve.service.worker.agreement import load_agreed
from ditserve.service.worker.backend_choice import backend_options, with_backend
from ditserve.service.worker.heartbeat import starting
from ditserve.service.worker.parts import build_engine, worker_identity, worker_parts, worker_policy
from ditserve.service.worker.postprocess import warm_decoder
from ditserve.service.worker.reload import Reload, begin_anew
from ditserve.service.worker.worker import Worker

WARM_UP_S = 0.8
# A thread of Python hands over to another that waits after so long. The engine's waits after every step, and
# beside it run the event loop and the encoding of images. The default, 5 ms, is as long as many a step.
SWITCH_S = 0.0005

Report = Callable[[str], None]  # takes the worker's current activity
Opener = Callable[[Report, asyncio.Event, Broker], Awaitable[dict[str, Backend] | None]]

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Work until told to stop; return the exit status.

    An error that no restart can mend is one sentence on stderr and status 2. Status 1: another start may
    help. While Redis is away the worker waits for it.
    """
    sys.setswitchinterval(SWITCH_S)
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        if settings.redis_url is None:
            raise ValueError("REDIS_URL is not set: name the Redis that the API and its workers share")
        model = only_model(settings)
        if settings.worker_metrics_port:
            metrics.serve(settings.worker_metrics_port)
        # A setting that does not fit is refused before Redis is asked.
        backend_options(settings, model.bundle.manifest)
        opener = partial(open_backends, settings, model)
        reload = Reload(model, verify=settings.verify)
        orderly = uvloop.run(serve(settings, model, opener, reload))
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
    settings: Settings,
    bundle: Bundle,
    report: Report,
    stop: asyncio.Event,
    broker: Broker,
    *,
    adapters: Sequence[AdapterFile] = (),
) -> Backend | None:
    """Build the engines that are missing, if the settings say so, and open the backend.

    It computes in the precision on which the workers of the bundle agree. `adapters` are loaded where the
    backend takes them.

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
    if adapters and backend == "torch":
        options["adapters"] = adapters
    elif adapters:
        names = ", ".join(adapter.name for adapter in adapters)
        log.warning("adapters not loaded: they need --backend torch", backend=backend, adapters=names)
    return await load_agreed(backend, bundle, options, broker, load=load_backend)


async def open_backends(
    settings: Settings, model: ServedModel, report: Report, stop: asyncio.Event, broker: Broker
) -> dict[str, Backend] | None:
    """Open the networks of a bundle by name: "" is its own, the others are its further backbones.

    Adapters change its own alone.

    Return None if stopped meanwhile. Raises as `open_backend`.
    """
    bundle = model.bundle
    backbones = bundle.manifest.backbones
    parts = {"": bundle}
    parts |= {name: bundle.backbone(name) for name, spec in backbones.items() if not spec.block_cache}
    opened: dict[str, Backend] = {}
    with ExitStack() as stack:
        for name, part in parts.items():
            adapters = () if name else model.adapters
            backend = await open_backend(settings, part, report, stop, broker, adapters=adapters)
            if backend is None:
                return None
            stack.callback(backend.close)
            opened[name] = backend
        for name, spec in backbones.items():
            if spec.block_cache:
                own = opened[name] = opened[""]
                if isinstance(own, BlockCaching):
                    opened[name] = await asyncio.to_thread(own.with_block_cache, bundle, spec.block_cache)
                if opened[name] is own:
                    log.warning(
                        "all blocks run: a block cache needs --backend onnx, or torch in fp32", backbone=name
                    )
                else:
                    stack.callback(opened[name].close)
        stack.pop_all()
    return opened


async def serve(settings: Settings, model: ServedModel, opener: Opener, reload: Reload | None = None) -> bool:
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
        if not await unless(stop, _join_queue(broker, settings.namespace, model.name)):
            return True
        async with starting(broker, name, model.name) as report:
            backends = await opener(report, stop, broker)
            if backends is None:
                return True
            backend, engine = backends[""], build_engine(backends, settings, embeddings)
            report("warming up")
            await asyncio.to_thread(_warm_up, engine, backends)
            keep_what_is_there()
        parts = worker_parts(backends, engine, broker, embeddings, tracing)
        identity = worker_identity(name, model, backends)
        worker = Worker(parts, identity, worker_policy(settings, engine))
        metrics.NETWORK_INFO.labels(backend.name, backend.precision).set(1)
        log.info(
            "worker ready",
            worker=name,
            model=identity.model,
            backend=backend.name,
            precision=backend.precision,
            kernels=backend.kernels,
            **_gpu_memory(settings),
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
        for backend in dict.fromkeys((backends or {}).values()):
            backend.close()


def _warm_up(engine: Engine, backends: Mapping[str, Backend]) -> None:
    """Run batches, and on a GPU decode, where nobody waits yet."""
    engine.warm_up(WARM_UP_S)
    for name, backend in backends.items():
        decodes = not name or DECODER in backend.manifest.files
        if decodes and backend.conditioner_rows == CONDITIONER_ROWS_GPU:
            _warm_decoder(backend)


def _warm_decoder(backend: Backend) -> None:
    """Take the memory that decoding needs.

    Raises:
        BackendUnavailable: there is too little of it.
    """
    config = backend.manifest.config
    try:
        warm_decoder(backend, (config.in_channels, *config.image_size))
    except MemoryError as error:
        raise BackendUnavailable(
            f"too little memory on the GPU to decode ({error}): lower --max-rows, --modulation-cache-bytes, "
            "or the workers on it"
        ) from None


def _gpu_memory(settings: Settings) -> dict[str, str]:
    """Return the memory in use of each GPU that this worker sees, by anybody, for the log."""
    visible = settings.visible_gpus()
    return {
        f"gpu_{gpu.index}_memory": f"{gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB"
        for gpu in gpus()
        if visible is None or gpu.uuid in visible or str(gpu.index) in visible
    }


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
