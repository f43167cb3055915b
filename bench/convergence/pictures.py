"""The distance of a model's pictures to its own long run, over the calls of the network, for every solver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ditserve.bench.convergence.trials import Trial
from ditserve.export.calibrate import with_backbone
from ditserve.export.parity import graph_backbone
from ditserve.model.evaluation.fidelity import energy_scores
from ditserve.model.evaluation.ladder import draw_along, draw_inputs
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.spec.bundle import BACKBONE, Bundle
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import load_bundle

REFERENCE = 150  # steps of DDIM in the long run


@dataclass(frozen=True, slots=True)
class PictureError:
    """The root mean square to the long run, and the energy score to real pictures if there are any.

    `error` is the standard error of that score's difference from the first trial's with as many calls.
    """

    calls: int
    own: float
    real: float | None = None
    error: float | None = None


def picture_errors(
    folder: Path,
    data: Path | None,
    trials: Sequence[Trial],
    calls: Sequence[int],
    *,
    conditions: int,
) -> Iterator[tuple[str, PictureError]]:
    """Yield the errors of each trial by its name; every trial draws the same pictures, of the same noise.

    `calls` are counted without those that guidance adds.
    """
    bundle = Bundle.open(folder)
    loaded = load_bundle(bundle)
    model = with_backbone(loaded, graph_backbone(loaded.network, bundle.file(BACKBONE)))
    schedule, interval = model.schedule, model.manifest.defaults.guidance_interval
    inputs = draw_inputs(model, conditions, None if data is None else open_data(model, data))
    even = even_grid(schedule)
    longest = step_table("ddim", noise_levels(even, REFERENCE, schedule), schedule)
    target = draw_along(longest, model, inputs, interval)
    first: dict[int, Tensor] = {}
    for trial in trials:
        for count in calls:
            table = trial.table(noise_levels(even, trial.grid_steps(count), schedule), schedule)
            pictures = draw_along(table, model, inputs, interval)
            own = float((pictures - target).square().mean().sqrt())
            if inputs.real is None:
                yield trial.name, PictureError(len(table), own)
                continue
            scores = energy_scores(pictures, inputs.real)
            change = scores - first.setdefault(len(table), scores)
            error = float(change.std() / len(change) ** 0.5)
            yield trial.name, PictureError(len(table), own, float(scores.mean()), error)
