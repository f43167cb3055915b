"""Bundles of imported weights, and a bundle's weights in files of other projects' layouts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ditserve.model.spec.bundle import PIPELINE, WEIGHTS, Bundle, bundle_name, write_atomic, write_manifest
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.manifest import Factor, Manifest, StateTensor
from ditserve.model.spec.output_folder import BUNDLE, DIFFUSERS, check_new_file, replacement
from ditserve.model.spec.pipeline_bundle import take_part
from ditserve.model.spec.pipeline_folder import VAE
from ditserve.model.weights.diffusers import to_diffusers
from ditserve.model.weights.folders import DIFFUSERS_CONFIG, DIFFUSERS_NAME
from ditserve.model.weights.imported import ImportedWeights
from ditserve.model.weights.official import WeightsError, to_official
from ditserve.model.weights.stored import load_weights


def write_bundle(
    target: Path, imported: ImportedWeights, *, licence: str, classes: Sequence[str] = ()
) -> Manifest:
    """Write a bundle of weights, and of the autoencoder of a pipeline; the manifest keeps the import's notes.

    `classes` names the classes; unless given, the names of the source do, or else their numbers.

    Raises:
        WeightsError: the number of `classes` is not the model's, or the folder has no legal name for a
            bundle.
    """
    config = imported.config
    names = tuple(classes) or imported.classes or tuple(str(k) for k in range(config.classes[0]))
    if len(names) != config.classes[0]:
        raise WeightsError(f"{len(names)} class names for a model of {config.classes[0]} classes")
    height, width = config.image_size
    latent = imported.latents is not None or config.in_channels == 4
    try:
        manifest = Manifest(
            name=bundle_name(target),
            version="1",
            description=f"Diffusion Transformer over {height}×{width} latents, imported",
            config=config,
            diffusion=imported.diffusion or _published_diffusion(config, imported.guided_channels),
            factors=(Factor(name="label", classes=names),),
            decoder="sd-vae" if latent else "identity",
            latents=imported.latents,
            embedding_size=config.embedding_size,
            state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
            defaults=imported.defaults,
            licence=licence,
            provenance={"import": {"notes": list(imported.notes)}} if imported.notes else {},
        )
    except ValidationError as error:
        raise WeightsError(f"{target} cannot be a bundle: {wrong_field(error)[1]}") from None
    with replacement(target, BUNDLE) as scratch:
        weights = {name: _storable(tensor) for name, tensor in imported.weights.items()}
        save_file(weights, scratch / WEIGHTS)
        (scratch / WEIGHTS).chmod(0o644)
        if imported.vae is not None:
            take_part(imported.vae, scratch / PIPELINE / VAE)
        write_manifest(scratch, manifest)
    return manifest


def _published_diffusion(config: DiTConfig, guided: int | None) -> DiffusionSpec:
    """Return the diffusion of the published models: linear, and the network predicts the noise."""
    return DiffusionSpec(
        schedule="linear",
        prediction="epsilon",
        learn_sigma=config.learn_sigma,
        clip_x0=False,
        guidance_channels=guided if guided and config.in_channels > guided else None,
    )


def _storable(tensor: Tensor) -> Tensor:
    """Return a tensor as a bundle keeps it: fp16 or fp32, and no view of a larger one."""
    kept = tensor if tensor.dtype in (torch.float16, torch.float32) else tensor.float()
    whole = kept.untyped_storage().nbytes() == kept.nbytes
    return kept.contiguous() if whole else kept.clone(memory_format=torch.contiguous_format)


def export_weights(bundle: Bundle, target: Path, layout: str) -> None:
    """Write the weights of a bundle: `layout` is "official" for a .pt file, "diffusers" for a folder.

    Raises:
        WeightsError: the layout cannot hold the model.
        BundleError: the bundle has no weights.
    """
    weights, config = load_weights(bundle), bundle.manifest.config
    if not isinstance(config, DiTConfig):
        raise WeightsError(f"{bundle.path} holds a U-Net: the layouts are those of a DiT")
    if layout == "official":
        check_new_file(target)
        content = io.BytesIO()
        torch.save(to_official(weights, config), content)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content.getvalue())
        return
    with replacement(target, DIFFUSERS, apart=(bundle.path,)) as scratch:
        state, fields = to_diffusers(weights, config)
        save_file(state, scratch / f"{DIFFUSERS_NAME}.safetensors")
        (scratch / f"{DIFFUSERS_NAME}.safetensors").chmod(0o644)
        write_atomic(scratch / DIFFUSERS_CONFIG, (json.dumps(fields, indent=2) + "\n").encode())
