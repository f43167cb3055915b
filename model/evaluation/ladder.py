"""The quality ladder of a model: ways to draw a picture, with what each costs and how good it is.

Two distances are measured, both as root mean squares in the range of 2 that networks work in. `own` is that
of a picture to the one that the model's own long run draws of the same noise: it tells what fewer steps
change. `real` is the energy score against real pictures, `fidelity.energy_scores`: it tells whether that
makes the pictures worse. A ladder that knows only the first calls better what is only more alike to itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditserve.model.data.dataset import Dataset
from ditserve.model.evaluation.fidelity import energy_scores
from ditserve.model.evaluation.front import (
    Distance,
    MeasuredPoint,
    OperatingPoint,
    best_defaults,
    front,
    nearer,
)
from ditserve.model.evaluation.ladder_plan import (
    DRAWS,
    QUICK,
    Interval,
    LadderPlan,
    candidates,
    reference_point,
    stitched_points,
)
from ditserve.model.evaluation.picture_sets import texts_instead
from ditserve.model.nets.factory import Network
from ditserve.model.sampling.denoise import (
    CachingDenoiser,
    Conditions,
    Denoiser,
    Guidance,
    StitchedDenoiser,
    denoise,
)
from ditserve.model.sampling.prompt import random_conditions
from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.grids import even_grid, fits, noise_levels
from ditserve.model.spec.manifest import Defaults, Manifest, RungSpec
from ditserve.model.spec.solvers import StepTable, step_table
from ditserve.model.spec.stretches import Stretch
from ditserve.model.train.loaded_model import LoadedModel

OnRows = Callable[[float], object]  # called with the rows that were computed

AT_ONCE = 8  # pictures of one forward pass
# With fewer real pictures, the sampling defaults do not follow from their distances.
ENOUGH_PICTURES = 6
# The narrower guidance interval to try (arXiv:2404.07724), at this point.
NARROW: Interval = (0.1, 0.8)
PROBE = ("dpmpp-2m", 20)


@dataclass(frozen=True, slots=True)
class LadderInputs:
    """The conditions of N pictures, labels (N, F) and text (N, text_width) or None; picture k has seed k.

    With `real` (N / 2, C, H, W), pictures k and k + N / 2 are of the condition of real picture k. Guidance
    subtracts the text `negative` (1, text_width); None: that of no text.
    """

    labels: Tensor
    text: Tensor | None
    real: Tensor | None = None
    negative: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class MeasuredLadder:
    """A measured ladder, all points that were measured, and the defaults that follow.

    `order` is the distance that `RungSpec.quality` repeats. `record` says what was measured, for provenance.
    """

    ladder: tuple[RungSpec, ...]
    measured: tuple[RungSpec, ...]
    order: Distance
    defaults: Defaults
    record: Mapping[str, Any]

    def added_to(self, manifest: Manifest) -> Manifest:
        """Return `manifest` with the ladder, not with the defaults."""
        provenance = {**manifest.provenance, "ladder": dict(self.record)}
        return manifest.model_copy(
            update={"ladder": self.ladder, "ladder_order": self.order, "provenance": provenance}
        )


def draw_inputs(model: LoadedModel, conditions: int, dataset: Dataset | None) -> LadderInputs:
    """Return inputs for so many conditions, those of training pictures if there is a data set.

    Raises:
        DataError: a picture or the encoder of its caption cannot be read.
    """
    random = np.random.Generator(np.random.Philox(key=[0, 2]))
    if dataset is None:
        labels, text = random_conditions(model.network.config, conditions * DRAWS, random)
        return LadderInputs(labels, text)
    chosen = dataset.part(random.permutation(dataset.training)[:conditions])
    every = np.arange(len(chosen.labels))
    real = torch.from_numpy(chosen.batch(every, random))
    labels = torch.from_numpy(chosen.labels).clone()
    text = None if chosen.texts is None else torch.from_numpy(chosen.texts.draw(every))
    if text is not None and texts_instead(model.manifest):
        # Every second condition is a text.
        text[::2] = 0
        labels[1::2, 0] = model.network.config.classes[0]
    return LadderInputs(labels.repeat(DRAWS, 1), None if text is None else text.repeat(DRAWS, 1), real)


class LadderMeasurement:
    """The measurement of a ladder of the model of `manifest` on `inputs`.

    With `settled`, the sampling defaults of the model stay, and with them the guidance interval. `data` names
    the real pictures in the record. The network is handed in to `run`: its weights may not be ready before.
    """

    def __init__(
        self, manifest: Manifest, plan: LadderPlan, inputs: LadderInputs, *, settled: bool, data: str = ""
    ) -> None:
        self._manifest, self._plan, self._inputs, self._data = manifest, plan, inputs, data
        self._settled = settled or inputs.real is None or len(inputs.real) < ENOUGH_PICTURES

    @property
    def name(self) -> str:
        """The name of the plan, and the pictures that it draws."""
        real = self._inputs.real
        compared = "" if real is None else f", compared with {len(real)} real ones"
        return f"{self._plan.name}: {len(self._inputs)} pictures of each point{compared}"

    @property
    def rows(self) -> float:
        """The forward rows that the measurement takes, at most."""
        manifest = self._manifest
        points = [reference_point(manifest, self._plan), *candidates(manifest, self._plan)]
        points += [*self._interval_probes(), *stitched_points(manifest)]
        return len(self._inputs) * sum(point.rows(manifest) for point in points)

    def run(
        self,
        network: Network,
        on_rows: OnRows = lambda rows: None,
        backbones: Mapping[str, Network] | None = None,
    ) -> MeasuredLadder:
        """Measure all points; `on_rows` is told of the rows that were computed.

        `backbones` are the networks of the manifest's further backbones.
        """
        model = LoadedModel(network, self._manifest, backbones or {})
        draw = partial(draw_pictures, model, self._inputs, on_rows=on_rows)
        defaults = self._with_best_interval(draw)
        manifest = self._manifest.model_copy(update={"defaults": defaults})
        reference = reference_point(manifest, self._plan)
        target = draw(reference)
        points = (*candidates(manifest, self._plan), *stitched_points(manifest))
        measured = [self._measured(point, draw(point), target) for point in points]
        # A longer run is there to compare with, not to be served.
        if reference.steps <= QUICK.reference:
            measured.append(self._measured(reference, target, target))
        real = self._inputs.real
        order: Distance = "own" if real is None else "real"
        record: dict[str, Any] = {
            "plan": self._plan.name,
            "pictures": len(self._inputs),
            "reference": reference.name,
        }
        if real is not None:
            record |= {"real": len(real), "data": self._data}
        specs = tuple(point.spec(order) for point in measured)
        best = defaults if self._settled else best_defaults(measured, defaults)
        return MeasuredLadder(front(specs), specs, order, best, record)

    def _measured(self, point: OperatingPoint, pictures: Tensor, target: Tensor) -> MeasuredPoint:
        real = self._inputs.real
        scores = None if real is None else energy_scores(pictures, real)
        own = float((pictures - target).square().mean().sqrt())
        return MeasuredPoint(point, point.rows(self._manifest), own, scores)

    def _interval_probes(self) -> tuple[OperatingPoint, ...]:
        """Return a point with the model's guidance interval and one with a narrower one, if it may change."""
        defaults = self._manifest.defaults
        low, high = defaults.guidance_interval
        inside = max(low, NARROW[0]), min(high, NARROW[1])
        guided = defaults.guidance_scale != 1.0 and inside[0] < inside[1] and inside != (low, high)
        schedule = self._manifest.diffusion.noise_schedule()
        grid = even_grid(schedule)
        if self._settled or not guided or not fits(grid, PROBE[1], schedule):
            return ()
        return tuple(OperatingPoint(*PROBE, grid, interval) for interval in ((low, high), inside))

    def _with_best_interval(self, draw: Callable[[OperatingPoint], Tensor]) -> Defaults:
        """Return the defaults with the narrower guidance interval, if it draws nearer to real pictures."""
        defaults, probes, real = self._manifest.defaults, self._interval_probes(), self._inputs.real
        if not probes or real is None:
            return defaults
        usual, narrow = (energy_scores(draw(probe), real) for probe in probes)
        chosen = probes[1] if nearer(narrow, usual) else probes[0]
        return defaults.model_copy(update={"guidance_interval": chosen.guidance_interval})


