"""A minute of training: images a second by precision, of random pictures, on the network of the bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ditserve.bench.gpu.measuring import Measuring, main
from ditserve.bench.gpu.timing import synchronize
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "bf16 compiled": {"precision": "bf16", "compile": True},
}
# That of the shipped recipe, at a batch for a GPU.
NETWORK = {"patch_size": 8, "hidden_size": 192, "depth": 7, "num_heads": 3, "qk_norm": True}
TOY_NETWORK = {"patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
SIZE, BATCH, SECONDS = 64, 256, 12.0
TOY_SIZE, TOY_BATCH, TOY_SECONDS = 8, 4, 0.2
CLASSES, WARM_UP, BLOCK = 12, 3, 5


def measure(part: Measuring) -> None:
    for name, changes in KINDS.items():
        if not (part.toy and changes.get("compile")):
            part.point(name, partial(_rate, part, changes))


def _rate(part: Measuring, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train for a while; return the images a second and the last loss."""
    batch, limit = (TOY_BATCH, TOY_SECONDS) if part.toy else (BATCH, SECONDS)
    with TemporaryDirectory(prefix="dit-gpu-") as folder:
        trainer = Trainer(_config(part, Path(folder), batch, changes))
        for _ in range(WARM_UP):
            figures = trainer.step()
        synchronize(part.device)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < limit:
            for _ in range(BLOCK):
                figures = trainer.step()
            synchronize(part.device)
            steps += BLOCK
        seconds = time.perf_counter() - began
        trainer.close()
    return {"images_per_s": steps * batch / seconds, "steps": steps, "loss": float(figures["loss"])}


def _config(part: Measuring, folder: Path, batch: int, changes: Mapping[str, Any]) -> TrainConfig:
    fields: dict[str, Any] = {
        "data": {"path": str(_pictures(folder, TOY_SIZE if part.toy else SIZE)), "hold_out": 0},
        "output": str(folder / "run"),
        "model": TOY_NETWORK if part.toy else NETWORK,
        "diffusion": {"schedule": "cosine", "prediction": "x0"},
        "steps": 1_000_000,
        "batch": batch,
        "loss_cap": 5,
        "device": part.device,
    }
    return TrainConfig.model_validate({**fields, **changes})


def _pictures(folder: Path, size: int) -> Path:
    """Write pictures of noise, a hundred of each class."""
    random, count = np.random.default_rng(0), 100 * CLASSES
    file = folder / "set.npz"
    np.savez(
        file,
        x=random.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        y=np.arange(count) % CLASSES,
        s=np.zeros(count, np.int64),
        names=np.array([f"class {k}" for k in range(CLASSES)]),
        styles=np.array(["plain"]),
    )
    return file


if __name__ == "__main__":
    main("training", measure)
