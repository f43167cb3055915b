"""Files of weights in other projects' layouts: read into a bundle, and written from a bundle.

`model.weights.official` and `model.weights.diffusers` convert the tensors. Code in a pickle is never run.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditserve.model.spec.bundle import (
    WEIGHTS,
    Bundle,
    Defaults,
    DiffusionSpec,
    Factor,
    Manifest,
    StateTensor,
    write_atomic,
    write_manifest,
)
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.output_folder import BUNDLE, DIFFUSERS, check_new_file, replacement
from ditserve.model.weights.diffusers import Function, from_diffusers, to_diffusers
from ditserve.model.weights.official import Weights, WeightsError, from_official, to_official

DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# The published results at 256 px use 250 steps of DDPM at guidance 1.5; 50 of DDIM are as good (FID 2.26).
DEFAULTS = Defaults(steps=50, solver="ddim", grid="leading", guidance_scale=1.5, guidance_interval=(0.0, 1.0))


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The facts that a file of weights does not hold.

    `num_heads` and `image_size` are for shapes that are not published, `function` for diffusers' layout.
    """

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    function: Function = "published"


def read_weights(path: Path, options: ImportOptions) -> tuple[Weights, DiTConfig]:
    """Read weights and configuration from an official file, or from a folder or file of diffusers.

    In diffusers' layout `path` is the folder of the model, of a pipeline around it, or its weights file.

    Raises:
        WeightsError: there is nothing to read, or it does not fit.
    """
    folder = _diffusers_folder(path)
    if folder is None:
        return from_official(read_state(path), num_heads=options.num_heads, image_size=options.image_size)
    file = next((folder / name for name in DIFFUSERS_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} holds neither {' nor '.join(DIFFUSERS_WEIGHTS)}")
    try:
        fields = json.loads((folder / DIFFUSERS_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / DIFFUSERS_CONFIG} cannot be read: {error}") from None
    return from_diffusers(read_state(file), fields, function=options.function)


def _diffusers_folder(path: Path) -> Path | None:
    if path.is_file() and path.name in DIFFUSERS_WEIGHTS:
        return path.parent
    folders = (path / "transformer", path)
    return next((folder for folder in folders if (folder / DIFFUSERS_CONFIG).is_file()), None)


def read_state(path: Path) -> Weights:
    """Read the tensors of a .safetensors, .pt, .pth or .bin file.

    Of a training checkpoint it returns the averaged weights ("ema").

    Raises:
        WeightsError: unreadable, not plain tensors, or pickled code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The official trainer pickles its arguments beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason}") from None
    for part in ("ema", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(part), dict):
            stored = stored[part]
            break
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise WeightsError(f"{path} holds no state dict: it must map names to tensors")
    return cast(Weights, stored)


def write_bundle(
    target: Path,
    weights: Mapping[str, Tensor],
    config: DiTConfig,
    *,
    licence: str,
    classes: Sequence[str] = (),
) -> Manifest:
    """Write a bundle of weights alone, for a latent model trained as published.

    The schedule is linear, the network predicts noise. `classes` names the classes; unless given, their
    numbers do.

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
            name=re.sub(r"[^A-Za-z0-9._-]", "-", target.name),
            version="1",
            description=f"Diffusion Transformer over {height}×{width} latents, imported",
            config=config,
            diffusion=DiffusionSpec(
                schedule="linear",
                prediction="epsilon",
                learn_sigma=config.learn_sigma,
                clip_x0=False,
                guidance_channels=3 if config.in_channels > 3 else None,
            ),
            factors=(Factor(name="label", classes=names),),
            decoder="sd-vae" if config.in_channels == 4 else "identity",
            embedding_size=config.hidden_size,
            state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
            defaults=DEFAULTS,
            licence=licence,
        )
    except ValidationError as error:
        raise WeightsError(f"{target} cannot be a bundle: {error.errors()[0]['msg']}") from None
    with replacement(target, BUNDLE) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, scratch / WEIGHTS)
        write_manifest(scratch, manifest)
    return manifest


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
        save_file(state, scratch / DIFFUSERS_WEIGHTS[0])
        write_atomic(scratch / DIFFUSERS_CONFIG, (json.dumps(fields, indent=2) + "\n").encode())