def draw_pictures(
    model: LoadedModel, inputs: LadderInputs, point: OperatingPoint, on_rows: OnRows = lambda rows: None
) -> Tensor:
    """Return the pictures (N, C, H, W) of `inputs` at a point; `on_rows` is told of the rows computed."""
    table = step_table(point.solver, noise_levels(point.grid, point.steps, model.schedule), model.schedule)
    rows = point.rows(model.manifest)
    stretches = model.manifest.stretches(point.stretches)
    return draw_along(
        table,
        model,
        inputs,
        point.guidance_interval,
        lambda count: on_rows(count * rows),
        stretches=stretches,
    )


@torch.no_grad()
def draw_along(
    table: StepTable,
    model: LoadedModel,
    inputs: LadderInputs,
    interval: Interval,
    on_pictures: Callable[[int], object] = lambda count: None,
    *,
    stretches: Sequence[Stretch] = (),
) -> Tensor:
    """Return the pictures (N, C, H, W) of `inputs` along a table; `on_pictures` is told of those drawn.

    `stretches` name the further backbones of the model that take part.
    """
    manifest, guidance = model.manifest, guidance_of(model.manifest, interval)
    chunks = []
    for index in torch.arange(len(inputs)).split(AT_ONCE):
        others = {
            part.backbone: denoiser_of(
                model,
                model.backbones[part.backbone],
                inputs,
                index,
                guidance if part.guided else Guidance(),
                cache=manifest.backbones[part.backbone].block_cache,
            )
            for part in stretches
            if part.backbone
        }
        own = denoiser_of(model, model.network, inputs, index, guidance)
        denoiser = StitchedDenoiser(
            own.model, own.schedule, own.conditions, own.guidance, tuple(stretches), others
        )
        *_, x0 = denoise(denoiser, table, index.tolist(), clip_x0=manifest.diffusion.clip_x0)
        chunks.append(x0 if manifest.decoder != "identity" else x0.clamp(-1, 1))
        on_pictures(len(index))
    return torch.cat(chunks)


