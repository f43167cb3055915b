"""The parts of a diffusers pipeline's folder, checked before they are read or taken along.

A part that cannot be used is refused with one sentence that names the file; pickled weights are never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.pipeline_config import INDEX, TOKENIZER, PipelineFamily

# The parts of a pipeline that drawing from a prompt needs.
KINDS = r"transformer|vae|scheduler|(text_encoder|tokenizer)(_\d+)?"
SHARDS = "*.safetensors.index*.json"
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5"})
# The files of a tokenizer, one of which holds its tokens.
VOCABULARIES = (TOKENIZER, "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


class PipelineFolderError(ModelError):
    """A folder that cannot be brought in; the message is one sentence that names the file."""


def needed_parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the folders of the parts that the pipeline has and that drawing from a prompt needs."""
    return tuple(sorted(name for name, value in index.items() if re.fullmatch(KINDS, name) and any(value)))


def check_index(file: Path, index: Mapping[str, Any], family: PipelineFamily) -> None:
    """Refuse an index whose parts are not as diffusers writes and reads them."""
    largest = (family.tokenizer, family.tokenizer.replace("tokenizer", "text_encoder"))
    for name in ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", *largest):
        if name not in index:
            raise PipelineFolderError(f"{file} says nothing of {name}: [null, null] says that there is none")
    parts = {name: value for name, value in index.items() if re.fullmatch(KINDS, name)}
    for name, value in parts.items():
        if not (isinstance(value, list) and len(value) == 2):
            raise PipelineFolderError(
                f"{file}: {name} must be a list of a library and a class, not {str(value)[:80]}"
            )


def check_part(folder: Path) -> None:
    """Refuse a part that is missing, or whose weights are pickled, missing or in shards of two kinds.

    A tokenizer must have its vocabulary: without, transformers makes one that knows no word.
    """
    if not folder.is_dir():
        raise PipelineFolderError(f"{folder} is missing, though {folder.parent / INDEX} names it")
    if folder.name.startswith("tokenizer") and not any((folder / name).is_file() for name in VOCABULARIES):
        raise PipelineFolderError(f"{folder} has no {TOKENIZER}, nor another vocabulary: get or save it")
    if folder.name.startswith(("scheduler", "tokenizer")):
        return
    weights = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    if not weights:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        reason = f"only {pickled[0]}, and pickled weights are never read: save" if pickled else "none: get"
        raise PipelineFolderError(f"{folder} needs weights in safetensors and has {reason} them as that")
    indices = list(folder.glob(SHARDS))
    if not indices and all(re.search(r"-\d+-of-\d+\.", file.name) for file in weights):
        raise PipelineFolderError(f"{folder} has weights in shards, and no .safetensors.index.json of them")
    for file in indices:
        shards = read_json(file).get("weight_map")
        if not isinstance(shards, dict):
            raise PipelineFolderError(f"{file} must have an object weight_map")
        missing = sorted({str(name) for name in shards.values()} - {shard.name for shard in weights})
        if missing:
            raise PipelineFolderError(f"{folder / missing[0]} is missing, though {file.name} lists it")


def check_class(file: Path, fields: Mapping[str, Any], family: PipelineFamily) -> None:
    name = fields.get("_class_name")
    if name not in (family.transformer, family.earlier_transformer):
        raise PipelineFolderError(f"{file}: _class_name is {name}, not {family.transformer}")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise PipelineFolderError(f"{file} is missing: name the folder of a diffusers pipeline") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineFolderError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise PipelineFolderError(f"{file} must hold a JSON object")
    return content
