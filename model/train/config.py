"""What a training run is: its configuration, from a file and flags alike, and the network that it and its data imply."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ditserve.model.data.dataset import DataConfig, Dataset
from ditserve.model.distributed.precision import Precision
from ditserve.model.distributed.processes import ParallelSpec
from ditserve.model.spec.bundle import DiffusionSpec
from ditserve.model.spec.diffusion import Prediction
from ditserve.model.spec.network_config import NetworkConfig, network_config
from ditserve.model.train.distillation_config import Distillation, ProgressiveDistillation
from ditserve.model.train.loss import TimestepSampling


def _tuple(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Rates = Annotated[tuple[Rate, ...], BeforeValidator(_tuple)]
Decays = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1), BeforeValidator(_tuple)
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# What may change when a run is continued: where and how fast it runs, what it writes, and how far and at what pace it learns.
FREE = frozenset(
    {
        "output",
        "init",
        "steps",
        "lr",
        "schedule",
        "warmup",
        "decay",
        "clip",
        "accumulate",
        "checkpoint_blocks",
    }
    | {
        "compile",
        "threads",
        "device",
        "skip_limit",
        "rollback_limit",
        "checkpoint_every",
        "keep",
        "sheet_every",
    }
    | {"vae", "log_every", "tensorboard", "stages", "data", "parallel"}
)
FREE_OF_DATA = {"path", "check", "corrupt_limit", "prefetch"}


class Stage(BaseModel):
    """A part of a run at one picture size, a number or (H, W)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: Annotated[tuple[Count, Count], BeforeValidator(_pair)]
    steps: Count | None = None  # None, in the last stage: to the end of the run


