"""The bounds of what a bundle may say: a manifest within them can be served, as far as arithmetic goes.

They are far from what anybody trains, and near enough that a mistyped number is refused where the bundle is
opened, not where a worker runs out of memory. Every function raises ValueError with one sentence that names
the field. Pure: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from ditserve.model.spec.class_names import ClassNames, NamedFactor, UnknownClassError
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.network_config import BundleConfig
from ditserve.model.spec.sizes import scaled, size_name
from ditserve.model.spec.solvers import step_table

TEXT = "text"  # the key of a condition's text, beside those of the factors
MAX_TIMESTEPS = 100_000
MAX_SEED = 2**53 - 1
MAX_GUIDANCE = 100.0
SLOWEST, FASTEST = 0.5, 100.0  # frames in a second; a frame of a GIF lasts a hundredth of one at least
LARGEST_COUNT = 2**20  # of any whole number of a network's configuration
Steps = Annotated[int, Field(ge=1, le=MAX_TIMESTEPS)]
Size = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
LARGEST_DEPTH = 1000  # blocks of a DiT, residual blocks of a U-Net's level
LARGEST_LEVELS = 16  # of a U-Net
LARGEST_LATENT = 2**26  # numbers of a latent; also pixels of a picture
LARGEST_STATE = 2**26  # numbers of a row's condition state


class StatedRun(Protocol):
    """A sampling run as a bundle describes it: a rung, the defaults, or that of the golden image."""

    @property
    def solver(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def grid(self) -> str: ...


class StatedStretch(Protocol):
    """A stretch of the noise range as a bundle describes it."""

    @property
    def above(self) -> float: ...
    @property
    def backbone(self) -> str: ...


class NamedTensor(Protocol):
    """A tensor of the condition state."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...


def check_run(field: str, run: StatedRun, schedule: Schedule) -> None:
    """Refuse a run of steps that the model does not take, or whose coefficients no float32 holds."""
    try:
        schedule.check_steps(run.steps)
        table = step_table(run.solver, noise_levels(run.grid, run.steps, schedule), schedule)
    except ValueError as error:
        raise ValueError(f"field {field}: {error}") from None
    with np.errstate(over="ignore"):
        columns = [np.float32(column) for column in table.columns]
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError(f"field {field}: the steps leave the range of float32; choose a milder schedule")


def check_interval(field: str, interval: tuple[float, float]) -> None:
    """Refuse a guidance interval other than 0 <= low <= high <= 1."""
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(
            f"field {field}.guidance_interval: must satisfy 0 <= low <= high <= 1, not {list(interval)}"
        )


def check_network(config: BundleConfig) -> None:
    """Refuse a network whose numbers no machine holds, before anything is computed of them."""
    fields = asdict(config)
    longest = {"depth": LARGEST_DEPTH, "res_blocks": LARGEST_DEPTH}
    for name, value in fields.items():
        values = value if isinstance(value, tuple) else (value,)
        limit = longest.get(name, LARGEST_COUNT)
        if any(isinstance(number, int | float) and number > limit for number in values):
            raise ValueError(f"field config: {name} may be at most {limit}, not {value!r}")
    if len(fields.get("multipliers", ())) > LARGEST_LEVELS:
        raise ValueError(f"field config: multipliers names more than {LARGEST_LEVELS} levels")
    if config.in_channels * prod(config.image_size) > LARGEST_LATENT:
        raise ValueError(
            f"field config: image_size {size_name(config.image_size)} of {config.in_channels} channels has "
            f"more than {LARGEST_LATENT} numbers"
        )


def check_axes(config: BundleConfig, first_axis: str | None, fps: float | None, decoder: str) -> None:
    """Refuse a third axis of which nothing is known, or that the decoder would lose."""
    axes = len(config.image_size)
    if axes == 3 and first_axis is None:
        raise ValueError("field first_axis: say what the first of three axes is, frames or depth")
    if axes == 2 and first_axis is not None:
        raise ValueError(f"field first_axis: config.image_size has two axes, and {first_axis} is for three")
    if (fps is None) == (first_axis == "frames"):
        raise ValueError("field fps: frames need it, the frames in a second, and nothing else has it")
    if axes == 3 and decoder == "pipeline":
        raise ValueError("field decoder: a pipeline draws pictures, and config.image_size has three axes")


def check_backbone(field: str, config: BundleConfig, own: BundleConfig) -> None:
    """Refuse a further backbone that does not denoise the latents of the bundle's own, as that does."""
    check_network(config)
    for name in ("in_channels", "out_channels", "image_size", "classes", "text_width", "text_tokens"):
        theirs, ours = (getattr(each, name) for each in (config, own))
        if theirs != ours:
            raise ValueError(f"field {field}: {name} is {theirs}, and that of the bundle's own is {ours}")


