"""The manifest of a bundle: what it says of a model, and what a service needs to know to serve it. Pure.

Unknown fields are refused, and so is a model that could not be served: see `bundle_bounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from ditserve.model.spec import bundle_bounds as bounds
from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.diffusion_spec import DiffusionSpec, StrictModel
from ditserve.model.spec.network_config import BundleConfig, bundle_config, network_fields
from ditserve.model.spec.pipeline_config import GuidanceKind, PipelineConfig
from ditserve.model.spec.sizes import FirstAxis
from ditserve.model.spec.stretches import Stretch

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
# Of a file in a bundle, which may lie in folders of it.
FilePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,3}$", max_length=300)
]
Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=256)]
ClassName = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(max_length=10_000)]
GuidanceScale = Annotated[float, Field(ge=0, le=bounds.MAX_GUIDANCE)]
Moment = Annotated[float, Field(ge=-1e6, le=1e6)]


# The pixels that a latent of the SD-VAE covers on a side.
SD_FACTOR = 8
# Latents of the SD-VAE are multiplied by this, so that their variance is about 1.
SD_SCALE = 0.18215
# "pipeline": the autoencoder in the folder of an imported pipeline.
DecoderKind = Literal["identity", "sd-vae", "small", "pipeline"]


Follows = Literal["both", "condition", "level"]


def read_config(value: Any) -> BundleConfig:
    """Return the configuration of a network, from its fields if it is not one yet. Raises `ValueError`."""
    if isinstance(value, BundleConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("the network's configuration must be an object")
    return bundle_config(value)


class Factor(StrictModel):
    """One label factor of the condition. Its null class, "not given", has the index len(classes).

    `default` is the class of a request that leaves the factor out; None: it is not given then.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=bounds.LARGEST_COUNT)]
    default: ClassName | None = None

    @model_validator(mode="after")
    def _default_is_a_class(self) -> Factor:
        if self.default is not None and self.classes.count(self.default) != 1:
            raise ValueError(
                f"the default {self.default!r} of factor {self.name} is not the name of one class"
            )
        return self


class StateTensor(StrictModel):
    """One tensor of the condition state; `shape` is without the batch dimension.

    `follows` says what it depends on: the condition, the noise level, or both.
    """

    name: Label
    shape: Annotated[tuple[bounds.Size, ...], Field(max_length=8)]
    follows: Follows = "both"


class LatentSpec(StrictModel):
    """The normalisation of latents, (latents − shift) / scale, with one shift and one scale per channel."""

    shift: tuple[Moment, ...]
    scale: tuple[Annotated[Moment, Field(ge=1e-6)], ...]
    factor: Annotated[int, Field(ge=1, le=64)] = SD_FACTOR
    """The pixels that a latent covers on a side."""


class StretchSpec(StrictModel):
    """The noise levels from `above` on, in 0..1 of the range, and their backbone; "" is the bundle's own."""

    above: Annotated[float, Field(ge=0, le=1)]
    backbone: Name | Literal[""]


class RungSpec(StrictModel):
    """One measured operating point.

    `rows` is the cost in forward rows per image, of the bundle's own network. `stretches` name the backbones
    that take part, from noise to picture. `own` is the distance of its pictures to those that the
    model's own long run draws of the same noise, `real` that to real pictures; None: not measured. `quality`
    is the one of the two that orders the ladder (`Manifest.ladder_order`): lower is better.
    """

    name: Label
    solver: Label
    steps: bounds.Steps
    grid: Text
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    rows: Annotated[float, Field(ge=0)]
    quality: float
    own: float | None = None
    real: float | None = None
    stretches: Annotated[tuple[StretchSpec, ...], Field(max_length=8)] = ()


class Defaults(StrictModel):
    """The values that a request gets for what it leaves out."""

    steps: bounds.Steps
    solver: Label
    grid: Text
    guidance_scale: GuidanceScale
    guidance_interval: tuple[float, float]


