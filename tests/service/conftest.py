"""Fixtures of the engine's tests: a numpy backend, exact per row in any batch, and engines around it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.manifest import Defaults, Factor, Manifest, StateTensor
from ditserve.service.backends import CONDITIONER_ROWS, OutOfMemory, SentenceEncoder
from ditserve.service.backends.adapters import BackendAdapters
from ditserve.service.backends.state import HostMemory, StateMemory
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.engine import Engine
from ditserve.service.engine.forward import Backbone
from ditserve.service.engine.samples import SampleRequest
from ditserve.service.engine.scheduler import Scheduler
from ditserve.service.images import from_pixels
from ditserve.service.jobs import ConditionTerm
from ditserve.service.planning.costs import CostModel
from ditserve.service.planning.ladder import Ladder
from ditserve.service.planning.planner import Change, PlannedSample, Planner
from ditserve.service.rung import Consent, Rung
from tests.conftest import wait_until
from tests.service.queue.servers import Server, serving

Floats = npt.NDArray[np.float32]

CLASSES = ("red", "green", "blue", "poison")  # a row of the last one comes out as NaN
POISON = 3
EMBEDDING = 6


class FakeBackend:
    """A made-up network of element-wise arithmetic. `batches` records the size of every pass."""

    name = "fake"
    precision = "fp32"
    kernels = ""
    text_encoder: SentenceEncoder | None = None
    state_memory: StateMemory = HostMemory()
    adapters: BackendAdapters | None = None
    conditioner_rows = CONDITIONER_ROWS

    def __init__(
        self,
        *,
        buckets: tuple[int, ...] | None = None,
        memory_rows: int = 10**9,
        size_multiple: int | None = None,
        config: DiTConfig | None = None,
        weights: int = 1,
        **diffusion: Any,
    ) -> None:
        self.buckets = buckets
        self.memory_rows = memory_rows
        self.batches: list[int] = []
        self.conditioned: list[int] = []
        config = config or DiTConfig(
            image_size=(4, 6),
            patch_size=2,
            in_channels=3,
            hidden_size=16,
            depth=1,
            num_heads=2,
            classes=(len(CLASSES),),
            learn_sigma=False,
        )
        sides = (size_multiple or 1,) * len(config.image_size)
        self.size_multiples = None if size_multiple is None else sides
        self.manifest = Manifest(
            name="fake",
            version="1",
            description="element-wise arithmetic",
            config=config,
            first_axis="frames" if config.axes == 3 else None,
            fps=12.0 if config.axes == 3 else None,
            diffusion=DiffusionSpec(
                **{"schedule": "cosine", "prediction": "x0", "clip_x0": False, **diffusion}
            ),
            factors=(Factor(name="colour", classes=CLASSES),),
            embedding_size=EMBEDDING,
            state=(StateTensor(name="scale", shape=(3,)), StateTensor(name="shift", shape=(2, 3))),
            defaults=Defaults(
                steps=10,
                solver="ddim",
                grid="uniform" if diffusion.get("schedule") == "flow" else "leading",
                guidance_scale=2.0,
                guidance_interval=(0.0, 1.0),
            ),
            licence="Apache-2.0",
        )
        self.table = np.random.default_rng(weights).standard_normal((len(CLASSES) + 1, EMBEDDING), np.float32)

    def embed(self, labels: npt.NDArray[np.int64], text: Floats | None = None) -> Floats:
        embeddings = self.table[labels[:, 0]] + (0 if text is None else text)
        embeddings[labels[:, 0] == POISON] = np.nan
        return embeddings

    def modulate(self, timesteps: Floats, embeddings: Floats) -> tuple[Floats, ...]:
        self.conditioned.append(len(timesteps))
        level = (timesteps / np.float32(1000.0))[:, None]
        scale = embeddings[:, :3] * level + np.float32(0.2)
        shift = np.stack([embeddings[:, 3:] * np.float32(0.3), embeddings[:, 3:] * level], axis=1)
        return scale, shift

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        assert self.buckets is None or len(x) in self.buckets
        if len(x) > self.memory_rows:
            raise OutOfMemory(f"{len(x)} rows")
        self.batches.append(len(x))
        # (B, 3) of the channels, beside pictures (B, 3, H, W) or clips (B, 3, F, H, W).
        scale, shift, slope = (
            numbers.reshape(*numbers.shape, *(1,) * (x.ndim - 2))
            for numbers in (state[0], state[1][:, 0], state[1][:, 1])
        )
        bent = x / (np.float32(1.0) + x * x)
        output = bent * scale + shift + x * slope
        if self.manifest.config.learn_sigma:
            output = np.concatenate([output, np.sin(7.0 * output)], axis=1)  # the variance, in -1..1
        return np.asarray(output, np.float32)

    def decode(self, latents: Floats) -> npt.NDArray[np.uint8]:
        return np.zeros((len(latents), 4, 6, 3), np.uint8)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        return from_pixels(pixels)

    def close(self) -> None:
        pass


class FakeCachingBackend(FakeBackend):
    """The arithmetic of `FakeBackend` in two parts, of which the first runs at every `every`-th step."""

    def __init__(self, *, every: int = 2, **options: Any) -> None:
        super().__init__(**options)
        self.block_cache = BlockCache(blocks=1, every=every)
        self.trunks: list[int] = []

    def denoise(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        return self.tail(x, state, self.trunk(x, state))

    def trunk(self, x: Floats, state: tuple[Floats, ...]) -> Floats:
        assert self.buckets is None or len(x) in self.buckets
        if len(x) > self.memory_rows:
            raise OutOfMemory(f"{len(x)} rows")
        self.trunks.append(len(x))
        plain = FakeBackend.denoise(self, x, (state[0], np.zeros_like(state[1])))
        return np.ascontiguousarray(np.moveaxis(plain, 1, -1))

    def tail(self, x: Floats, state: tuple[Floats, ...], change: Floats) -> Floats:
        rest = FakeBackend.denoise(self, x, (np.zeros_like(state[0]), state[1]))
        return np.asarray(np.moveaxis(change, -1, 1) + rest, np.float32)


class ScriptedPlanner(Planner):
    """A planner that makes the given moves, each once its sample is at or below a noise, in 999 parts."""

    def __init__(self, moves: Sequence[tuple[str, int, Rung, str]] = ()) -> None:
        super().__init__(Ladder(()))
        self.moves = list(moves)
        self.seen: list[Sequence[PlannedSample]] = []

    def plan(
        self,
        samples: Sequence[PlannedSample],
        now: float,
        costs: CostModel,
        *,
        max_rows: int,
        queued_rows: int = 0,
    ) -> list[Change]:
        self.seen.append(samples)
        at = {sample.id: round(999 * sample.noise) for sample in samples}
        due = [move for move in self.moves if move[0] in at and at[move[0]] <= move[1]]
        self.moves = [move for move in self.moves if move not in due]
        return [Change(name, rung, reason) for name, _, rung, reason in due]


class Clock:
    """Seconds, one millisecond more at every look."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture(scope="session")
