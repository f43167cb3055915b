"""The measurement of a ladder: candidate rungs, their costs and distances, and the choice of the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ditserve.bench.ladder.training_pictures import TrainingPictures
from ditserve.model.spec.bundle import Manifest, RungSpec
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.grids import even_grid, grid_names, noise_levels
from ditserve.model.spec.guidance import guidance_weight, guided
from ditserve.model.spec.solvers import step_table, trajectory
from ditserve.service.backends import Backend
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Interval, Rung

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
OnPass = Callable[[int], object]  # called with the rows of every pass

REFERENCE_STEPS = 250
# Solver → the grids and the counts of steps to try.
CANDIDATES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "ddim": (("trailing",), (100, 50, 30, 20, 16, 12, 8)),
    "dpmpp-2m": (("trailing", "uniform-t"), (50, 40, 30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
    "unipc-1": (("trailing", "uniform-t"), (30, 25, 20, 16, 14, 12, 10, 8, 6, 5, 4)),
}
WORTHWHILE = 0.9  # a rung costs at most this share of the one above it


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The inputs of the images that every candidate makes.

    Attributes:
        noise: (N, C, H, W).
        embeddings: of the conditions, (N, E).
        null: embeddings of the null condition, (N, E).
    """

    noise: Floats
    embeddings: Floats
    null: Floats
    guidance_scale: float


def _ignore(rows: int) -> None:
    pass


def candidates(intervals: Iterable[Interval], ddim_grid: str, schedule: Schedule) -> Iterator[Rung]:
    """Yield every combination of solver, grid, steps and interval; DDIM also gets the grid `ddim_grid`.

    Grids that the schedule does not have are left out, for its even grid.
    """
    names = grid_names(schedule)
    for interval in intervals:
        for solver, (grids, counts) in CANDIDATES.items():
            known = [kind for kind in grids if kind in names] or [even_grid(schedule)]
            for kind in dict.fromkeys((*known, ddim_grid) if solver == "ddim" else known):
                for steps in counts:
                    if steps <= schedule.max_steps:
                        yield Rung(f"{solver}-{steps}", solver, steps, kind, interval, 0.0)


def best_rungs(measured: Sequence[RungSpec], *, worthwhile: float = WORTHWHILE) -> tuple[RungSpec, ...]:
    """Return the ladder: the candidates that nothing cheaper matches, best first, thinned out.

    Example with (rows, distance): of (100, 0.1), (50, 0.3), (40, 0.2) the second goes, since 40 rows do
    better. Of (100, 0.1), (95, 0.2), (80, 0.3) the second goes, since it costs more than 0.9 times 100 rows.
    """
    front: list[RungSpec] = []
    best = float("inf")
    for rung in sorted(measured, key=lambda spec: (spec.rows, spec.quality)):
        if rung.quality < best:
            best = rung.quality
            front.append(rung)
    ladder: list[RungSpec] = []
    for rung in reversed(front):
        if not ladder or rung.rows <= worthwhile * ladder[-1].rows:
            ladder.append(rung)
    return tuple(ladder)


def image_inputs(backend: Backend, samples: int, seed: int, labels: Labels | None = None) -> ImageInputs:
    """Return the inputs for images of `labels` (N, F), or of `samples` labels drawn evenly."""
    manifest = backend.manifest
    random = np.random.Generator(np.random.Philox(seed))
    sizes = [len(factor.classes) for factor in manifest.factors]
    if labels is None:
        labels = random.integers(0, np.array(sizes, np.int64), (samples, len(sizes)))
    null = np.broadcast_to(np.array(sizes), labels.shape).copy()
    shape = (len(labels), manifest.config.in_channels, *manifest.config.image_size)
    return ImageInputs(
        noise=random.standard_normal(shape, dtype=np.float32),
        embeddings=backend.embed(labels),
        null=backend.embed(null),
        guidance_scale=manifest.defaults.guidance_scale,
    )