class TrainConfig(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data: DataConfig
    output: Path
    model: dict[str, Any]
    diffusion: DiffusionSpec
    init: Path | None = None
    """A bundle or a run to start from: weights where they fit, classes by name."""

    steps: Count
    """Optimiser steps; may be left out where the stages tell theirs."""
    stages: tuple[Stage, ...] = ()
    """Picture sizes, small to large; none: the size of the data throughout."""
    batch: Count = 32
    """Pictures of one optimiser step, over all devices."""
    accumulate: Count = 1
    """Pieces a batch is cut into to save memory; the gradient is that of the whole."""

    lr: Positive = 1e-3
    betas: tuple[Rate, Rate] = (0.9, 0.99)
    weight_decay: Weight = 0.0
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """Of the learning rate, after `warmup` steps; see `model.optimizer.learning_rate`."""
    warmup: Annotated[int, Field(ge=0)] = 100
    decay: Rate = 0.3
    clip: Positive | None = 1.0
    """Largest norm of the gradient; None: any."""
    ema: Decays = (0.999,)
    """Decays of the averaged weights; the first is the one sampled and exported, the others are kept in checkpoints."""

    label_dropout: Rates = (0.1,)
    """How often a label is withheld: one rate, or one per factor."""
    text_dropout: Rate = 0.1
    label_std: Positive = 0.02
    """Of the label tables at the start; 0.02 is the paper's, short runs learn classes sooner from 0.3."""

    loss_space: Prediction | None = None
    """Whose squared error is the loss, whatever the network predicts; None: epsilon's where it predicts epsilon, else v's."""
    loss_cap: Positive | None = None
    """Largest weight of the squared x_0 error; in the space of epsilon, this is the gamma of Min-SNR."""
    loss_floor: Weight = 0.0
    """Least weight of the squared x_0 error; in the space of epsilon, 1 makes it the truncated SNR of progressive distillation."""
    distillation: Distillation | None = None
    """A teacher to learn from besides the data, or instead of it."""
    variational: Weight = 1e-3
    """Weight of the variational bound that a learned variance is trained by; the paper's (arXiv:2102.09672, eq. 16)."""
    embedding_l2: Weight = 0.0
    """Weight of the squared condition embedding."""
    timesteps: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: Positive = 1.0

    precision: Precision = "fp32"
    checkpoint_blocks: bool = False
    """Compute each block's activations again in the backward pass rather than keep them."""
    compile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    parallel: ParallelSpec = ParallelSpec()
    """How the processes share the work where `torchrun` starts several."""

    skip_limit: Count = 10
    """Steps in a row without a finite gradient after which the run goes back to its last checkpoint."""
    rollback_limit: Annotated[int, Field(ge=0)] = 3
    """How often it does so before it stops."""
    checkpoint_every: Count = 200
    keep: Count = 2
    """Checkpoints to keep."""
    sheet_every: Count = 400
    vae: Path | None = None
    """Folder of the SD-VAE that draws the sample sheets of a run on latents; without it there are none."""
    log_every: Count = 20
    tensorboard: bool = False

    @model_validator(mode="before")
    @classmethod
    def _total(cls, data: Any) -> Any:
        """`steps` is the sum of the stages' where it is left out."""
        if not isinstance(data, dict) or "steps" in data or not isinstance(data.get("stages"), list | tuple):
            return data
        steps = [stage.get("steps") for stage in data["stages"] if isinstance(stage, dict)]
        return {**data, "steps": sum(steps)} if steps and all(isinstance(n, int) for n in steps) else data

    @model_validator(mode="after")
    def _agreement(self) -> TrainConfig:
        """Raises ValueError where fields contradict each other."""
        if self.accumulate > self.batch:
            raise ValueError(
                f"accumulate {self.accumulate} cuts a batch of {self.batch} into more pieces than pictures"
            )
        if self.loss_cap is not None and self.loss_floor > self.loss_cap:
            raise ValueError(f"loss_floor {self.loss_floor:g} is above loss_cap {self.loss_cap:g}: lower it")
        if self.stages and self.distillation:
            raise ValueError("a teacher teaches one picture size: leave out stages, or distillation")
        if isinstance(self.distillation, ProgressiveDistillation):
            before = self.distillation.round_steps * (len(self.distillation.sampling_steps) - 1)
            if self.steps <= before:
                raise ValueError(
                    f"the last round of distillation begins at step {before}: raise steps above it"
                )
        if any(stage.steps is None for stage in self.stages[:-1]):
            raise ValueError("stages: only the last one may leave out steps")
        told = sum(stage.steps or 0 for stage in self.stages)
        last_told = bool(self.stages) and self.stages[-1].steps is not None
        if (told != self.steps) if last_told else (told >= self.steps):
            raise ValueError(
                f"stages add up to {told} steps, and steps is {self.steps}: leave steps out of the last stage to let it run to the end"
            )
        kind = self.model.get("learn_sigma", self.diffusion.learn_sigma)
        if kind != self.diffusion.learn_sigma:
            raise ValueError("learn_sigma differs between model and diffusion: make them agree")
        return self

    @property
    def start(self) -> Path | None:
        """The model to start from: `init`, or else the one that progressive distillation begins with."""
        progressive = isinstance(self.distillation, ProgressiveDistillation)
        return self.distillation.teacher if self.distillation and progressive and not self.init else self.init

    @property
    def space(self) -> Prediction:
        """Whose squared error the loss is."""
        return self.loss_space or ("epsilon" if self.diffusion.prediction == "epsilon" else "v")

    def pictures(self, path: Path | None = None) -> Dataset:
        """The data, at `path` if it has moved.

        Raises:
            DataError: it is not there or cannot be trained on.
        """
        return self.data.open(path)

    def sizes(self, dataset: Dataset) -> list[tuple[int, tuple[int, int]]]:
        """(first step after it, (H, W)) of every stage."""
        if not self.stages:
            return [(self.steps, dataset.size)]
        ends = [sum(stage.steps or 0 for stage in self.stages[: k + 1]) for k in range(len(self.stages) - 1)]
        return list(zip([*ends, self.steps], [stage.size for stage in self.stages], strict=True))

    def network(self, dataset: Dataset) -> NetworkConfig:
        """The network of this run: `model`, with the size, channels and classes of its data.

        Trained in stages it has the last one's size, its positions being those of the first, interpolated.

        Raises:
            ValueError: a configuration that cannot work.
        """
        sizes = [size for _, size in self.sizes(dataset)]
        fields = {
            "learn_sigma": self.diffusion.learn_sigma,
            "in_channels": dataset.channels,
            **({} if dataset.text is None else {"text_size": dataset.text.shape[1]}),
        }
        for field, value in fields.items():
            if self.model.get(field, value) != value:
                raise ValueError(
                    f"model.{field} is {self.model[field]}, but {value} by the data: leave it out"
                )
        if len(set(sizes)) > 1:
            if self.model.get("layout_rank"):
                raise ValueError(
                    "model.layout_rank fixes the picture size: train without it, or without stages"
                )
            if self.model.get("network", "dit") == "dit":
                fields["base_size"] = sizes[0]
        classes = tuple(len(factor.classes) for factor in dataset.factors)
        return network_config({**fields, **self.model, "image_size": sizes[-1], "classes": classes})

    def identity(self, dataset: Dataset) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued: all but FREE, the sizes of the stages, the classes, and what pictures there are."""
        words = json.dumps([(factor.name, factor.classes) for factor in dataset.factors])
        dumped = self.model_dump(mode="json")
        return {
            **{key: value for key, value in dumped.items() if key not in FREE},
            "data": {key: value for key, value in dumped["data"].items() if key not in FREE_OF_DATA},
            "distillation": self.distillation
            and self.distillation.model_dump(mode="json", exclude={"teacher"}),
            "loss_space": self.space,
            "classes": [len(factor.classes) for factor in dataset.factors],
            "class_names": hashlib.sha256(words.encode()).hexdigest()[:16],
            "pictures": {
                "count": len(dataset.training),
                "labels": hashlib.sha256(dataset.labels[dataset.training].tobytes()).hexdigest()[:16],
            },
            "stages": [{"size": list(size), "until": end} for end, size in self.sizes(dataset)[:-1]],
        }


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


def mistake(error: ValidationError) -> str:
    """The first mistake in one sentence, with the field that an unknown one was perhaps meant to be."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, list(_fields(TrainConfig)), n=1, cutoff=0.6)
        return f"there is no field {place}" + (f": did you mean {near[0]}?" if near else "")
    return f"field {place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
