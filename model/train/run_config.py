"""The part of a training run's configuration that does not depend on what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ditserve.model.data.dataset import DataConfig, NamedPath


def _tuple(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(_tuple)]
Decays = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1), BeforeValidator(_tuple)
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["fp32", "bf16", "fp16"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# A batch draws from 1,000,003 · (seed + 2³² · roll-backs) + step, which must stay below 2⁶³.
MAX_SEED = 2**40


class RunConfig(BaseModel):
    """The fields that every training run has: its data, its length, its optimiser, and what it writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: DataConfig
    output: NamedPath
    steps: Count
    """Optimiser steps."""
    batch: Count = 32
    """Pictures of one optimiser step."""

    lr: Positive = 1e-3
    min_lr: Weight = 0.0
    """The rate that a falling `schedule` ends at."""
    betas: tuple[Rate, Rate] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """The course of the learning rate after `warmup` steps; see `model.train.optimizer.learning_rate`."""
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Rate = 0.3
    clip: Positive | None = 1.0
    """Largest norm of the gradient; None: no limit."""
    ema: Decays = (0.999,)
    """Decays of the averaged weights; the first is sampled and exported, others are kept in checkpoints."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: Count = 200
    keep: Count = 2
    """Number of checkpoints to keep."""
    sheet_every: Count = 400
    log_every: Count = 20
    tensorboard: bool = False

    @model_validator(mode="after")
    def _rate_falls(self) -> RunConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}: lower it")
        return self


def read_fields(file: Path) -> dict[str, Any]:
    """Return the fields in a JSON file of a run, unchecked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a JSON object.
    """
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return data
