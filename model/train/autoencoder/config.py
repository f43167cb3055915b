"""The configuration of an autoencoder's training run, from a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ditserve.model.data.dataset import DataConfig, NamedPath
from ditserve.model.nets.small_autoencoder import SmallAutoencoderConfig
from ditserve.model.train.config import MAX_SEED, Count, Decays, Positive, Rate, Weight


class AutoencoderTrainConfig(BaseModel):
    """The configuration of one training run of a small autoencoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: DataConfig
    output: NamedPath
    autoencoder: SmallAutoencoderConfig = SmallAutoencoderConfig()
    steps: Count
    batch: Count = 16
    crop: Count | None = None
    """Train on random squares of this many pixels; None: on whole pictures."""
    edge_weight: Weight = 0.5
    """Weight of the absolute error of the differences between neighbouring pixels, which keeps lines sharp
    and areas flat."""
    latent_weight: Weight = 1e-4
    """Weight of the mean squared latent."""

    lr: Positive = 2e-3
    min_lr: Weight = 0.0
    """The rate that a falling `schedule` ends at."""
    betas: tuple[Rate, Rate] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """The course of the learning rate after `warmup` steps; see `model.train.optimizer.learning_rate`."""
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Rate = 0.3
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    ema: Decays = (0.999,)
    """Decays of the averaged weights; the first is written."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: Count = 250
    keep: Count = 2
    """Number of checkpoints to keep."""
    sheet_every: Count = 1000
    """Steps between two measurements: a sheet of held-out pictures, and the autoencoder as it is then."""
    log_every: Count = 50
    tensorboard: bool = False

    @model_validator(mode="after")
    def _crop_fits(self) -> AutoencoderTrainConfig:
        factor = self.autoencoder.factor
        if self.crop is not None and self.crop % factor:
            raise ValueError(f"crop {self.crop} is not divisible by {factor}, the autoencoder's reduction")
        return self


def load_autoencoder_config(file: Path) -> AutoencoderTrainConfig:
    """Load the run that a JSON file describes.

    Raises:
        OSError: the file cannot be read.
        ValidationError: it is not JSON, or a wrong or unknown field.
    """
    return AutoencoderTrainConfig.model_validate(json.loads(file.read_text()))
