"""The parts of a worker, made of its settings and of the networks of its bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import lcm

from ditserve.model.spec.bundle import DECODER
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import negative_mark
from ditserve.model.spec.text_encoder import text_encoder_name
from ditserve.service.backends import (
    Backend,
    BackendUnavailable,
    SentenceEncoder,
    load_text_encoder,
)
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.forward import Backbone
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.text_cache import SharedCache, TextCache
from ditserve.service.fleet import Network
from ditserve.service.formats import kind_of
from ditserve.service.identity import vocabulary_digest
from ditserve.service.limits import WorkerPolicy
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner
from ditserve.service.queue.broker import Broker
from ditserve.service.queue.embeddings import Embeddings
from ditserve.service.served_models import ServedModel
from ditserve.service.settings import Settings
from ditserve.service.telemetry.tracing import Tracing
from ditserve.service.worker.clips import extra_formats
from ditserve.service.worker.engine_metrics import EngineMetrics
from ditserve.service.worker.engine_monitor import WorkerIdentity
from ditserve.service.worker.engine_thread import ProcessorWaits
from ditserve.service.worker.handoff import checkpoint_origin
from ditserve.service.worker.previews import LARGE_DECODERS, PreviewDecoder
from ditserve.service.worker.room import RESERVED_SAMPLES
from ditserve.service.worker.worker import WorkerParts


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
    # A block cache changes nothing of what depends on the condition.
    apart = [name for name in backends if not name or manifest.backbones[name].block_cache is None]
    caches = {
        name: ConditionCaches(
            backends[name],
            modulation_bytes=settings.modulation_cache_bytes // len(apart),
            embedding_bytes=settings.embedding_cache_bytes // len(apart),
            texts=texts,
        )
        for name in apart
    }
    caches |= dict.fromkeys(backends.keys() - caches.keys(), caches[""])
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
            name: Backbone(each, caches[name], manifest.backbones[name].row_cost)
            for name, each in backends.items()
            if name
        },
    )


def worker_parts(
    backends: Mapping[str, Backend], engine: Engine, broker: Broker, embeddings: Embeddings, tracing: Tracing
) -> WorkerParts:
    """Return the parts of a worker whose engine is warm."""
    backend, previews = backends[""], None
    manifest = backend.manifest
    if manifest.decoder in LARGE_DECODERS:
        previews = PreviewDecoder(backend, channels=manifest.config.in_channels, factor=manifest.upscale)
    return WorkerParts(
        broker=broker,
        engine=engine,
        decoder=backend,
        ladder=engine.ladder,
        factors=manifest.factors,
        kind=kind_of(manifest),
        unguided_scale=manifest.diffusion.unguided_scale,
        further={
            name: each
            for name, each in backends.items()
            if each.manifest is not manifest and DECODER in each.manifest.files
        },
        previews=previews,
        encoder=backend,
        observe=EngineMetrics(engine, embeddings),
        tracing=tracing,
    )


def worker_identity(name: str, model: ServedModel, backends: Mapping[str, Backend]) -> WorkerIdentity:
    backend = backends[""]
    manifest = backend.manifest
    networks = "".join(f"{part} {each.name} {each.precision} " for part, each in backends.items())
    return WorkerIdentity(
        name=name,
        model=manifest.name,
        bundle=model.digest,
        vocabulary=vocabulary_digest(manifest),
        origin=checkpoint_origin(manifest, networks.strip()),
        network=_network(backend),
        adapters=None if backend.adapters is None else backend.adapters.loaded,
        formats=extra_formats(),
    )


def _network(backend: Backend) -> Network:
    sides = backend.size_multiples
    return Network(
        backend.name,
        backend.precision,
        None if sides is None else lcm(*sides[-2:]),
        backend.kernels,
        first_multiple=1 if sides is None or len(sides) < 3 else sides[0],
    )


def worker_policy(settings: Settings, engine: Engine) -> WorkerPolicy:
    return WorkerPolicy(
        max_rows=engine.scheduler.max_rows,
        lookahead_rows=settings.lookahead_rows,
        drain_s=settings.drain_s,
        hang_s=settings.hang_s,
    )