class BackboneSpec(StrictModel):
    """A further network of the bundle's latents, conditions and noise, such as a lighter one or a student.

    `row_cost` is the time of one of its rows, in rows of the bundle's own network. With `guidance` "none" it
    was distilled with guidance, and is never guided. `step_counts` are those that it was distilled for;
    empty: any. `defaults` are how it draws by itself. `shared_weights` names the tensors that it does not
    store, since the bundle's own network has the same. With a `block_cache` it is the bundle's own network,
    in the graphs `trunk.onnx` and `tail.onnx`.
    """

    config: BundleConfig
    embedding_size: Annotated[int, Field(ge=1, le=bounds.LARGEST_STATE)]
    state: Annotated[tuple[StateTensor, ...], Field(max_length=10_000)]
    row_cost: Annotated[float, Field(gt=0, le=1000)]
    guidance: Literal["classifier-free", "none"] = "classifier-free"
    step_counts: tuple[bounds.Steps, ...] = ()
    shared_weights: Annotated[tuple[Label, ...], Field(max_length=10_000)] = ()
    block_cache: BlockCache | None = None
    defaults: Defaults
    provenance: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)

    _read_config = field_validator("config", mode="plain")(read_config)
    _write_config = field_serializer("config")(network_fields)


class Golden(StrictModel):
    """One image that PyTorch drew with the model, kept in `golden.png`.

    A service draws it again and compares, to notice a fault of its machine or its libraries (a canary).
    """

    condition: dict[str, str]
    seed: Annotated[int, Field(ge=0, le=bounds.MAX_SEED)]
    steps: bounds.Steps
    solver: Label
    grid: Text
    guidance_scale: GuidanceScale


class FileEntry(StrictModel):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, le=2**50)]


