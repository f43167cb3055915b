"""The engine on a real backend, for tests of the pictures that it draws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ditserve.service.backends import Backend, Floats
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.forward import Backbone
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.engine.text_cache import TextCache
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Planner


class Letters:
    """An encoder that counts letters."""

    size, key = 6, "letters"

    def encode(self, sentence: str) -> Floats:
        return np.array([sentence.count(letter) for letter in "aefgox"], np.float32)


def engine_of(
    backend: Backend, modulation_bytes: int, backbones: Mapping[str, Backend] | None = None
) -> Engine:
    manifest, ladder = backend.manifest, Ladder(())
    texts = TextCache(Letters(), None, capacity=1 << 20) if manifest.config.text_size else None
    return Engine(
        backend=backend,
        conditions=ConditionCaches(backend, modulation_bytes=modulation_bytes, texts=texts),
        scheduler=Scheduler(max_rows=8),
        planner=Planner(ladder),
        ladder=ladder,
        costs=CostModel(),
        schedule=manifest.diffusion.noise_schedule(),
        clock=lambda: 0.0,
        backbones={
            name: Backbone(other, ConditionCaches(other, modulation_bytes=modulation_bytes, texts=texts), 1.0)
            for name, other in (backbones or {}).items()
        },
    )


def drawn(
    backend: Backend,
    requests: list[SampleRequest],
    modulation_bytes: int = 1 << 20,
    backbones: Mapping[str, Backend] | None = None,
) -> dict[str, Floats]:
    """Return the latents of requests that run together, by id."""
    engine = engine_of(backend, modulation_bytes, backbones)
    for request in requests:
        engine.add(request)
    made: dict[str, Floats] = {}
    while not engine.idle:
        made |= {sample.id: sample.latent for sample in engine.step().finished}
    return made
