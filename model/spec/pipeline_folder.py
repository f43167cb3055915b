"""A folder of a diffusers pipeline, read as the manifest of a bundle; nothing here imports torch.

    <folder>/model_index.json       the pipeline's class, and the class of each part
             transformer/           config.json and weights in safetensors, whole or in shards
             vae/  scheduler/  text_encoder*/  tokenizer*/

Every number is read from these files. What they do not state is that of the family (`pipeline_config`). A
part that cannot be used is refused with one sentence that names the file; pickled weights are never read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditserve.model.spec.bundle import (
    SD_SCALE,
    Defaults,
    LatentSpec,
    Manifest,
    StateTensor,
)
from ditserve.model.spec.pipeline_config import (
    FAMILIES,
    INDEX,
    GuidanceKind,
    PipelineConfig,
    PipelineFamily,
)
from ditserve.model.spec.pipeline_parts import (
    PipelineFolderError,
    check_class,
    check_index,
    check_part,
    needed_parts,
    read_json,
)
from ditserve.model.spec.pipeline_scheduler import pipeline_diffusion

VAE = "vae"  # the folder of a pipeline's autoencoder
FEW_STEPS = 4  # of a model that was distilled: it has no guidance


@dataclass(frozen=True, slots=True)
class FoundPipeline:
    """A pipeline that can be served: the manifest of its bundle, without files, and what there is to tell.

    `parts` are the folders that are needed; `notes` has a line for each part and each choice, what and how.
    """

    folder: Path
    manifest: Manifest
    parts: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]


def is_pipeline(folder: Path) -> bool:
    """Return True for the folder of a diffusers pipeline of a family that is served by its own module."""
    name = _optionalread_json(folder / INDEX).get("_class_name")
    return any(name in family.pipelines for family in FAMILIES.values())


def read_pipeline(
    folder: Path, *, name: str, licence: str, size: tuple[int, int] | None = None, tokens: int | None = None
) -> FoundPipeline:
    """Read the folder of a pipeline. `size` is the latent (height, width) of its pictures, `tokens` the most
    tokens of a prompt, where they are not to be those of the folder and its family.

    Raises:
        PipelineFolderError: a part is missing, unknown, pickled, or says what cannot be.
    """
    index = read_json(folder / INDEX)
    found, family = _family(folder, index)
    check_index(folder / INDEX, index, family)
    needed = needed_parts(index)
    for part in needed:
        check_part(folder / part)
    transformer = read_json(folder / "transformer" / "config.json")
    scheduler = _scheduler(folder)
    check_class(folder / "transformer" / "config.json", transformer, family)
    latents = latent_spec(folder / VAE)
    try:
        config = _config(found, family, index, transformer, latents, size=size, tokens=tokens)
        guidance = _guidance(family, transformer)
        diffusion, solver, grid = pipeline_diffusion(scheduler, family, config)
        manifest = Manifest(
            name=name,
            version="1",
            description=f"{index['_class_name']}, imported",
            config=config,
            diffusion=diffusion,
            factors=(),
            decoder="pipeline",
            latents=latents,
            embedding_size=config.embedding_size,
            state=_state(config),
            defaults=_defaults(family, guidance, solver, grid),
            guidance=guidance,
            guidance_embedded=family.guidance_scale if guidance == "embedded" else None,
            licence=licence,
            provenance={"import": {"pipeline": index["_class_name"]}},
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{where} {first['msg'].removeprefix('Value error, ')}".lstrip()
        raise PipelineFolderError(f"{folder}: {message}") from None
    except (ValueError, TypeError) as error:
        raise PipelineFolderError(f"{folder}: {error}") from None
    return FoundPipeline(folder, manifest, needed, _notes(folder, index, needed, manifest, scheduler))


def stated_licence(folder: Path) -> str:
    """Return the licence that the head of a pipeline's README.md states, "unspecified" without one."""
    try:
        head = (folder / "README.md").read_text(encoding="utf-8")[:10_000]
    except (OSError, UnicodeDecodeError):
        return "unspecified"
    found = re.search(r"^license(?:_name)?:\s*([\w.-]+)\s*$", head, re.MULTILINE)
    return found[1] if found else "unspecified"