class Manifest(StrictModel):
    """The content of manifest.json. Unknown fields and unknown schema versions are refused, and so is a model
    that could not be served: see `bundle_bounds`."""

    schema_version: Literal[1] = 1
    name: Name
    version: Name
    description: Text
    config: BundleConfig
    diffusion: DiffusionSpec
    factors: Annotated[tuple[Factor, ...], Field(max_length=16)]
    # What comes before height and width where `image_size` has three axes.
    first_axis: FirstAxis | None = None
    # The frames that a clip shows in a second, unless a request says so.
    fps: Annotated[float, Field(ge=bounds.SLOWEST, le=bounds.FASTEST)] | None = None
    decoder: DecoderKind = "identity"
    # None: latents are multiplied by 0.18215, as for the published models.
    latents: LatentSpec | None = None
    # Of an imported pipeline it is all its tokens: 2.1 million numbers of FLUX.
    embedding_size: Annotated[int, Field(ge=1, le=bounds.LARGEST_STATE)]
    state: Annotated[tuple[StateTensor, ...], Field(max_length=10_000)]
    defaults: Defaults
    guidance: GuidanceKind = "classifier-free"
    """"embedded": the network is told the guidance scale. "none": no unconditional prediction was trained
    that guidance could subtract."""
    guidance_embedded: GuidanceScale | None = None
    """The scale that a network with embedded guidance is told by default."""
    backbones: Annotated[dict[Name, BackboneSpec], Field(max_length=8)] = Field(default_factory=dict)
    ladder: Annotated[tuple[RungSpec, ...], Field(max_length=256)] = ()
    ladder_order: Literal["own", "real"] = "own"
    golden: Golden | None = None
    licence: Text
    attribution: tuple[Text, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[FilePath, FileEntry] = Field(default_factory=dict)

    def with_backbones(self, backbones: Mapping[str, BackboneSpec]) -> Manifest:
        """Return this manifest with these further backbones; only rungs of those it had before stay."""
        kept = {"", *(name for name, spec in backbones.items() if self.backbones.get(name) == spec)}
        ladder = [rung for rung in self.ladder if kept.issuperset(part.backbone for part in rung.stretches)]
        return self.model_copy(update={"backbones": dict(backbones), "ladder": tuple(ladder)})

    def stretches(self, specs: Sequence[StretchSpec]) -> tuple[Stretch, ...]:
        """Return the stretches of a rung, with the costs of the bundle's backbones."""
        stretches = []
        for spec in specs:
            other = self.backbones.get(spec.backbone)
            cost, guided = (1.0, True) if other is None else (other.row_cost, other.guidance != "none")
            stretches.append(Stretch(spec.above, spec.backbone, cost, guided))
        return tuple(stretches)

    @property
    def upscale(self) -> int:
        """The pixels along a side of the picture for each of what the network denoises."""
        if self.decoder == "identity":
            return 1
        return SD_FACTOR if self.latents is None else self.latents.factor

    def guidance_weight(self, scale: float | None = None) -> float:
        """Return a guidance scale as the weight of the difference, 1 for none; None is the model's own.

        Z-Image counts from 0: its scale of 4 is a weight of 5. As their pipelines do, imported models draw
        without guidance where the weight would be below 1.
        """
        asked = self.defaults.guidance_scale if scale is None else scale
        weight = asked + (1.0 - self.diffusion.unguided_scale)
        return max(weight, 1.0) if isinstance(self.config, PipelineConfig) else weight

    _read_config = field_validator("config", mode="plain")(read_config)
    _write_config = field_serializer("config")(network_fields)

    @model_validator(mode="after")
    def _servable(self) -> Manifest:
        bounds.check_network(self.config)
        bounds.check_factors(self.factors, self.config)
        bounds.check_state(self.state)
        pixels = self.decoder == "identity"
        bounds.check_axes(self.config, self.first_axis, self.fps, self.decoder)
        bounds.check_pictures(self.config, self.upscale, pixels=pixels)
        bounds.check_provenance(self.provenance)
        if self.diffusion.clip_x0 and not pixels:
            raise ValueError(
                f"field diffusion.clip_x0: must be false where the decoder is {self.decoder}: latents lie "
                "beyond [-1, 1] too; export the model again"
            )
        channels = {"diffusion.guidance_channels": self.diffusion.guidance_channels}
        if self.latents is not None:
            channels |= {"latents.shift": len(self.latents.shift), "latents.scale": len(self.latents.scale)}
        bounds.check_channels(channels, self.config)
        runs: dict[str, RungSpec | Defaults] = {"defaults": self.defaults}
        runs |= {f"ladder.{k}": rung for k, rung in enumerate(self.ladder)}
        schedule = self.diffusion.noise_schedule()
        for field, run in runs.items():
            bounds.check_run(field, run, schedule)
            bounds.check_interval(field, run.guidance_interval)
        caches = {name: each.block_cache for name, each in self.backbones.items() if each.block_cache}
        bounds.check_block_caches({name: cache.blocks for name, cache in caches.items()}, self.config)
        for name, backbone in self.backbones.items():
            bounds.check_backbone(f"backbones.{name}", backbone.config, self.config)
            bounds.check_state(backbone.state)
            bounds.check_run(f"backbones.{name}.defaults", backbone.defaults, schedule)
        for k, rung in enumerate(self.ladder):
            bounds.check_stretches(f"ladder.{k}.stretches", rung.stretches, self.backbones)
        if self.golden is not None:
            bounds.check_run("golden", self.golden, schedule)
            bounds.check_condition("golden.condition", self.golden.condition, self.factors, self.config)
        return self

    @model_validator(mode="after")
    def _check_guidance(self) -> Manifest:
        scales = {"defaults": self.defaults.guidance_scale}
        if self.golden is not None:
            scales["golden"] = self.golden.guidance_scale
        for field, scale in scales.items():
            if self.guidance != "classifier-free" and scale != 1.0:
                raise ValueError(
                    f"field {field}.guidance_scale: must be 1 where guidance is {self.guidance}, not {scale}"
                )
        return self