def make_backend() -> Callable[..., FakeBackend]:
    return FakeBackend


@pytest.fixture(scope="session")
def make_caching_backend() -> Callable[..., FakeCachingBackend]:
    return FakeCachingBackend


@pytest.fixture(scope="session")
def make_planner() -> Callable[..., ScriptedPlanner]:
    return ScriptedPlanner


@pytest.fixture(scope="session")
def make_rung() -> Callable[..., Rung]:
    def make(
        solver: str = "ddim",
        steps: int = 8,
        grid: str = "trailing",
        interval: tuple[float, float] = (0.0, 1.0),
        **fields: Any,
    ) -> Rung:
        return Rung(f"{solver}-{steps}", solver, steps, grid, interval, 0.0, **fields)

    return make


@pytest.fixture(scope="session")
def make_request(make_rung: Callable[..., Rung]) -> Callable[..., SampleRequest]:
    """Give a function that makes a request for one image of `colour` (a class index or None) on `rung`."""

    def make(
        name: str = "a/0", *, colour: int | None = 0, rung: Rung | None = None, **fields: Any
    ) -> SampleRequest:
        rung = rung or make_rung()
        defaults = {
            "condition": (ConditionTerm((colour,)),),
            "mix": "linear",
            "seed": 7,
            "rung": rung,
            "requested": rung,
            "guidance_scale": 2.0,
            "previews": 0,
            "deadline_at": None,
            "allow_degraded": True,
            "consent": Consent(),
        }
        return SampleRequest(id=name, **{**defaults, **fields})

    return make


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Engine]:
    """Give a function that builds an engine whose costs let batches fill up to `max_rows`."""

    def make(
        backend: Any = None,
        *,
        max_rows: int = 8,
        strict: bool = False,
        planner: Planner | None = None,
        modulation_bytes: int = 1 << 20,
        slots: int = 16,
        clock: Callable[[], float] | None = None,
        backbones: Mapping[str, tuple[Any, float]] | None = None,
        waited: Callable[[], float] = lambda: 0.0,
    ) -> Engine:
        backend = backend or FakeBackend()
        spec = backend.manifest.diffusion
        ladder = Ladder((), spec.noise_schedule())
        return Engine(
            backend=backend,
            conditions=ConditionCaches(backend, modulation_bytes=modulation_bytes),
            scheduler=Scheduler(max_rows=max_rows, buckets=backend.buckets, strict=strict),
            planner=planner or Planner(ladder),
            ladder=ladder,
            costs=CostModel(fixed_s=10.0, per_row_s=0.001),
            schedule=spec.noise_schedule(),
            clock=clock or Clock(),
            waited=waited,
            slots=slots,
            backbones={
                name: Backbone(network, ConditionCaches(network, modulation_bytes=modulation_bytes), row_cost)
                for name, (network, row_cost) in (backbones or {}).items()
            },
        )

    return make


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """Give a Valkey of the test's own, which answers."""
    server = Server(tmp_path)
    with serving(server):
        await wait_until(server.answers)
        yield server
