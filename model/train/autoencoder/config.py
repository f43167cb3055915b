"""The configuration of an autoencoder's training run, from a JSON file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ditserve.model.data.dataset import DataConfig, NamedPath
from ditserve.model.nets.small_autoencoder import SmallAutoencoderConfig
from ditserve.model.train.config import MAX_SEED, Count, Decays, Positive, Precision, Weight


class AutoencoderTrainConfig(BaseModel):
    """The configuration of one training run of a small autoencoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: DataConfig
    output: NamedPath
    autoencoder: dict[str, Any] = {}
    """Fields of `SmallAutoencoderConfig`."""
    steps: Count
    batch: Count = 16
    crop: Count | None = None
    """Train on random squares of this many pixels; None: on whole pictures."""
    edge_weight: Weight = 0.5
    """Weight of the absolute error of differences between neighbouring pixels."""
    latent_weight: Weight = 1e-4
    """Weight of the mean squared latent."""

    lr: Positive = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    clip: Positive | None = 1.0
    ema: Decays = (0.999,)
    precision: Precision = "fp32"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: Count = 200
    keep: Count = 2
    sheet_every: Count = 1000
    log_every: Count = 20
    tensorboard: bool = False

    @model_validator(mode="after")
    def _check(self) -> AutoencoderTrainConfig:
        factor = self.network.factor
        if self.crop is not None and self.crop % factor:
            raise ValueError(f"crop {self.crop} is not divisible by {factor}, the autoencoder's reduction")
        return self

    @property
    def network(self) -> SmallAutoencoderConfig:
        """The sizes of the network.

        Raises:
            ValueError: an unknown field or a size that cannot be.
        """
        unknown = {*self.autoencoder} - {*asdict(SmallAutoencoderConfig())}
        if unknown:
            raise ValueError(f"autoencoder has no field {sorted(unknown)[0]}")
        lists = {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.autoencoder.items()
        }
        return SmallAutoencoderConfig(**lists)