def holds_pipeline(folder: Path) -> bool:
    """Return True for a folder that is to be brought in as a pipeline, whether or not that is possible.

    That of a DiT is not, whatever pipeline is around it: its weights become a network of this project.
    """
    network = _optionalread_json(folder / "transformer" / "config.json").get("_class_name")
    if network == "DiTTransformer2DModel":
        return False
    known = any(network == family.transformer for family in FAMILIES.values())
    return known or _optionalread_json(folder / INDEX).get("_class_name") not in (None, "DiTPipeline")


def _family(folder: Path, index: Mapping[str, Any]) -> tuple[str, PipelineFamily]:
    name = index.get("_class_name")
    for found, family in FAMILIES.items():
        if name in family.pipelines:
            return found, family
    known = ", ".join(pipeline for family in FAMILIES.values() for pipeline in family.pipelines)
    raise PipelineFolderError(
        f"{folder / INDEX} is of a {name}, which cannot be served: known pipelines are {known}"
    )


def _whole(transformer: Mapping[str, Any], field: str) -> int:
    """Return a number of a transformer's configuration. Raises `ValueError` naming the field."""
    value = transformer.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"transformer: {field} must be a whole number above 0, not {value!r}")
    return value


def _config(
    name: Any,
    family: PipelineFamily,
    index: Mapping[str, Any],
    transformer: Mapping[str, Any],
    latents: LatentSpec,
    *,
    size: tuple[int, int] | None,
    tokens: int | None,
) -> PipelineConfig:
    """Return the configuration of the network. Raises `ValueError` naming the field."""
    channels = _whole(transformer, "in_channels") // family.packs**2
    patch = family.packs * (1 if family.packs > 1 else transformer.get("patch_size", 2))
    most = family.pipelines[index["_class_name"]]
    known = limit = tokens or most
    tokenizer = counting_tokenizer(family, index)
    if tokenizer != family.tokenizer:
        # Without its largest encoder, a pipeline hands over zeros for it, and the others read the text.
        known, limit = most, family.more_tokens
    largest = _largest_grid(family, transformer, known + family.more_tokens)
    largest_side = largest * patch if largest else None
    # Of a pipeline whose transformer states no size it is 128, as there.
    side = family.sample_size or transformer.get("sample_size") or 128
    side = min(side, largest_side or side)
    return PipelineConfig(
        family=name,
        transformer={key: value for key, value in transformer.items() if not key.startswith("_")},
        image_size=size or (side, side),
        in_channels=channels,
        text_tokens=known + family.more_tokens,
        text_size=_whole(transformer, family.text_size),
        text_limit=limit,
        tokenizer=tokenizer,
        patch_size=patch,
        factor=latents.factor,
        largest_side=largest_side,
        learn_sigma=(transformer.get("out_channels") or channels) == 2 * channels and family.packs == 1,
        pooled_size=_whole(transformer, family.pooled_size) if family.pooled_size else 0,
        text_mask=family.text_mask,
        embedded_guidance=bool(transformer.get("guidance_embeds")),
    )


def counting_tokenizer(family: PipelineFamily, index: Mapping[str, Any]) -> str:
    """Return the folder of the tokenizer that counts a prompt: that of the largest encoder there is."""
    return family.tokenizer if any(index.get(family.tokenizer) or ()) else "tokenizer"


def _largest_grid(family: PipelineFamily, transformer: Mapping[str, Any], tokens: int) -> int | None:
    """Return the most tokens along a side that the network has positions for; None: any number.

    Raises:
        ValueError: there are none for so many tokens of a text.
    """
    if "axes_lens" in transformer:
        # Those of a text, the image after it, and its rows and columns.
        longest, *sides = transformer["axes_lens"]
        if tokens >= longest:
            raise ValueError(f"a text may have {longest - 1} tokens at most, not {tokens}")
        return int(min(sides))
    largest = transformer.get("pos_embed_max_size")
    return math.isqrt(largest) if largest and family.counts_positions else largest


