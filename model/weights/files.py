"""Bundles of imported weights, and a bundle's weights in files of other projects' layouts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditserve.model.spec.bundle import (
    WEIGHTS,
    Bundle,
    Defaults,
    Factor,
    Manifest,
    StateTensor,
    bundle_name,
    write_atomic,
    write_manifest,
)
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.output_folder import BUNDLE, DIFFUSERS, check_new_file, replacement
from ditserve.model.weights.diffusers import to_diffusers
from ditserve.model.weights.imports import DIFFUSERS_CONFIG, DIFFUSERS_NAME, FLOWS, FlowKind
from ditserve.model.weights.official import WeightsError, to_official

# The published results at 256 px use 250 steps of DDPM at guidance 1.5; 50 of DDIM are as good (FID 2.26).
# `choose_grid` finds the grids of the other solvers and counts of steps.
DEFAULTS = Defaults(
    steps=50, solver="ddim", grid="ddim-stride", guidance_scale=1.5, guidance_interval=(0.0, 1.0)
)
# SiT and REPA publish 250 steps of an SDE; 50 steps of Euler's method are near it.
FLOW_DEFAULTS = DEFAULTS.model_copy(update={"solver": "euler", "grid": "uniform"})


def write_bundle(
    target: Path,
    weights: Mapping[str, Tensor],
    config: DiTConfig,
    *,
    licence: str,
    classes: Sequence[str] = (),
    notes: Sequence[str] = (),
    flow: FlowKind | None = None,
) -> Manifest:
    """Write a bundle of weights alone, for a latent model trained as published.

    The schedule is linear and the network predicts noise, unless it is of a kind of `flow`. `classes` names
    the classes; unless given, their numbers do. `notes` tell what was read and assumed at the import; the
    manifest keeps them.

    Raises:
        WeightsError: the number of `classes` is not the model's, or the folder has no legal name for a
            bundle.
    """
    names = tuple(classes) or tuple(str(k) for k in range(config.classes[0]))
    if len(names) != config.classes[0]:
        raise WeightsError(f"{len(names)} class names for a model of {config.classes[0]} classes")
    height, width = config.image_size
    try:
        manifest = Manifest(
            name=bundle_name(target),
            version="1",
            description=f"Diffusion Transformer over {height}×{width} latents, imported",
            config=config,
            diffusion=_diffusion(config, flow),
            factors=(Factor(name="label", classes=names),),
            decoder="sd-vae" if config.in_channels == 4 else "identity",
            embedding_size=config.embedding_size,
            state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
            defaults=DEFAULTS if flow is None else FLOW_DEFAULTS,
            licence=licence,
            provenance={"import": {"notes": list(notes)}} if notes else {},
        )
    except ValidationError as error:
        raise WeightsError(f"{target} cannot be a bundle: {error.errors()[0]['msg']}") from None
    with replacement(target, BUNDLE) as scratch:
        save_file({name: _storable(tensor) for name, tensor in weights.items()}, scratch / WEIGHTS)
        (scratch / WEIGHTS).chmod(0o644)
        write_manifest(scratch, manifest)
    return manifest


def _diffusion(config: DiTConfig, flow: FlowKind | None) -> DiffusionSpec:
    """Return the diffusion of imported weights."""
    if flow is not None:
        told = {"noise_scale": 1.0, "clip_x0": False, **FLOWS[flow]}
        return DiffusionSpec(schedule="flow", prediction="flow", **told)
    return DiffusionSpec(
        schedule="linear",
        prediction="epsilon",
        learn_sigma=config.learn_sigma,
        clip_x0=False,
        guidance_channels=3 if config.in_channels > 3 else None,
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
    weights, config = load_file(bundle.file(WEIGHTS)), bundle.manifest.config
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