def check_block_caches(blocks: Mapping[str, int], config: BundleConfig) -> None:
    """Refuse block caches, by backbone, of a network that has no blocks for them, or of different blocks."""
    for name, count in blocks.items():
        field = f"backbones.{name}.block_cache.blocks"
        if not isinstance(config, DiTConfig) or any(config.level_plan) or "in_context" in config.plan:
            raise ValueError(
                f"field {field}: only a DiT of ours has a block cache, without levels and not in context"
            )
        if count >= config.depth:
            raise ValueError(f"field {field}: must be below the {config.depth} blocks, not {count}")
        if count != (others := next(iter(blocks.values()))):
            raise ValueError(f"field {field}: must be {others}, that of the other block caches, not {count}")


def check_stretches(field: str, stretches: Sequence[StatedStretch], backbones: Mapping[str, Any]) -> None:
    """Refuse stretches that do not go from noise to picture, or of a backbone that the bundle has not."""
    starts = [stretch.above for stretch in stretches]
    if starts != sorted(set(starts), reverse=True):
        raise ValueError(f"field {field}: above must fall from one stretch to the next, not {starts}")
    for stretch in stretches:
        if stretch.backbone and stretch.backbone not in backbones:
            known = ", ".join(backbones) or "none"
            raise ValueError(
                f"field {field}: the bundle has no backbone {stretch.backbone!r} (it has {known})"
            )


def check_pictures(config: BundleConfig, upscale: int, *, pixels: bool) -> None:
    """Refuse pictures that cannot be made: of other than 1 or 3 channels, or with too many pixels."""
    if pixels and config.in_channels not in (1, 3):
        raise ValueError(
            "field decoder: identity makes pictures of 1 or 3 channels, "
            f"and config.in_channels is {config.in_channels}"
        )
    size = scaled(tuple(config.image_size), upscale)
    if prod(size) > LARGEST_LATENT:
        raise ValueError(
            f"field latents.factor: pictures of {size_name(size)} have more than {LARGEST_LATENT} pixels"
        )


def check_channels(channels: Mapping[str, int | None], config: BundleConfig) -> None:
    """Refuse numbers of channels other than the network's; fewer may be guided, and None is all."""
    own = config.in_channels
    for field, count in channels.items():
        if count is not None and (count > own or (count < own and not field.endswith("guidance_channels"))):
            raise ValueError(f"field {field}: {count} channels do not fit config.in_channels, {own}")


def check_factors(factors: Sequence[NamedFactor], config: BundleConfig) -> None:
    """Refuse factors that are not those of the network, or of one name, and a default of the first.

    The first factor is what a request is about.
    """
    if factors and factors[0].default is not None:
        raise ValueError(f"field factors: {factors[0].name} is what a request is about, and has no default")
    names = [factor.name for factor in factors]
    if len(set(names)) < len(names):
        raise ValueError(f"field factors: two have one name among {', '.join(names)}")
    if config.text_size and TEXT in names:
        raise ValueError(f"field factors: {TEXT} is the name of the model's text; rename the factor")
    counts = tuple(len(factor.classes) for factor in factors)
    if counts != tuple(config.classes):
        raise ValueError(
            f"field factors: they have {list(counts)} classes, and config.classes says {list(config.classes)}"
        )


def check_state(state: Sequence[NamedTensor]) -> None:
    """Refuse a condition state of one name twice, or that no row of a batch can hold."""
    names = [tensor.name for tensor in state]
    if len(set(names)) < len(names):
        raise ValueError("field state: two tensors have one name")
    if any(size < 1 for tensor in state for size in tensor.shape):
        raise ValueError("field state: every size of a shape must be at least 1")
    if sum(prod(tensor.shape) for tensor in state) > LARGEST_STATE:
        raise ValueError(f"field state: a row has more than {LARGEST_STATE} numbers")


def check_condition(
    field: str, condition: Mapping[str, str], factors: Sequence[NamedFactor], config: BundleConfig
) -> None:
    """Refuse a condition of a factor or a class that the model does not have."""
    known = {factor.name: factor for factor in factors}
    for name, value in condition.items():
        if name == TEXT and config.text_size:
            continue
        if name not in known:
            raise ValueError(f"field {field}: the model has no factor {name!r}")
        try:
            ClassNames(known[name]).index(value)
        except UnknownClassError as error:
            raise ValueError(f"field {field}: {error}") from None


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Refuse a provenance whose training data, which name the text encoder, have another form."""
    training = provenance.get("training", {})
    data = training.get("data", {}) if isinstance(training, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(data.get("text"), str | None):
        raise ValueError("field provenance: training.data must be an object, and its text a name or null")
