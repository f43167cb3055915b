"""Runs of several processes, one after another: `torchrun … -m tests.model.train.parallel_runs FILE`.

The start of the processes takes longer than all of their steps.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from ditserve.model.distributed.processes import join_processes
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.training import train

HALF_WAY = "checkpoints/step-0000002"


def runs(folder: Path, fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the fields of each run by its name: sharded, in tensor parallel, in a pipeline, or resumed."""
    sharded = {"parallel": {"mode": "fsdp"}, "ema": [0.9, 0.99], "accumulate": 2, "keep": 9}
    pipeline = {"parallel": {"pipeline": 2}, "accumulate": 2, "schedule": "constant", "embedding_l2": 0.01}
    few = {**fields, "steps": 4, "checkpoint_every": 2}
    made = {
        "straight": {**few, **sharded},
        "straight-resumed": {**few, **sharded},
        "pipeline": {**few, **pipeline, "sheet_every": 4},
        "pipeline-resumed": {**few, **pipeline},
        "tensor": {**few, "parallel": {"tensor": 2}, "sheet_every": 4},
    }
    return {name: {**run, "output": str(folder / name)} for name, run in made.items()}


def main(folder: Path) -> None:
    fields = json.loads((folder / "run.json").read_text())
    with join_processes("cpu") as world:
        for name, run in runs(folder, fields).items():
            if name.endswith("-resumed") and world.is_first:
                began = folder / name.removesuffix("-resumed")
                shutil.copytree(began / HALF_WAY, folder / name / HALF_WAY)
            # Nobody begins before the copy is there.
            world.all_agree(True)
            train(TrainConfig.model_validate(run), world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
