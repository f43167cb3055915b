"""A bundle: a model on disk. `export` writes it and `service` loads it; nothing here imports torch.

    <bundle>/manifest.json        the description of the model, with the sha256 of every other file
             weights.safetensors
             embedder.onnx        labels and text → condition embedding
             conditioner.onnx     timestep and condition embedding → condition state
             backbone.onnx        x and condition state → output; also backbone.int8.onnx and others
             pipeline/            an imported diffusers pipeline, whose transformer is the network
             backbones/<name>/    another network of the same latents: its weights and graphs

Nothing is ever unpickled. A file that is missing, altered or named with a path is refused with one sentence
that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from ditserve.commands import command_line
from ditserve.model.spec import bundle_bounds as bounds
from ditserve.model.spec.diffusion_spec import DiffusionSpec, StrictModel
from ditserve.model.spec.errors import ModelError, wrong_field
from ditserve.model.spec.network_config import BundleConfig, bundle_config, network_fields
from ditserve.model.spec.pipeline_config import GuidanceKind, PipelineConfig
from ditserve.model.spec.stretches import Stretch

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
GOLDEN = "golden.png"
WEIGHTS = "weights.safetensors"
EMBEDDER, CONDITIONER, BACKBONE = "embedder.onnx", "conditioner.onnx", "backbone.onnx"
DECODER = "decoder.onnx"
# The rows that a bundle is verified and calibrated on.
CALIBRATION = "calibration.safetensors"
_GRAPHS = [EMBEDDER, CONDITIONER, BACKBONE, DECODER]
_GRAPHS += [f"backbone.{precision}.onnx" for precision in ("fp16", "bf16", "int8", "int8.fp16")]
# The files that a manifest lists, where a bundle has them. No command touches others.
PIPELINE = "pipeline"
BACKBONES = "backbones"
PARTS = (PIPELINE, BACKBONES)  # folders in a bundle
BUNDLE_FILES = frozenset([WEIGHTS, CALIBRATION, GOLDEN, *_GRAPHS, *(f"{name}.data" for name in _GRAPHS)])

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
LARGEST_MANIFEST = 64 * 2**20  # bytes


class BundleError(ModelError):
    """A bundle that cannot be used; the message is one sentence that names the file."""


def read_config(value: Any) -> BundleConfig:
    """Return the configuration of a network, from its fields if it is not one yet. Raises `ValueError`."""
    if isinstance(value, BundleConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("the network's configuration must be an object")
    return bundle_config(value)


class Factor(StrictModel):
    """One label factor of the condition. Its null class, "not given", has the index len(classes)."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=bounds.LARGEST_COUNT)]


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
    empty: any. `defaults` are how it draws by itself.
    """

    config: BundleConfig
    embedding_size: Annotated[int, Field(ge=1, le=bounds.LARGEST_STATE)]
    state: Annotated[tuple[StateTensor, ...], Field(max_length=10_000)]
    row_cost: Annotated[float, Field(gt=0, le=1000)]
    guidance: Literal["classifier-free", "none"] = "classifier-free"
    step_counts: tuple[bounds.Steps, ...] = ()
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
        bounds.check_pictures(self.config, self.upscale, pixels=self.decoder == "identity")
        bounds.check_provenance(self.provenance)
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


class Bundle:
    """An opened bundle: a folder whose manifest is valid and whose files are those that it lists."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read and check the folder of a bundle.

        With `verify=False` the files must be there, of their size, but are not hashed: the API process needs
        only the manifest.

        Raises:
            BundleError: no such folder or manifest, invalid JSON, unknown fields or version, a missing or
                altered file.
        """
        root = Path(path)
        source = root / MANIFEST
        whole = root.parent.parent
        if root.parent.name == BACKBONES and not source.is_file() and (whole / MANIFEST).is_file():
            return cls.open(whole, verify=verify).backbone(root.name)
        if not source.is_file():
            raise BundleError(
                f"{root} is not a bundle: {MANIFEST} is missing; "
                f"pass a folder written by {command_line('export.onnx')}"
            )
        manifest = _read_manifest(source)
        if manifest.golden is not None and GOLDEN not in manifest.files:
            raise BundleError(f"{source}: field files: {GOLDEN} is missing, though golden describes it")
        for name, entry in manifest.files.items():
            file = root / name
            if not file.is_file():
                raise BundleError(
                    f"{file} is missing, though {source} lists it: restore it or export the bundle again"
                )
            if file.stat().st_size != entry.bytes or (verify and digest(file) != entry.sha256):
                raise BundleError(
                    f"{file} differs from the hash in {source}: restore it or export the bundle again"
                )
        return cls(root, manifest)

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path / name} is not part of this bundle: "
                f"its manifest lists {', '.join(sorted(self.manifest.files))}; {self._command_for(name)}"
            )
        return self.path / name

    def backbone(self, name: str) -> Bundle:
        """Return a further backbone as a bundle of its own, without a decoder.

        Raises:
            BundleError: the bundle has none of this name.
        """
        if name not in self.manifest.backbones:
            known = ", ".join(self.manifest.backbones) or "none"
            raise BundleError(f"{self.path} has no backbone {name!r}: it has {known}")
        spec, folder = self.manifest.backbones[name], f"{BACKBONES}/{name}/"
        files = self.manifest.files.items()
        own = {
            "name": f"{self.manifest.name}-{name}",
            "config": spec.config,
            "embedding_size": spec.embedding_size,
            "state": spec.state,
            "provenance": spec.provenance,
            "metrics": spec.metrics,
            "defaults": spec.defaults,
            "guidance": spec.guidance,
            "decoder": "identity",
            "backbones": {},
            "ladder": (),
            "golden": None,
            "files": {file[len(folder) :]: entry for file, entry in files if file.startswith(folder)},
        }
        return Bundle(self.path / folder, self.manifest.model_copy(update=own))

    def _command_for(self, name: str) -> str:
        if ".int8" in name:
            return f"{command_line('export.int8')} {self.path} adds it"
        if name.startswith("backbone.") and name != BACKBONE:
            return f"{command_line('export.half')} {self.path} adds it"
        return f"{command_line('export.onnx')} {self.path} --out {self.path} writes all graphs"


def bundle_name(folder: Path) -> str:
    """Return the name of the bundle of a folder: a legal one for any folder name, such as "über 2"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:100] or "model"


