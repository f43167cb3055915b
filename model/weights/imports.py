"""Weights of other projects, read into ours: what a file tells is taken, what it leaves open is asked for.

Two questions stay open in a bare file of weights. The published DiT, which predicts the noise, and SiT and
REPA, which predict a velocity, have the same names and shapes. So the network is tried: told that its input
is pure noise, one that predicts the noise gives its input back; of a flow it must be said which. And a table
of N rows holds N classes, or N − 1 and the null class. `model.weights.official` and `model.weights.diffusers`
convert the tensors.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import network_of
from ditserve.model.spec.dit_config import SIZES, DiTConfig
from ditserve.model.weights.extensions import fold_extensions
from ditserve.model.weights.flows import FLOW_KINDS, FlowKind, TrainerArguments, flow_diffusion, told_flow
from ditserve.model.weights.folders import DIFFUSERS_CONFIG, diffusers_folder, read_folder
from ditserve.model.weights.imported import FLOW_DEFAULTS, ImportedWeights, ImportOptions
from ditserve.model.weights.lightningdit import (
    LIGHTNING_SIZES,
    LightningConfig,
    latent_spec,
    lightning_config,
)
from ditserve.model.weights.official import Weights, WeightsError, from_official
from ditserve.model.weights.state_files import check_numbers, read_state

# The classes of the published models.
IMAGENET = 1000
# The cosine of the angle between pure noise and its prediction, from which a network predicts the noise.
NOISE_COSINE = 0.9


def read_weights(path: Path, options: ImportOptions) -> ImportedWeights:
    """Read an official file, or a folder or file of diffusers.

    In diffusers' layout `path` is the folder of the model, of a pipeline around it, or its weights file.

    Raises:
        WeightsError: there is nothing to read, it does not fit, or it leaves a question open.
    """
    folder = diffusers_folder(path)
    if folder is not None:
        imported = read_folder(folder, path, options)
    elif path.is_dir():
        raise WeightsError(f"{path} is no diffusers folder: it holds no {DIFFUSERS_CONFIG}")
    else:
        imported = _read_official(path, options)
    return _with_prediction(path, imported, options)


def _read_official(path: Path, options: ImportOptions) -> ImportedWeights:
    if options.function == "diffusers":
        raise WeightsError(
            f"{path} is in the official layout: --function diffusers is for a diffusers folder"
        )
    stored = read_state(path)
    lightning = lightning_config(path, stored.arguments)
    arguments = lightning.arguments if lightning else TrainerArguments.of(stored.arguments)
    wanted = next((kind for kind in FLOW_KINDS if kind == options.function), None)
    flow, notes = told_flow(path, arguments, wanted)
    if flow is not None and options.predicts_noise:
        raise WeightsError(f"{path}: {notes[0]}: leave out --predicts-noise")
    state = {name: tensor for name, tensor in stored.tensors.items() if not name.startswith("projectors.")}
    if len(state) < len(stored.tensors) and not (notes or flow or options.predicts_noise):
        raise WeightsError(
            f"{path} carries the projectors of REPA, which trains SiT by flow matching: --function repa "
            "imports that, --predicts-noise a DiT that was trained with REPA"
        )
    check_numbers(path, state)
    state, extensions = fold_extensions(state)
    weights, config = from_official(
        state, num_heads=options.num_heads, image_size=options.image_size, extensions=extensions
    )
    if extensions:
        notes += (f"its weights tell {', '.join(sorted(extensions))}",)
    _check_model(path, arguments.model or "", config)
    _check_null_row(path, config, options.num_classes or arguments.num_classes)
    imported = ImportedWeights(weights, config, notes)
    return imported if flow is None else _as_flow(path, imported, flow, lightning)


def _as_flow(
    path: Path, imported: ImportedWeights, flow: FlowKind, lightning: LightningConfig | None
) -> ImportedWeights:
    """Return the weights of a flow with its diffusion, its defaults and the normalisation of its latents."""
    imported = imported.without_variance()
    config, notes = imported.config, imported.notes
    defaults, grid, latents = FLOW_DEFAULTS, None, None
    if lightning is not None:
        lightning.check_network(path, config)
        defaults, grid = lightning.sampling(FLOW_DEFAULTS)
        low, high = defaults.guidance_interval
        notes += (
            f"its defaults are {defaults.steps} steps of Euler's method with a shift of "
            f"{grid.shift if grid else 1:.4g}, guided by {defaults.guidance_scale:g} where sigma is in "
            f"{low:g} … {high:g}",
        )
    if flow == "lightningdit":
        latents, note = latent_spec(path, lightning, config.in_channels)
        notes += (note,)
    diffusion = flow_diffusion(flow, config, grid)
    return replace(imported, notes=notes, diffusion=diffusion, defaults=defaults, latents=latents)


def _check_model(path: Path, model: str, config: DiTConfig) -> None:
    """Refuse weights that are not of the size that the trainer's `model`, such as "DiT-XL/2", names."""
    name, _, patch = re.sub("^(D|S|LightningD)iT-", "", model).partition("/")
    size = (SIZES | LIGHTNING_SIZES).get(name)
    if size is None or not patch.isdecimal():
        return
    named, found = (
        (*size, int(patch)),
        (config.depth, config.hidden_size, config.num_heads, config.patch_size),
    )
    if named != found:
        raise WeightsError(
            f"{path} says that it is a {model} (depth, width, heads, patch: {named}), and its "
            f"weights are of {found}"
        )


