"""Weights of other projects, read into ours: what a file tells is taken, what it leaves open is asked for.

Two questions stay open in a bare file of weights. The published DiT, which predicts the noise, and SiT and
REPA, which predict a velocity, have the same names and shapes. So the network is tried: told that its input
is pure noise, one that predicts the noise gives its input back; of a flow it must be said which. And a table
of N rows holds N classes, or N − 1 and the null class. `model.weights.official` and `model.weights.diffusers`
convert the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import network_of
from ditserve.model.spec.dit_config import SIZES, DiTConfig
from ditserve.model.weights.diffusers import CLASS_NAMES, Function, from_diffusers
from ditserve.model.weights.official import TABLE, Weights, WeightsError, from_official, without_variance
from ditserve.model.weights.state_files import is_index, read_state

DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_NAME = "diffusion_pytorch_model"
IMAGENET = 1000
# The cosine of the angle between pure noise and its prediction, from which a network predicts the noise.
NOISE_COSINE = 0.9
PUBLISHED = "published: timestep frequencies k/128 and epsilon 1e-6, as the official DiT computes"
AS_DIFFUSERS = "diffusers: timestep frequencies k/127 and epsilon 1e-5, as diffusers computes"


FlowKind = Literal["sit", "repa"]
ImportFunction = Literal["published", "diffusers", "sit", "repa"]
# What a flow's network is told, and the sign of its output. SiT's time runs from noise, 0, to image, 1, and
# its velocity to the image (Ma et al., arXiv:2401.08740); REPA's run the other way (arXiv:2410.06940).
FLOWS: Mapping[FlowKind, Mapping[str, Any]] = MappingProxyType(
    {
        "sit": {"noise_input": "1-sigma", "output_sign": -1, "guidance_channels": 3},
        "repa": {"noise_input": "sigma", "output_sign": 1, "guidance_channels": None},
    }
)
# How the trainers name a linear path with a velocity: (path_type, prediction).
_LINEAR: Mapping[tuple[str, str], FlowKind]
_LINEAR = MappingProxyType({("Linear", "velocity"): "sit", ("linear", "v"): "repa"})


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The facts that a file of weights may not hold; None leaves them to the file.

    `num_heads` and `image_size` are for shapes that are not published, `num_classes` for a class table,
    `predicts_noise` for weights that do not look as if they did. `function` is "published" or "diffusers" for
    diffusers' layout, and in the official layout "sit" or "repa" for a flow.
    """

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    function: ImportFunction | None = None
    num_classes: int | None = None
    predicts_noise: bool = False


@dataclass(frozen=True, slots=True)
class ImportedWeights:
    """Weights in our layout, their configuration, and names of the classes if the source has them.

    `flow` is the kind of flow, None for the published diffusion. `notes` are sentences that tell what was
    read and what was assumed.
    """

    weights: Weights
    config: DiTConfig
    notes: tuple[str, ...]
    classes: tuple[str, ...] = ()
    flow: FlowKind | None = None


def read_weights(path: Path, options: ImportOptions) -> ImportedWeights:
    """Read an official file, or a folder or file of diffusers.

    In diffusers' layout `path` is the folder of the model, of a pipeline around it, or its weights file.

    Raises:
        WeightsError: there is nothing to read, it does not fit, or it leaves a question open.
    """
    folder = _diffusers_folder(path)
    if folder is not None:
        imported = _read_diffusers(folder, path, options)
    elif path.is_dir():
        raise WeightsError(f"{path} is no diffusers folder: it holds no {DIFFUSERS_CONFIG}")
    else:
        imported = _read_official(path, options)
    _check_finite(path, imported.weights)
    return _with_prediction(path, imported, options)


def _read_official(path: Path, options: ImportOptions) -> ImportedWeights:
    if options.function == "diffusers":
        raise WeightsError(
            f"{path} is in the official layout: --function diffusers is for a diffusers folder"
        )
    stored = read_state(path)
    flow, notes = _told_function(path, stored.arguments, options)
    state = {name: tensor for name, tensor in stored.tensors.items() if not name.startswith("projectors.")}
    if len(state) < len(stored.tensors) and not (notes or flow or options.predicts_noise):
        raise WeightsError(
            f"{path} carries the projectors of REPA, which trains SiT by flow matching: --function repa "
            "imports that, --predicts-noise a DiT that was trained with REPA"
        )
    weights, config = from_official(state, num_heads=options.num_heads, image_size=options.image_size)
    _check_arguments(path, stored.arguments, config)
    told = stored.arguments.get("num_classes")
    _check_null_row(path, config, options.num_classes or (told if isinstance(told, int) else None))
    if flow is not None and config.learn_sigma:
        weights, config = without_variance(weights, config)
        notes += ("the second half of its outputs, which SiT never uses, is left out",)
    return ImportedWeights(weights, config, notes, flow=flow)


def _told_function(
    path: Path, arguments: Mapping[str, Any], options: ImportOptions
) -> tuple[FlowKind | None, tuple[str, ...]]:
    """Return the kind of flow that options or a trainer's arguments tell, and notes; no notes: neither does.

    Raises:
        WeightsError: the arguments tell a flow that is not in FLOWS, or not which, or the option differs.
    """
    wanted = next((kind for kind in get_args(FlowKind) if kind == options.function), None)
    prediction, path_type = arguments.get("prediction"), arguments.get("path_type")
    model = str(arguments.get("model", ""))
    if path_type is None and prediction in (None, "epsilon", "eps", "noise") and not model.startswith("SiT"):
        if prediction is not None or model.startswith("DiT"):
            if wanted is not None:
                raise WeightsError(f"{path} says that it predicts the noise: leave out --function {wanted}")
            return None, (f"the file's own arguments say that it predicts the noise ({model or prediction})",)
        return wanted, () if wanted is None else (f"it is a flow as {wanted} trains, as --function says",)
    told = {"model": model or None, "prediction": prediction, "path_type": path_type}
    words = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
    kind = _LINEAR.get((str(path_type), str(prediction)), wanted)
    if path_type not in (None, "Linear", "linear") or prediction not in (None, "velocity", "v"):
        raise WeightsError(
            f"{path} was trained on another flow ({words} in its own arguments): only a linear path with a "
            "velocity can be imported"
        )
    if kind is None:
        raise WeightsError(
            f"{path} was trained as a flow ({words} in its own arguments), which does not tell its time: "
            "--function sit if the time is 0 for noise, --function repa if it is 1"
        )
    if wanted not in (None, kind):
        raise WeightsError(f"{path} is a flow as {kind} trains ({words} in its own arguments), not {wanted}")
    return kind, (f"it is a flow as {kind} trains ({words} in its own arguments)",)


