"""The configuration of a training run, from a JSON file and flags, and the network that follows from it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ditserve.model.data.dataset import Dataset, NamedPath
from ditserve.model.data.latents import Latents
from ditserve.model.distributed.processes import ParallelSpec
from ditserve.model.spec.diffusion import Prediction
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.network_config import NetworkConfig, network_config
from ditserve.model.spec.sizes import Size, size_name
from ditserve.model.train.base_model import LowRankConfig, base_bundle, fields_of_base, in_terms_of
from ditserve.model.train.distillation.config import DistillationConfig, ProgressiveDistillationConfig
from ditserve.model.train.loss import LevelSampling, TrainingNoise, training_noise
from ditserve.model.train.run_config import (
    Count,
    Positive,
    Precision,
    Rate,
    Rates,
    RunConfig,
    Weight,
    read_fields,
)

# A network of more blocks keeps their inputs alone, as the chapter on DiT has it for depths above 24.
DEEP = 24
# The weight of arXiv:2101.03961, §2.2.
BALANCE = 0.01


def _named_network(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


# The fields of a network as `network_config` reads them, or the name of a published size such as "DiT-S/2".
NetworkFields = Annotated[dict[str, Any], BeforeValidator(_named_network)]


class TrainingStage(BaseModel):
    """A part of a run at one picture size, a number, (H, W), or (F, H, W) of clips."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: Annotated[tuple[Count, Count] | tuple[Count, Count, Count], BeforeValidator(_pair)]
    steps: Count | None = None
    """None, in the last stage: to the end of the run."""


