"""The quality ladder of a bundle, measured when it is exported.

A service without a ladder never falls back to fewer steps. So the quick measurement is made unless it is
declined, in as many pictures as fit into a small part of the export's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.export.errors import ExportError
from ditserve.model.data.examples import DataError
from ditserve.model.evaluation.ladder import LadderMeasurement, draw_inputs
from ditserve.model.evaluation.ladder_plan import THOROUGH, affordable_plan
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.nets.factory import Network
from ditserve.model.spec.manifest import Manifest
from ditserve.model.train.loaded_model import LoadedModel

PlanName = Literal["auto", "none", "quick", "thorough"]
# The quick measurement takes about so many seconds, or this share of the other forward rows if that is more.
SECONDS, SHARE = 45.0, 0.1


@dataclass(frozen=True, slots=True)
class LadderOptions:
    """The measurement of the ladder.

    Args:
        plan: "quick", "thorough", "none", or "auto": quick for a model that has no ladder.
        pictures: the training pictures, whose distances are then measured too.
        settled: keep the sampling defaults of the model, whatever is measured.
    """

    plan: PlanName = "auto"
    pictures: Path | None = None
    settled: bool = True


MEASURE_IF_MISSING = LadderOptions()


def plan_ladder(
    model: LoadedModel, options: LadderOptions, *, seconds_per_row: float, other_rows: int
) -> LadderMeasurement | None:
    """Return the measurement that `options` ask for, of an export of `other_rows` forward rows; None: none.

    Raises:
        ExportError: the pictures cannot be opened, or are not the model's.
    """
    manifest = model.manifest
    if options.plan == "none" or (options.plan == "auto" and manifest.ladder):
        return None
    plan, conditions = THOROUGH, THOROUGH.conditions
    if options.plan != "thorough":
        plan, conditions = affordable_plan(manifest, max(SECONDS / seconds_per_row, SHARE * other_rows))
    try:
        dataset = None if options.pictures is None else open_data(model, options.pictures)
        inputs = draw_inputs(model, conditions, dataset)
    except DataError as error:
        raise ExportError(f"no ladder can be measured, {error}: --ladder none leaves it out") from None
    data = "" if options.pictures is None else options.pictures.name
    return LadderMeasurement(manifest, plan, inputs, settled=options.settled, data=data)


def measured_manifest(measurement: LadderMeasurement, network: Network, manifest: Manifest) -> Manifest:
    """Measure the ladder, and return `manifest` with it and with the defaults that follow from it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("ladder", total=measurement.rows)
        result = measurement.run(network, lambda rows: progress.advance(task, rows))
    return result.added_to(manifest).model_copy(update={"defaults": result.defaults})