def guidance_of(manifest: Manifest, interval: Interval) -> Guidance:
    """Return a model's own guidance, acting in `interval`."""
    diffusion = manifest.diffusion
    return Guidance(
        manifest.guidance_weight(), interval, diffusion.guidance_channels, norm=diffusion.guidance_norm
    )


def denoiser_of(
    model: LoadedModel,
    network: Network,
    inputs: LadderInputs,
    index: Tensor,
    guidance: Guidance,
    *,
    cache: BlockCache | None = None,
) -> Denoiser:
    """Return a network of a model on the conditions at `index` of the inputs, for one trajectory."""
    text = None if inputs.text is None else inputs.text[index]
    embeddings = network.embed(inputs.labels[index], text)
    if model.manifest.guidance_embedded is not None:
        embeddings[:, -1] = model.manifest.guidance_embedded
    negative = None
    if inputs.negative is not None:
        negative = network.embed(inputs.labels[index], inputs.negative.expand(len(index), -1))
    conditions = Conditions((embeddings,), negative=negative)
    if cache is not None:
        return CachingDenoiser(network, model.schedule, conditions, guidance, cache)
    return Denoiser(network, model.schedule, conditions, guidance)


@torch.no_grad()
def seconds_per_row(model: LoadedModel) -> float:
    """Return the seconds that a forward row takes here, in passes as a measurement makes them."""
    network, config = model.network, model.network.config
    x = torch.zeros(AT_ONCE, config.in_channels, *config.image_size)
    labels, text = random_conditions(config, AT_ONCE, np.random.default_rng(0))
    state = network.modulate(torch.zeros(AT_ONCE), network.embed(labels, text))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        network.backbone(x, state)
        seconds.append(time.perf_counter() - began)
    return min(seconds) / AT_ONCE
