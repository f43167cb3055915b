"""What a training run is: its configuration, the pictures it names, and the network those two imply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from model.bundle import DiffusionSpec
from model.config import DiTConfig
from model.diffusion import Prediction
from model.pictures import Pictures, load_npz


class DataConfig(BaseModel):
    """Which pictures: see `model.pictures.load_npz`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path
    groups: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    hold_out: float = 0.03


class TrainConfig(BaseModel):
    """One run. The learning rate warms up, stays, and falls linearly over the last `decay` of the steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: DataConfig
    output: Path
    model: dict[str, Any]
    diffusion: DiffusionSpec
    steps: int
    batch: int = 32
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    ema: float = 0.999
    label_dropout: tuple[float, ...] = (0.1,)
    label_std: float = 0.02  # of the label tables at the start; 0.02 is the paper's, short runs learn classes sooner from 0.3
    loss_space: Prediction = "v"  # whose squared error is the loss, whatever the network predicts
    loss_cap: float | None = None
    seed: int = 0
    threads: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    checkpoint_every: int = 200
    sheet_every: int = 400
    log_every: int = 20

    def pictures(self, path: Path | None = None) -> Pictures:
        """The pictures, at `path` if they have moved.

        Raises:
            DataError: they are not there or cannot be trained on.
        """
        chosen = self.data
        return load_npz(
            path or chosen.path, groups=chosen.groups, names=chosen.names, hold_out=chosen.hold_out
        )

    def network(self, pictures: Pictures) -> DiTConfig:
        """The network of this run: `model`, with the size and the classes of its pictures.

        Raises:
            ValueError: a configuration that cannot work.
        """
        classes = tuple(len(factor.classes) for factor in pictures.factors)
        return DiTConfig(**{**self.model, "image_size": pictures.size, "classes": classes})


def load_config(file: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run described by a JSON file, with `key=value` overrides.

    Raises:
        OSError, ValueError, ValidationError: unreadable, not JSON, an override without "=", or a wrong or unknown field.
    """
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item}: write KEY=VALUE")
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return TrainConfig.model_validate(data)
