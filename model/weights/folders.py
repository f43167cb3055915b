"""Folders in diffusers' layout: of a model, or of the pipeline around it with scheduler and class names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ditserve.model.spec.pipeline_config import INDEX
from ditserve.model.spec.pipeline_folder import VAE, latent_spec
from ditserve.model.spec.table_schedulers import is_flow
from ditserve.model.weights.diffusers import CLASS_NAMES, Function, from_diffusers
from ditserve.model.weights.flows import FLOW_KINDS
from ditserve.model.weights.imported import (
    FLOW_DEFAULTS,
    ImportedWeights,
    ImportFunction,
    ImportOptions,
)
from ditserve.model.weights.official import TABLE, WeightsError
from ditserve.model.weights.schedulers import note_of_published, scheduler_flow
from ditserve.model.weights.state_files import check_numbers, is_index, read_state

DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_NAME = "diffusion_pytorch_model"
PUBLISHED = "published: timestep frequencies k/128 and epsilon 1e-6, as the official DiT computes"
AS_DIFFUSERS = "diffusers: timestep frequencies k/127 and epsilon 1e-5, as diffusers computes"


def read_folder(folder: Path, path: Path, options: ImportOptions) -> ImportedWeights:
    """Read the model in a folder of diffusers; `path` is what the user named, perhaps a file in it.

    Raises:
        WeightsError: it is no DiT, its parts contradict each other or the options, or leave a question open.
    """
    fields = _read_json(folder / DIFFUSERS_CONFIG)
    name = fields.get("_class_name", CLASS_NAMES[0])
    if name not in CLASS_NAMES:
        raise WeightsError(f"{folder} holds a {name}: only a DiT ({', '.join(CLASS_NAMES)}) can be imported")
    file = folder.parent / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(file) if file.is_file() else {}
    flow = is_flow(scheduler)
    notes = () if flow or not scheduler else note_of_published(file, scheduler)
    stored = read_state(path if path.is_file() else _diffusers_weights(folder))
    if flow and options.predicts_noise:
        raise WeightsError(f"{file} is of a flow: leave out --predicts-noise")
    check_numbers(path, stored.tensors)
    function, note = _function(folder, fields, options.function, flow=flow)
    weights, config = from_diffusers(stored.tensors, fields, function=function)
    if options.num_heads not in (None, config.num_heads):
        raise WeightsError(f"{folder / DIFFUSERS_CONFIG} says {config.num_heads} heads: leave out --heads")
    if options.image_size not in (None, config.image_size):
        side = config.image_size[0]
        raise WeightsError(f"{folder / DIFFUSERS_CONFIG} says a size of {side}x{side}: leave out --size")
    rows = weights[TABLE].shape[0]
    if options.num_classes not in (None, rows - 1):
        raise WeightsError(f"{folder} has {rows - 1} classes and the null class, not {options.num_classes}")
    imported = ImportedWeights(weights, config, (*notes, note), _class_names(folder.parent, rows - 1))
    vae = folder.parent / VAE
    if (folder.parent / INDEX).is_file() and vae.is_dir():
        imported = replace(imported, vae=vae, latents=latent_spec(vae))
    if function == "diffusers":
        # diffusers' pipeline guides all channels.
        imported = replace(imported, guided_channels=None)
    if not flow:
        return imported
    diffusion, told = scheduler_flow(file, scheduler, config)
    imported = replace(imported, notes=(*imported.notes, told))
    return replace(imported.without_variance(), diffusion=diffusion, defaults=FLOW_DEFAULTS)


def _function(
    folder: Path, fields: Mapping[str, Any], wanted: ImportFunction | None, *, flow: bool
) -> tuple[Function, str]:
    """Return the function that weights in diffusers' layout were trained as, and a note that tells it.

    Raises:
        WeightsError: it is not given, and the model is not the one that was converted from the release.
    """
    if wanted in FLOW_KINDS:
        raise WeightsError(f"{folder} is in diffusers' layout: --function {wanted} is for a file of {wanted}")
    if flow and wanted == "published":
        raise WeightsError(
            f"the scheduler beside {folder} is of a flow, which the official DiT is not: leave out --function"
        )
    if wanted == "published" or wanted == "diffusers":
        return wanted, f"the function is that of {PUBLISHED if wanted == 'published' else AS_DIFFUSERS}"
    if flow:
        return (
            "diffusers",
            f"the function is that of {AS_DIFFUSERS}, since the pipeline's scheduler is a flow's",
        )
    published = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
    published |= {"patch_size": 2, "num_embeds_ada_norm": 1000}
    if any(fields.get(name) != value for name, value in published.items()):
        raise WeightsError(
            f"{folder} does not tell the function that its weights were trained as: --function diffusers if "
            "they were trained with diffusers, --function published if they were converted from the official "
            "DiT"
        )
    return "published", (
        f"the function is taken as {PUBLISHED}, since DiT-XL/2 of 1,000 classes was converted from the "
        "release; if it was trained with diffusers, import it with --function diffusers"
    )


def _class_names(pipeline: Path, count: int) -> tuple[str, ...]:
    """Return the class names in the index of a pipeline; empty if it has none for each class."""
    file = pipeline / "model_index.json"
    labels = _read_json(file).get("id2label") if file.is_file() else None
    if not isinstance(labels, dict) or set(labels) != {str(k) for k in range(count)}:
        return ()
    return tuple(str(labels[str(k)]) for k in range(count))


def diffusers_folder(path: Path) -> Path | None:
    """Return the folder of diffusers that a path is, contains or lies in; None: it has another layout."""
    if path.is_file() and path.name.startswith(DIFFUSERS_NAME):
        return path.parent
    folders = (path / "transformer", path)
    return next((folder for folder in folders if (folder / DIFFUSERS_CONFIG).is_file()), None)


def _diffusers_weights(folder: Path) -> Path:
    """Return the file of weights in a folder, or the index of its shards; full precision before variants.

    Raises:
        WeightsError: there is none, or there are several variants.
    """
    kinds = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for kind in kinds:
        if (folder / f"{DIFFUSERS_NAME}{kind}").is_file():
            return folder / f"{DIFFUSERS_NAME}{kind}"
    files = [file for file in sorted(folder.glob(f"{DIFFUSERS_NAME}*")) if "-of-" not in file.name]
    variants = [file for file in files if file.suffix in (".safetensors", ".bin") or is_index(file)]
    if len(variants) != 1:
        found = ": choose one of " + ", ".join(file.name for file in variants) if variants else ""
        raise WeightsError(f"{folder} holds no {DIFFUSERS_NAME}.safetensors, .bin or index of shards{found}")
    return variants[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise WeightsError(f"{file} must hold a JSON object")
    return fields
