"""Files of weights, read without running pickled code: one file, shards, or a training checkpoint.

A file may wrap its tensors: in the parts of a training checkpoint (the average is taken), or under prefixes
that wrappers of modules leave. The arguments that a trainer saved beside them are read too.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ditserve.model.weights.official import Weights, WeightsError

# Parts of a training checkpoint that hold tensors, the best first.
PARTS = ("ema", "ema_model", "model_ema", "state_dict_ema", "model", "state_dict", "module")
# What wrappers (data parallel, torch.compile, EMA modules, Lightning) put before every name.
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "model.", "net.")


@dataclass(frozen=True, slots=True)
class StoredState:
    """The tensors of a file by name, and the arguments of the training; empty if the file has none."""

    tensors: Weights
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_state(path: Path) -> StoredState:
    """Read a .safetensors, .pt, .pth or .bin file, or all shards of an index (.index.json).

    Raises:
        WeightsError: unreadable, not plain tensors, pickled code, or a missing shard.
    """
    if is_index(path):
        return StoredState(_plain(path, _read_shards(path)))
    stored = read_stored(path)
    # The trainers of DiT, SiT and REPA name their arguments so, and that of LightningDiT its configuration.
    arguments = stored.get("args", stored.get("config")) if isinstance(stored, dict) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return StoredState(_plain(path, stored), arguments if isinstance(arguments, dict) else {})


def is_index(path: Path) -> bool:
    """Return True for an index of shards, such as model.safetensors.index.json or ….index.fp16.json."""
    return re.search(r"\.index(\.\w+)?\.json$", path.name) is not None


def read_stored(path: Path) -> Any:
    """Return what a file stores, as it is, without running pickled code.

    Raises:
        WeightsError: it is unreadable, or holds pickled code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The official trainers pickle their arguments beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, so that the optimiser's tensors are not read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason}") from None


def _read_shards(index: Path) -> Weights:
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} cannot be read as an index of shards: {error}") from None
    tensors: Weights = {}
    for name in sorted(map(str, files)):
        if Path(name).name != name:
            raise WeightsError(f"{index} names a shard outside of its folder: {name}")
        tensors |= _plain(index.parent / name, read_stored(index.parent / name))
    return tensors


def _plain(path: Path, stored: Any) -> Weights:
    """Return the tensors in what a file stores, by their names without prefixes."""
    while isinstance(stored, dict):
        part = next((part for part in PARTS if isinstance(stored.get(part), dict)), None)
        if part is None:
            break
        stored = stored[part]
    if not isinstance(stored, dict) or not stored or not all(isinstance(name, str) for name in stored):
        raise WeightsError(f"{path} holds no state dict: it must map names to tensors")
    # A module that keeps an average holds the network twice, and counters beside it.
    averaged = {name: value for name, value in stored.items() if name.startswith("ema_model.")}
    state = averaged or stored
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(
            f"{path} holds no state dict: it must map names to tensors, and {others[0]} is none"
        )
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # Lightning and torch.compile also leave a prefix in the middle of a name.
    return {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): tensor for name, tensor in state.items()}


def check_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless all tensors of a file are floating point and finite."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"{path}: {name} is of {tensor.dtype}: take weights in floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{path}: {name} holds NaN or infinite numbers: take an intact checkpoint")