def _defaults(family: PipelineFamily, guidance: GuidanceKind, solver: str, grid: str) -> Defaults:
    return Defaults(
        steps=family.steps if guidance != "none" else FEW_STEPS,
        solver=solver,
        grid=grid,
        guidance_scale=family.guidance_scale if guidance == "classifier-free" else 1.0,
        guidance_interval=(0.0, 1.0),
    )


def _guidance(family: PipelineFamily, transformer: Mapping[str, Any]) -> GuidanceKind:
    """Return the kind of a model's guidance. Raises `ValueError` for one that its pipeline does not have."""
    embedded = bool(transformer.get("guidance_embeds"))
    if family.distilled:
        return "embedded" if embedded else "none"
    if embedded:
        raise ValueError("transformer: guidance_embeds true is not known for this pipeline")
    return "classifier-free"


def latent_spec(folder: Path) -> LatentSpec:
    """Return the normalisation of an autoencoder's latents, (z − shift) / scale, from its config.json.

    Raises:
        PipelineFolderError: it does not state it.
    """
    file = folder / "config.json"
    vae = read_json(file)
    if "latents_mean" in vae and "latents_std" in vae and "temperal_downsample" in vae:
        mean, deviation = (tuple(map(float, vae[name])) for name in ("latents_mean", "latents_std"))
        return LatentSpec(shift=mean, scale=deviation, factor=2 ** len(vae["temperal_downsample"]))
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    channels = vae.get("latent_channels")
    # Earlier releases of diffusers did not write it.
    scale = vae.get("scaling_factor", SD_SCALE if vae.get("_class_name") == "AutoencoderKL" else None)
    if not isinstance(levels, list) or not isinstance(channels, int) or not isinstance(scale, float | int):
        raise PipelineFolderError(f"{file} must state block_out_channels, latent_channels and scaling_factor")
    if not scale > 0:
        raise PipelineFolderError(f"{file}: scaling_factor must be above 0, not {scale}")
    shift = vae.get("shift_factor") or 0.0
    return LatentSpec(
        shift=(float(shift),) * channels, scale=(1.0 / scale,) * channels, factor=2 ** (len(levels) - 1)
    )


def _state(config: PipelineConfig) -> tuple[StateTensor, ...]:
    """Return the condition state: what the network is told of the noise, and what of the condition."""
    return tuple(
        StateTensor(name=name, shape=shape, follows="level" if name == "noise" else "condition")
        for name, shape in config.state()
    )


def _scheduler(folder: Path) -> dict[str, Any]:
    return read_json(folder / "scheduler" / "scheduler_config.json")


def _notes(
    folder: Path,
    index: Mapping[str, Any],
    parts: tuple[str, ...],
    manifest: Manifest,
    scheduler: Mapping[str, Any],
) -> tuple[tuple[str, str], ...]:
    """Return the table of an import: what was found, what will be done with it, and what is left out."""
    config = manifest.config
    assert isinstance(config, PipelineConfig)
    assert manifest.latents is not None
    defaults = manifest.defaults
    height, width = (side * config.factor for side in config.image_size)
    encoders = [part for part in parts if part.startswith("text_encoder")]
    left = sorted(
        name for name, value in index.items() if isinstance(value, list) and any(value) and name not in parts
    )
    told = {
        "classifier-free": f"classifier-free, scale {defaults.guidance_scale:g}",
        "embedded": f"embedded: the network is told guidance_embedded, {manifest.guidance_embedded or 0:g}",
        "none": "none: it was distilled",
    }
    notes = [
        ("pipeline", str(index["_class_name"])),
        ("network", f"{FAMILIES[config.family].transformer}, run unmodified"),
        ("picture", f"{width}x{height}, sides in multiples of {config.patch_size * config.factor}"),
        ("text", f"{config.text_tokens} tokens, {'masked' if config.text_mask else 'padded'}; {encoders}"),
        ("noise", f"{manifest.diffusion.schedule}, predicts {manifest.diffusion.prediction}"),
        ("scheduler", f"{scheduler.get('_class_name')} → {defaults.solver}, grid {defaults.grid}"),
        ("steps", f"{defaults.steps} by default"),
        ("guidance", told[manifest.guidance]),
    ]
    return (*notes, *((name, "is left out: drawing from a prompt does not need it") for name in left))


def _optionalread_json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except PipelineFolderError:
        return {}