class TrainConfig(RunConfig):
    """The configuration of one training run of a network.

    `steps` may be left out if every stage has its own; `batch` is over all devices.
    """

    model: NetworkFields
    diffusion: DiffusionSpec
    init: NamedPath | None = None
    """A bundle or a run to start from: weights where they fit, classes by name."""

    lora: LowRankConfig | None = None
    """Train a low-rank adapter of the bundle `init`, whose network, noise and classes the run has."""

    optimizer: Literal["muon"] | None = None
    """"muon": the matrices of the blocks learn by Muon (Jordan et al., 2024), the rest by AdamW.

    It takes more from each picture, and suits batches of 64 and more. None: AdamW alone."""
    stages: tuple[TrainingStage, ...] = ()
    """Picture sizes, small to large; none: the size of the data throughout."""
    accumulate: Count = 1
    """Micro-batches that a batch is split into to save memory; the gradient is that of the whole."""

    label_dropout: Rates = (0.1,)
    """Probability that a label is dropped: one rate, or one per factor."""
    text_dropout: Rate = 0.1
    text_instead: Rate | None = None
    """Share of the rows whose text stands in place of the first factor's label; the others have no text.

    So a prompt learns to say alone what is drawn. None: text and label are each dropped by themselves."""
    joint_dropout: Rate | None = None
    """Probability that all conditions are dropped together, which trains what guidance subtracts.

    None: as much as makes a tenth of the rows unconditional where there are several conditions, see
    `model.train.dropout`; 0 in a run begun before there was this field."""
    label_std: Positive = 0.02
    """Standard deviation of the initial label tables: 0.02 in the paper; short runs learn faster from 0.3."""

    condition_start: Literal["data", "missing"] | None = None
    """"data": label tables and the text map start from the pictures (`model.train.condition_start`).

    "missing": the conditional mean of `init` is completed by what pairs that no picture shows look like in
    the style most like theirs. None: from random numbers, or from `init`."""

    mean_of_others: Rate | None = None
    """Share of the rows whose conditional mean is that of the other maps than their condition's.

    A pair of classes that no picture shows has no better one; so the network learns to draw from it."""

    first_frame_given: Rate | None = None
    """Share of the rows that are told the first frame of their clip, for a model with `first_frame`.

    It is drawn apart from the dropout of labels and text. None: 0.5."""

    loss_space: Prediction | None = None
    """The quantity whose squared error is the loss, whatever the network predicts.

    None: epsilon if the network predicts epsilon, flow if the noise is that of a flow, else v."""
    loss_cap: Positive | None = None
    """Largest weight of the squared x_0 error; in the space of epsilon, this is the gamma of Min-SNR.

    None: no limit, but 400 where a flow's network predicts x0: the velocity loss divides by sigma², here by
    at least 0.05² (arXiv:2511.13720, §4)."""
    loss_floor: Weight = 0.0
    """Least weight of the squared x_0 error; 1 in the space of epsilon is truncated SNR (see loss.py)."""
    distillation: DistillationConfig | None = None
    """A teacher to learn from besides the data, or instead of it."""
    variational: Weight = 1e-3
    """Weight of the bound that trains a learned variance; the default is of arXiv:2102.09672, eq. 16."""
    embedding_l2: Weight = 0.0
    """Weight of the squared condition embedding."""
    balance: Weight | None = None
    """Weight of the loss that spreads tokens over experts; None: 0.01 where tokens choose theirs, else 0."""
    timesteps: LevelSampling = "uniform"
    """The law by which the noise levels of a batch are drawn, of a flow too."""
    logit_mean: float = 0.0
    logit_std: Positive = 1.0
    noise_shift: Positive = 1.0
    """Shift s of the drawn levels, u to s · u / (1 + (s − 1) · u): above 1 to the noisy side."""

    precision: Precision = "fp32"
    checkpoint_blocks: bool | None = None
    """Compute each block's activations again in the backward pass instead of keeping them.

    None: in a network of more than 24 blocks."""
    compile: bool = False
    parallel: ParallelSpec = ParallelSpec()
    """The division of the work if `torchrun` starts several processes."""

    skip_limit: Count = 10
    """Steps in a row without a finite gradient after which the run is rolled back to its last checkpoint."""
    rollback_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Number of roll-backs before the run stops."""
    vae: NamedPath | None = None
    """Folder of the autoencoder that decodes the sample sheets of a run on latents; None: no sheets."""

    @model_validator(mode="before")
    @classmethod
    def _of_base(cls, data: Any) -> Any:
        """Take the network and the noise of a run with `lora` from the bundle that it adapts."""
        return fields_of_base(data) if isinstance(data, dict) and data.get("lora") is not None else data

    @model_validator(mode="before")
    @classmethod
    def _sum_of_stages(cls, data: Any) -> Any:
        """Set `steps` to the sum of the stages' steps if it is left out."""
        if not isinstance(data, dict) or "steps" in data or not isinstance(data.get("stages"), list | tuple):
            return data
        steps = [stage.get("steps") for stage in data["stages"] if isinstance(stage, dict)]
        return {**data, "steps": sum(steps)} if steps and all(isinstance(n, int) for n in steps) else data

    @model_validator(mode="after")
    def _check_fields_agree(self) -> TrainConfig:
        if self.accumulate > self.batch:
            raise ValueError(
                f"accumulate {self.accumulate} cuts a batch of {self.batch} into more pieces than pictures"
            )
        if self.loss_cap is not None and self.loss_floor > self.loss_cap:
            raise ValueError(f"loss_floor {self.loss_floor:g} is above loss_cap {self.loss_cap:g}: lower it")
        if self.lora:
            for field in ("stages", "distillation", "compile", "embedding_l2", "condition_start"):
                if getattr(self, field):
                    raise ValueError(f"an adapter is trained without {field}: leave out that, or lora")
            if self.parallel != ParallelSpec():
                raise ValueError("an adapter is trained in replicas: leave out parallel, or lora")
        if self.optimizer == "muon" and (self.parallel.mode != "ddp" or self.parallel.tensor > 1):
            raise ValueError(
                "optimizer muon needs whole matrices: take parallel mode ddp and tensor 1, or leave it out"
            )
        if self.parallel.pipeline > 1:
            for field in ("distillation", "compile", "optimizer"):
                if getattr(self, field):
                    raise ValueError(f"a pipeline trains without {field}: leave out that, or pipeline")
            if self.accumulate < self.parallel.pipeline:
                raise ValueError(
                    f"accumulate {self.accumulate} does not fill a pipeline of {self.parallel.pipeline}: "
                    f"raise it to {self.parallel.pipeline} or more"
                )
        learn_sigma = self.model.get("learn_sigma", self.diffusion.learn_sigma)
        if learn_sigma != self.diffusion.learn_sigma:
            raise ValueError("learn_sigma differs between model and diffusion: make them agree")
        balance = self.model.get("routing") == "token_choice" if self.balance is None else self.balance
        if self.compile and self.model.get("experts") and balance:
            raise ValueError("compile hides the routers that the balance of experts reads: leave out compile")
        return self

    @model_validator(mode="after")
    def _check_conditions_agree(self) -> TrainConfig:
        if self.condition_start == "missing" and self.start is None:
            raise ValueError("condition_start: missing completes the model that a run starts from: set init")
        if self.mean_of_others and (self.model.get("mean_maps", 1) < 2 or self.parallel.pipeline > 1):
            raise ValueError(
                "mean_of_others needs maps to choose among and no pipeline: set model.mean_maps and leave "
                "parallel.pipeline out, or leave mean_of_others out"
            )
        first_frame = self.model.get("first_frame", False)
        if self.first_frame_given is not None and not first_frame:
            raise ValueError("first_frame_given needs model.first_frame: set it true, or leave this out")
        if first_frame and (self.distillation or self.parallel.pipeline > 1):
            raise ValueError(
                "a model with first_frame is trained without distillation and pipeline: leave them out, or "
                "model.first_frame"
            )
        return self

    @model_validator(mode="after")
    def _check_steps_agree(self) -> TrainConfig:
        if self.stages and self.distillation:
            raise ValueError("a teacher teaches one picture size: leave out stages, or distillation")
        if isinstance(self.distillation, ProgressiveDistillationConfig):
            before = self.distillation.round_steps * (len(self.distillation.sampling_steps) - 1)
            if self.steps <= before:
                raise ValueError(
                    f"the last round of distillation begins at step {before}: raise steps above it"
                )
        if any(stage.steps is None for stage in self.stages[:-1]):
            raise ValueError("stages: only the last one may leave out steps")
        total = sum(stage.steps or 0 for stage in self.stages)
        last_is_explicit = bool(self.stages) and self.stages[-1].steps is not None
        if (total != self.steps) if last_is_explicit else (total >= self.steps):
            raise ValueError(
                f"stages add up to {total} steps, and steps is {self.steps}: "
                "leave steps out of the last stage to let it run to the end"
            )
        return self

    @property
    def start(self) -> Path | None:
        """The model to start from: `init`, or else the first teacher of a progressive distillation."""
        progressive = isinstance(self.distillation, ProgressiveDistillationConfig)
        return self.distillation.teacher if self.distillation and progressive and not self.init else self.init

    @property
    def space(self) -> Prediction:
        """The quantity whose squared error is the loss: `loss_space`, or its default."""
        return self.training_noise.space

    def recomputes(self, network: NetworkConfig) -> bool:
        """Return True if the blocks of a network keep their inputs alone, see `checkpoint_blocks`."""
        return network.depth > DEEP if self.checkpoint_blocks is None else self.checkpoint_blocks

    def balance_weight(self, network: NetworkConfig) -> float:
        """Return the weight of the loss that spreads tokens over the experts of a network, see `balance`."""
        if not isinstance(network, DiTConfig) or not network.experts:
            return 0.0
        default = BALANCE if network.routing == "token_choice" else 0.0
        return default if self.balance is None else self.balance

    @property
    def training_noise(self) -> TrainingNoise:
        """The noise that is trained on, with the weight of the error at each level."""
        return training_noise(
            self.diffusion.noise_schedule(),
            space=self.loss_space,
            cap=self.loss_cap,
            floor=self.loss_floor,
            device=self.device,
        )

    def open_dataset(self, path: Path | None = None) -> Dataset:
        """Open the data, at `path` if it has moved.

        That of a run with `lora` has the classes and the normalisation of its bundle.

        Raises:
            DataError: it is not there or cannot be trained on.
        """
        dataset = self.data.open(path)
        if self.lora is None:
            return dataset
        return in_terms_of(base_bundle(self.init).manifest, dataset, self.data.path)

    def stage_sizes(self, dataset: Dataset) -> list[tuple[int, Size]]:
        """Return (first step after the stage, size) for every stage; clips keep their number of frames.

        Two stages of 3 and 9 steps at 4×4 and 8×8 give [(3, (4, 4)), (12, (8, 8))].

        Raises:
            ValueError: a stage has another first axis than the data.
        """
        if not self.stages:
            return [(self.steps, dataset.size)]
        ends = [sum(stage.steps or 0 for stage in self.stages[: k + 1]) for k in range(len(self.stages) - 1)]
        for stage in self.stages:
            if stage.size[:-2] not in (dataset.size[:-2], ()):
                raise ValueError(
                    f"stages.size {size_name(stage.size)} has another first axis than the data, of "
                    f"{size_name(dataset.size)}: give height and width alone"
                )
        sizes: list[Size] = [(*dataset.size[:-2], *stage.size[-2:]) for stage in self.stages]
        return list(zip([*ends, self.steps], sizes, strict=True))

    def diffusion_of(self, dataset: Dataset) -> DiffusionSpec:
        """Return the diffusion process of the model: latents, which have no bounds, are never clipped."""
        clips = self.diffusion.clip_x0 and not isinstance(dataset, Latents)
        return self.diffusion.model_copy(update={"clip_x0": clips})

    def network_config(self, dataset: Dataset) -> NetworkConfig:
        """Return the configuration of the network: `model`, with the size, channels and classes of the data.

        In a run of several stages the size is the last stage's; positions are those of the first stage,
        interpolated.

        Raises:
            ValueError: a configuration that cannot work.
        """
        sizes = [size for _, size in self.stage_sizes(dataset)]
        fields: dict[str, Any] = {
            "learn_sigma": self.diffusion.learn_sigma,
            "in_channels": dataset.channels,
            **({} if dataset.texts is None else {"text_size": dataset.texts.size}),
            **({"text_tokens": self.data.text_tokens} if self.data.text_tokens else {}),
        }
        for field, value in fields.items():
            if self.model.get(field, value) != value:
                raise ValueError(
                    f"model.{field} is {self.model[field]}, but {value} by the data: leave it out"
                )
        if self.model.get("mean_rank") and self.condition_start is None and self.start is None:
            raise ValueError("model.mean_rank is measured from the pictures: set condition_start=data")
        if self.model.get("first_frame") and dataset.first_axis != "frames":
            held = {None: "pictures", "depth": "volumes"}[dataset.first_axis]
            raise ValueError(f"model.first_frame is for clips, and the data are {held}: leave it out")
        if len(set(sizes)) > 1:
            for field in ("layout_rank", "mean_rank", "first_frame"):
                if self.model.get(field):
                    raise ValueError(
                        f"model.{field} fixes the picture size: train without it, or without stages"
                    )
            if self.model.get("network", "dit") == "dit":
                fields["base_size"] = sizes[0]
        classes = tuple(len(factor.classes) for factor in dataset.factors)
        network = network_config({**fields, **self.model, "image_size": sizes[-1], "classes": classes})
        if self.lora and network != base_bundle(self.init).manifest.config:
            raise ValueError(f"the pictures do not fit {self.init}, whose network is adapted: see data.size")
        return network


def load_config(file: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load the run that a JSON file describes, with `key=value` overrides.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or an override has no "=".
        ValidationError: a wrong or unknown field.
    """
    return TrainConfig.model_validate(set_fields(read_fields(file), overrides))


def set_fields(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `data` with `key=value` overrides set in it; "network" is another name of the field `model`.

    Raises:
        ValueError: an override has no "=", or names a field of a value that has none.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"--set {override}: write KEY=VALUE")
        *parents, last = re.sub(r"^network\b", "model", key).split(".")
        section = data
        if parents == ["model"]:
            data["model"] = _named_network(data.get("model", {}))
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ValueError(f"--set {override}: {parent} is a value, which has no fields")
        try:
            section[last] = json.loads(value)
        except ValueError:
            section[last] = value
    return data


def first_mistake(error: ValidationError) -> str:
    """Return the first mistake in one sentence; an unknown field is named with the most similar known one."""
    field, message = wrong_field(error)
    if error.errors()[0]["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, list(_fields(TrainConfig)), n=1, cutoff=0.6)
        return f"there is no field {field}" + (f": did you mean {near[0]}?" if near else "")
    return f"field {field}: {message}" if field else message


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
