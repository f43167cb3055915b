"""The scheduler of a diffusers pipeline, which tells the noise that its network was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.scheduler_config import GridReading, SchedulerConfigError, read_scheduler_config
from ditserve.model.spec.table_schedulers import check_published
from ditserve.model.weights.official import WeightsError


def scheduler_flow(file: Path, fields: Mapping[str, Any], config: DiTConfig) -> tuple[DiffusionSpec, str]:
    """Return the flow of a scheduler, whose network is told sigma times the timesteps, and a note on it.

    Raises:
        WeightsError: a field is unknown, or a value gives no grid of ours.
    """
    told = float(fields.get("num_train_timesteps", 1000))
    try:
        grid = read_scheduler_config(fields, GridReading(tokens=config.tokens))
        diffusion = DiffusionSpec(
            schedule="flow", prediction="flow", noise_scale=told, sigma_grid=grid, clip_x0=False
        )
    except SchedulerConfigError as error:
        raise WeightsError(f"{file}: {error}") from None
    except ValidationError:
        raise WeightsError(f"{file}: field num_train_timesteps: must be at most a million") from None
    shift = "that follows from the size" if grid.dynamic else f"of {grid.shift:g}"
    return diffusion, (
        f"the pipeline's {fields['_class_name']} says that it is a flow with a shift {shift}; taken as "
        f"diffusers does it, the network is told {told:g} · sigma and its output points to the noise"
    )


def note_of_published(file: Path, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on what the scheduler of the published process tells of the prediction.

    Raises:
        WeightsError: it is of another process, or has a field that none of the published process has.
    """
    try:
        check_published(fields)
    except SchedulerConfigError as error:
        raise WeightsError(f"{file} {error}") from None
    return (
        ("the pipeline's scheduler says that it predicts the noise",) if "prediction_type" in fields else ()
    )