def _check_null_row(path: Path, config: DiTConfig, classes: int | None) -> None:
    """Refuse a class table that has no row for the null class, or that may have none.

    1,001 rows are the published ones. `classes` is the number that the user or the trainer's arguments tell.
    """
    rows = config.classes[0] + 1
    if classes is None and rows != IMAGENET + 1:
        raise WeightsError(
            f"the class table of {path} has {rows} rows, which may be {rows - 1} classes and the null class, "
            f"or {rows} classes: say the number of classes with --num-classes, or their names with --classes"
        )
    if classes is not None and classes == rows:
        raise WeightsError(
            f"the class table of {path} has {rows} rows for {rows} classes, and none for the null class: "
            "guidance needs it, so train with label dropout"
        )
    if classes is not None and classes != rows - 1:
        raise WeightsError(
            f"the class table of {path} has {rows} rows, and {classes} classes with the null class need "
            f"{classes + 1}"
        )


def _with_prediction(path: Path, imported: ImportedWeights, options: ImportOptions) -> ImportedWeights:
    """Return `imported` with a note that tells why the network is taken to predict the noise."""
    if imported.diffusion is not None or any("predicts the noise" in note for note in imported.notes):
        return imported
    if options.predicts_noise:
        note = "it predicts the noise, as --predicts-noise says"
    else:
        cosine = noise_cosine(imported.weights, imported.config)
        if cosine < NOISE_COSINE:
            raise WeightsError(
                f"{path} does not tell what it predicts, and given pure noise its output is not that noise "
                f"(cosine {cosine:.2f}, {NOISE_COSINE} is asked for): say --function sit, repa or "
                "lightningdit for a flow; --predicts-noise imports a DiT that is hardly trained all the same"
            )
        note = f"it predicts the noise: given pure noise, its output is that noise (cosine {cosine:.3f})"
    return replace(imported, notes=(*imported.notes, note))


@torch.no_grad()
def noise_cosine(weights: Weights, config: DiTConfig) -> float:
    """Return the cosine between pure noise at the last timestep of 1,000 and the network's output for it."""
    network = network_of(config, {name: tensor.float() for name, tensor in weights.items()})
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, config.in_channels, *config.image_size, generator=generator)
    output = network(noise, torch.tensor([999.0]), null_labels(config, 1))[:, : config.in_channels]
    return float(F.cosine_similarity(output.flatten(), noise.flatten(), dim=0))