def generate(
    backend: Backend, inputs: ImageInputs, rung: Rung, *, rows: int, on_pass: OnPass = _ignore
) -> Floats:
    """Return the images (N, C, H, W) of the inputs at a rung, made `rows` at a time."""
    manifest = backend.manifest
    spec = manifest.diffusion
    schedule = spec.noise_schedule()
    table = step_table(rung.solver, noise_levels(rung.grid, rung.steps, schedule), schedule)
    channels = manifest.config.in_channels
    images = []
    for start in range(0, len(inputs.noise), rows):
        part = slice(start, start + rows)

        def network(x: Floats, level: float, part: slice = part) -> Floats:
            def predict(embeddings: Floats) -> Floats:
                state = backend.modulate(np.full(len(x), schedule.told(level)), embeddings)
                on_pass(len(x))
                return backend.denoise(np.ascontiguousarray(x, np.float32), state)[:, :channels]

            output = predict(inputs.embeddings[part])
            weight = guidance_weight(inputs.guidance_scale, level, schedule, rung.guidance_interval)
            if weight == 1.0:
                return output
            return guided(output, predict(inputs.null[part]), weight, spec.guidance_channels)

        *_, (x, _) = trajectory(table, inputs.noise[part], network, clip_x0=spec.clip_x0)
        images.append(x)
    return np.concatenate(images)


def reference_rung(manifest: Manifest) -> Rung:
    schedule = manifest.diffusion.noise_schedule()
    steps = min(REFERENCE_STEPS, schedule.max_steps)
    return Rung("reference", "ddim", steps, even_grid(schedule), manifest.defaults.guidance_interval, 0.0)


def measure(
    backend: Backend, inputs: ImageInputs, rungs: Iterable[Rung], *, rows: int, on_pass: OnPass = _ignore
) -> Iterator[RungSpec]:
    """Yield each rung with its rows an image and its RMS distance to the reference images."""
    manifest = backend.manifest
    costs = Ladder((), manifest.diffusion.noise_schedule())
    usual = manifest.defaults.guidance_interval
    reference = generate(backend, inputs, reference_rung(manifest), rows=rows, on_pass=on_pass)
    for rung in rungs:
        images = generate(backend, inputs, rung, rows=rows, on_pass=on_pass)
        low, high = rung.guidance_interval
        yield RungSpec(
            name=rung.name if rung.guidance_interval == usual else f"{rung.name}-g{low:g}-{high:g}",
            solver=rung.solver,
            steps=rung.steps,
            grid=rung.grid,
            guidance_interval=rung.guidance_interval,
            rows=costs.row_steps(rung, inputs.guidance_scale),
            quality=float(np.sqrt(np.mean((images - reference) ** 2))),
        )


def intervals(manifest: Manifest, narrow: Interval | None) -> tuple[Interval, ...]:
    """Return the bundle's guidance interval, and the part of it inside `narrow` if it guides at all."""
    low, high = usual = manifest.defaults.guidance_interval
    if narrow is None:
        return (usual,)
    inside = max(low, narrow[0]), min(high, narrow[1])
    is_guided = manifest.defaults.guidance_scale != 1.0 and inside[0] < inside[1]
    return (usual, inside) if is_guided and inside != usual else (usual,)


def frechet_distances(
    backend: Backend, ladder: Sequence[RungSpec], pictures: TrainingPictures, *, rows: int, on_pass: OnPass
) -> dict[str, float]:
    """Return the Fréchet distance to the training pictures by rung, each for the same labels and noise."""
    inputs = image_inputs(backend, 0, 0, pictures.labels)
    distances = {}
    for spec in ladder:
        rung = Rung(spec.name, spec.solver, spec.steps, spec.grid, spec.guidance_interval, spec.quality)
        images = generate(backend, inputs, rung, rows=rows, on_pass=on_pass)
        distances[spec.name] = pictures.distance(backend.decode(images))
    return distances
