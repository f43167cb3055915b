"""A training run small enough for a test: 8×8 pictures of two factors, a two-block network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ditserve.model.train.config import TrainConfig


def write_pictures(file: Path, names: tuple[str, ...] = ("a", "b", "c"), size: int = 8) -> Path:
    """Write one picture of noise for every name in two styles."""
    pairs = [(y, s) for y in range(len(names)) for s in range(2)]
    rng = np.random.default_rng(0)
    np.savez(
        file,
        x=rng.integers(0, 256, (len(pairs), size, size, 3), dtype=np.uint8),
        y=np.array([y for y, _ in pairs]),
        s=np.array([s for _, s in pairs]),
        names=np.array(names),
        styles=np.array(["flat", "shaded"]),
    )
    return file


def tiny_run(folder: Path) -> dict[str, Any]:
    """Return the fields of a run over pictures written into `folder`."""
    return {
        "data": {"path": str(write_pictures(folder / "set.npz")), "hold_out": 0, "prefetch": 0},
        "output": str(folder / "run"),
        "model": {"patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2},
        "diffusion": {"schedule": "cosine", "prediction": "x0"},
        "steps": 12,
        "batch": 4,
        "warmup": 2,
        "checkpoint_every": 4,
        "sheet_every": 1000,
        "log_every": 1,
        "loss_cap": 5,
        "threads": 1,
    }


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**tiny_run(folder), **changes})


def newest_state(output: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's newest checkpoint, by file and name."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    return {
        f"{file.stem}.{key}": value.clone()
        for file in newest.glob("*.safetensors")
        for key, value in load_file(file).items()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def config_file(raw: dict[str, Any], folder: Path) -> str:
    """Write the fields into a file for `--config`."""
    file = folder / "run.json"
    file.write_text(json.dumps(raw))
    return str(file)