def _check_arguments(path: Path, arguments: Mapping[str, Any], config: DiTConfig) -> None:
    """Refuse weights that are not of the size that the trainer's `model`, such as "DiT-XL/2", names."""
    name, _, patch = re.sub("^[DS]iT-", "", str(arguments.get("model", ""))).partition("/")
    if name not in SIZES or not patch.isdecimal():
        return
    named, found = (
        (*SIZES[name], int(patch)),
        (config.depth, config.hidden_size, config.num_heads, config.patch_size),
    )
    if named != found:
        raise WeightsError(
            f"{path} says that it is a {arguments['model']} (depth, width, heads, patch: {named}), and its "
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


def _check_finite(path: Path, weights: Weights) -> None:
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"{path}: {name} is of {tensor.dtype}: take weights in floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{path}: {name} holds NaN or infinite numbers: take an intact checkpoint")


def _with_prediction(path: Path, imported: ImportedWeights, options: ImportOptions) -> ImportedWeights:
    """Return `imported` with a note that tells why the network is taken to predict the noise."""
    if imported.flow is not None or any("predicts the noise" in note for note in imported.notes):
        return imported
    if options.predicts_noise:
        note = "it predicts the noise, as --predicts-noise says"
    else:
        cosine = noise_cosine(imported.weights, imported.config)
        if cosine < NOISE_COSINE:
            raise WeightsError(
                f"{path} does not tell what it predicts, and given pure noise its output is not that noise "
                f"(cosine {cosine:.2f}, {NOISE_COSINE} is asked for): say --function sit or --function repa "
                "for a flow; --predicts-noise imports a DiT that is hardly trained all the same"
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


def _read_diffusers(folder: Path, path: Path, options: ImportOptions) -> ImportedWeights:
    fields = _read_json(folder / DIFFUSERS_CONFIG)
    name = fields.get("_class_name", CLASS_NAMES[0])
    if name not in CLASS_NAMES:
        raise WeightsError(f"{folder} holds a {name}: only a DiT ({', '.join(CLASS_NAMES)}) can be imported")
    notes = _notes_of_scheduler(folder.parent / "scheduler" / "scheduler_config.json")
    stored = read_state(path if path.is_file() else _diffusers_weights(folder))
    function, note = _function(folder, fields, options.function)
    weights, config = from_diffusers(stored.tensors, fields, function=function)
    if options.num_heads not in (None, config.num_heads):
        raise WeightsError(f"{folder / DIFFUSERS_CONFIG} says {config.num_heads} heads: leave out --heads")
    rows = weights[TABLE].shape[0]
    if options.num_classes not in (None, rows - 1):
        raise WeightsError(f"{folder} has {rows - 1} classes and the null class, not {options.num_classes}")
    return ImportedWeights(weights, config, (*notes, note), _class_names(folder.parent, rows - 1))


def _function(folder: Path, fields: Mapping[str, Any], wanted: ImportFunction | None) -> tuple[Function, str]:
    """Return the function that weights in diffusers' layout were trained as, and a note that tells it.

    Raises:
        WeightsError: it is not given, and the model is not the one that was converted from the release.
    """
    if wanted in ("sit", "repa"):
        raise WeightsError(f"{folder} is in diffusers' layout: --function {wanted} is for a file of {wanted}")
    if wanted == "published" or wanted == "diffusers":
        return wanted, f"the function is that of {PUBLISHED if wanted == 'published' else AS_DIFFUSERS}"
    published = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
    published |= {"patch_size": 2, "num_embeds_ada_norm": IMAGENET}
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


def _notes_of_scheduler(file: Path) -> tuple[str, ...]:
    """Return what the scheduler of a pipeline tells; nothing if there is none.

    Raises:
        WeightsError: it is of another diffusion than the published.
    """
    if not file.is_file():
        return ()
    fields = _read_json(file)
    needed = {
        "prediction_type": "epsilon",
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
    }
    wrong = [f"{name} {fields[name]}" for name, value in needed.items() if fields.get(name, value) != value]
    if "Flow" in str(fields.get("_class_name")):
        wrong.append(f"_class_name {fields['_class_name']}")
    if wrong:
        raise WeightsError(f"{file} is not of the published diffusion: {', '.join(wrong)} cannot be imported")
    return (
        ("the pipeline's scheduler says that it predicts the noise",) if "prediction_type" in fields else ()
    )


def _class_names(pipeline: Path, count: int) -> tuple[str, ...]:
    """Return the class names in the index of a pipeline; empty if it has none for each class."""
    file = pipeline / "model_index.json"
    labels = _read_json(file).get("id2label") if file.is_file() else None
    if not isinstance(labels, dict) or set(labels) != {str(k) for k in range(count)}:
        return ()
    return tuple(str(labels[str(k)]) for k in range(count))


def _diffusers_folder(path: Path) -> Path | None:
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
