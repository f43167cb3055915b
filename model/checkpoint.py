"""Training state on disk: safetensors and JSON, written atomically; the newest valid one wins. Nothing is pickled.

<run>/checkpoints/step-0001200/{model,ema,optimizer}.safetensors  state.json
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.ema import Ema


class CheckpointError(Exception):
    """A checkpoint that does not fit; the message is one sentence naming the folder."""


@dataclass(slots=True)
class TrainingState:
    """All that a resumed run needs besides its config: random numbers are functions of (seed, step)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    step: int = 0


def save(folder: Path, state: TrainingState, meta: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `folder/step-N` completely, then make it visible by one rename, then drop all but the newest `keep`."""
    target = folder / f"step-{state.step:07d}"
    scratch = folder / f".writing-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.model.state_dict().items()}, scratch / "model.safetensors")
    save_file(state.ema.shadow, scratch / "ema.safetensors")
    save_file(_optimizer_tensors(state.optimizer), scratch / "optimizer.safetensors")
    (scratch / "state.json").write_text(
        json.dumps({**meta, "step": state.step, "ema_updates": state.ema.updates}, indent=1)
    )
    for file in scratch.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def restore(folder: Path, state: TrainingState, meta: dict[str, Any]) -> bool:
    """Load the newest readable checkpoint in `folder` into `state`; False if there is none.

    Raises:
        CheckpointError: the checkpoint belongs to another model configuration.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            saved = json.loads((path / "state.json").read_text())
            tensors = {
                part: load_file(path / f"{part}.safetensors") for part in ("model", "ema", "optimizer")
            }
        except (OSError, ValueError, SafetensorError):
            continue
        for key, value in meta.items():
            if saved.get(key) != value:
                raise CheckpointError(
                    f"{path} was written with another {key}: choose another output folder or the same {key}"
                )
        state.model.load_state_dict(tensors["model"])
        state.ema.shadow = {
            name: tensors["ema"][name] for name in state.ema.shadow
        }  # files are sorted, the average is not
        state.ema.updates = saved["ema_updates"]
        _load_optimizer(state.optimizer, tensors["optimizer"])
        state.step = saved["step"]
        return True
    return False


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        optimizer.state[parameters[int(index)]][key] = value
