"""The worker process: the parts of a worker put together from settings, and signals turned into an orderly end."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time

import structlog

from model.bundle import Bundle, BundleError
from service import logs, metrics
from service.backends import Backend, BackendUnavailable, load_backend
from service.engine.conditions import Conditions
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.errors import ServiceError
from service.limits import WorkerPolicy
from service.planning.costs import CostModel
from service.planning.planner import Planner
from service.planning.rungs import Ladder
from service.queue.broker import Broker
from service.settings import Settings
from service.signals import stop_signals
from service.worker.observing import Observing
from service.worker.worker import Worker

CONFIG_ERROR, BROKEN = 2, 1
WARM_UP_S = 0.5

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Work until told to stop; returns the exit status. What cannot work is one sentence on stderr and status 2."""
    logs.configure(style=settings.log_format, level=settings.log_level)
    try:
        if settings.redis_url is None:
            raise ValueError("REDIS_URL is not set: name the Redis that the API and its workers share")
        bundle = Bundle.open(settings.bundle)
        backend = load_backend(settings.backend, bundle, threads=settings.threads)
        orderly = asyncio.run(serve(settings, backend))
    except (BundleError, BackendUnavailable, ServiceError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIG_ERROR
    return 0 if orderly else BROKEN


async def serve(settings: Settings, backend: Backend) -> bool:
    assert settings.redis_url is not None
    broker = await Broker.connect(
        settings.redis_url.get_secret_value(),
        namespace=settings.namespace,
        queue_limit=settings.queue_limit,
        result_ttl_s=settings.result_ttl_s,
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
    )
    try:
        engine = build_engine(backend, settings)
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
                max_rows=settings.max_rows, lookahead_rows=settings.lookahead_rows, drain_s=settings.drain_s
            ),
            observe=Observing(engine),
        )
        log.info("worker ready", worker=worker.name, model=worker.model, backend=backend.name)
        return await worker.run(*stop_signals())
    finally:
        await broker.aclose()
        backend.close()


def build_engine(backend: Backend, settings: Settings) -> Engine:
    """An engine for a bundle; its slots hold what may run, what is claimed ahead, and one job more."""
    ladder = Ladder.from_manifest(backend.manifest)
    return Engine(
        backend=backend,
        conditions=Conditions(backend),
        scheduler=Scheduler(max_rows=settings.max_rows, buckets=backend.buckets),
        planner=Planner(ladder),
        ladder=ladder,
        costs=CostModel(),
        schedule=backend.manifest.diffusion.noise_schedule(),
        clock=time.time,
        slots=settings.max_rows + settings.lookahead_rows + settings.max_images,
    )