def _read_manifest(source: Path) -> Manifest:
    try:
        if source.stat().st_size > LARGEST_MANIFEST:
            raise BundleError(f"{source} is larger than {LARGEST_MANIFEST} bytes: it is no manifest")
        return parse_manifest(source.read_bytes(), source)
    except OSError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror}") from None


def parse_manifest(raw: bytes, source: Path) -> Manifest:
    """Return the manifest in `raw`; error messages name `source`.

    Raises:
        BundleError: not JSON, not an object, or a field is wrong.
    """
    try:
        data = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{source} must hold a JSON object")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{source} has schema_version {_short(repr(version))}; this release reads {SCHEMA_VERSION}"
        )
    try:
        manifest = Manifest.model_validate(data)
        # Its digest is that of its JSON.
        manifest.model_dump_json()
    except ValidationError as error:
        field, message = wrong_field(error)
        # A sentence about several fields names them.
        raise BundleError(f"{source}: {_short(f'field {field}: {message}' if field else message)}") from None
    except (PydanticSerializationError, RecursionError) as error:
        raise BundleError(f"{source}: field provenance: cannot be written as JSON: {error}") from None
    return manifest


def _short(text: str) -> str:
    """Return text from a manifest as a message holds it: on one line, and cut."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json in the folder `path` atomically, with `files` taken from its contents now.

    Further backbones that are not there are left out.
    """
    there = {name: spec for name, spec in manifest.backbones.items() if (path / BACKBONES / name).is_dir()}
    manifest = manifest.with_backbones(there)
    names = sorted(name for name in BUNDLE_FILES if (path / name).is_file())
    inner = [file for folder in PARTS for file in (path / folder).rglob("*")]
    names += sorted(str(file.relative_to(path)) for file in inner if file.is_file())
    files = {
        name: FileEntry(sha256=digest(path / name), bytes=(path / name).stat().st_size) for name in names
    }
    data = manifest.model_copy(update={"files": files}).model_dump(mode="json")
    write_atomic(path / MANIFEST, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def write_atomic(target: Path, data: bytes) -> None:
    """Replace `target` by `data`; a crash leaves the old or the new file, never a part of it."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(target)


def digest(file: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
