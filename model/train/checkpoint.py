"""Training state on disk: safetensors and JSON, written atomically. Nothing is pickled.

<run>/checkpoints/step-0001200/{model,ema,optimizer}.safetensors
                               ema-0.9999.safetensors              a second average
                               state.json

A run resumes from the newest checkpoint that is valid. Where a network is distributed, each process
writes files of its own (`model.train.tensor_shards`), and any number of processes can read them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ditserve.model.distributed.parallel import ParallelNetwork, local_tensor
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.ema import Ema
from ditserve.model.train.identity import differences
from ditserve.model.train.tensor_shards import make_index, read_shards, write_shards

COUNTERS = ("step", "skipped", "failures", "rollbacks")
Tensors = Mapping[str, Tensor]


class CheckpointError(ModelError):
    """A checkpoint that does not fit or cannot be written; the message is one sentence naming the folder."""


@dataclass(slots=True)
class TrainingState:
    """All that a resumed run needs besides its config.

    Random numbers are functions of (seed, rollbacks, step). `skipped` counts the steps whose gradient was not
    finite; `failures` counts those in a row up to now.
    """

    parallel: ParallelNetwork
    optimizer: torch.optim.Optimizer
    ema: Ema
    scaler: torch.amp.GradScaler
    step: int = 0
    skipped: int = 0
    failures: int = 0
    rollbacks: int = 0

    @property
    def model(self) -> nn.Module:
        """The network in training, as far as this process holds it."""
        return self.parallel.network

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors by section and name; optimiser state is named `<number of parameter>.<what>`."""
        optimizer = {
            f"{number}.{key}": value
            for number, parameter in enumerate(self.model.parameters())
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        averages = dict(zip(self.average_names(), self.ema.averages.values(), strict=True))
        return {"model": self.model.state_dict(), "optimizer": optimizer, **averages}

    def sections(self) -> list[str]:
        """Return the names of the sections, which are those of the files."""
        return ["model", "optimizer", *self.average_names()]

    def average_names(self) -> list[str]:
        """Return the sections of the averages: "ema" for the first, "ema-<decay>" for the others."""
        return [f"ema-{decay}" if number else "ema" for number, decay in enumerate(self.ema.averages)]

    def is_finite(self) -> bool:
        """Return True if no number of any process is NaN or infinite."""
        tensors = chain.from_iterable(section.values() for section in self.tensors().values())
        finite = all(bool(torch.isfinite(local_tensor(tensor)).all()) for tensor in tensors)
        return self.parallel.world.all_agree(finite)

    @torch.no_grad()
    def load(self, sections: Mapping[str, Tensors], saved: Mapping[str, Any]) -> None:
        """Restore the tensors and counters of a checkpoint: what `tensors()` returned, and its state.json."""
        self.model.load_state_dict(sections["model"])
        for name, average in zip(self.average_names(), self.ema.averages.values(), strict=True):
            for key, tensor in average.items():
                tensor.copy_(sections[name][key])
        parameters = list(self.model.parameters())
        self.optimizer.state.clear()
        for name, value in sections["optimizer"].items():
            number, key = name.split(".", 1)
            parameter = parameters[int(number)]
            self.optimizer.state[parameter][key] = value.to(parameter.device)
        self.ema.updates = saved["ema_updates"]
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        for counter in COUNTERS:
            setattr(self, counter, saved.get(counter, 0))


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest last; other files that a user keeps there are ignored."""
    paths = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, which its name tells."""
    return int(path.name.removeprefix("step-"))


def save(folder: Path, state: TrainingState, identity: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write `folder/step-N`, make it visible by one rename when complete, and drop all but the newest `keep`.

    Raises:
        CheckpointError: it cannot be written; earlier checkpoints are intact.
    """
    target = folder / f"step-{state.step:07d}"
    scratch, world = folder / f".writing-{target.name}", state.parallel.world
    for phase in (_begin, _write, _publish):
        failure: OSError | SafetensorError | None = None
        try:
            if world.is_first or phase is _write:
                phase(scratch, target, state, identity)
        except (OSError, SafetensorError) as error:
            failure = error
        if not world.all_agree(failure is None):
            with suppress(OSError):
                shutil.rmtree(scratch)
            reason = failure.strerror if isinstance(failure, OSError) else failure or "by another process"
            raise CheckpointError(
                f"{target} cannot be written ({reason}): make room or choose another output; "
                "earlier checkpoints are intact"
            )
    if world.is_first:
        # Checkpoints of later steps were damaged, or the run was rolled back past them.
        paths = checkpoints(folder)
        valid = paths[: paths.index(target) + 1]
        for path in {*paths} - {*valid[-keep:]}:
            shutil.rmtree(path)
    return target


def _begin(scratch: Path, target: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    # A run that was killed may have left such folders.
    for leftover in scratch.parent.glob(".writing-*"):
        shutil.rmtree(leftover)
    scratch.mkdir(parents=True)


def _write(scratch: Path, target: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    for file in write_shards(scratch, state.parallel, state.tensors()):
        _sync(file)


def _publish(scratch: Path, target: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    fields = {counter: getattr(state, counter) for counter in COUNTERS}
    fields |= {"ema_updates": state.ema.updates, "scaler": state.scaler.state_dict()}
    fields |= {"index": make_index(state.parallel, state.tensors())}
    (scratch / "state.json").write_text(json.dumps({**identity, **fields}, indent=1))
    _sync(scratch / "state.json")
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    _sync(target.parent)


def check_room(folder: Path, state: TrainingState, *, keep: int) -> None:
    """Refuse a disk without room for `keep` checkpoints and the one being written.

    Raises:
        CheckpointError: the disk has too little room; the message names the folder.
    """
    weights = 4 * state.parallel.parameter_count
    # A checkpoint holds the weights, two moments, and the averages.
    needed = (keep + 1) * weights * (3 + len(state.ema.averages))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 2**20:.0f} MiB free, and {keep} checkpoints need {needed / 2**20:.0f}: "
            "make room, or keep fewer"
        )


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore(
    folder: Path, state: TrainingState, identity: Mapping[str, Any], *, notice: Callable[[str], None] = print
) -> Path | None:
    """Load the newest readable checkpoint in `folder` into `state`. Return its path; None if there is none.

    `notice` is called with a sentence for each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or none of several can be read.
    """
    paths, world = checkpoints(folder)[::-1], state.parallel.world
    if not world.all_equal(len(paths)):
        raise CheckpointError(
            f"{folder} is not the same to all processes: choose an output on a disk that their machines share"
        )
    for path in paths:
        damage: Exception | None = None
        try:
            saved = json.loads((path / "state.json").read_text())
            check_identity(path, saved, identity)
            sections = {
                section: read_shards(path, state.parallel, section, saved.get("index"))
                for section in state.sections()
            }
        except (OSError, ValueError, SafetensorError) as error:
            damage = error
        if world.all_agree(damage is None):
            state.load(sections, saved)
            return path
        reason = str(damage or "another process cannot read its files").splitlines()[0]
        notice(f"{path} is passed over, it is damaged: {reason}")
    if paths:
        raise CheckpointError(
            f"{folder} holds no checkpoint that can be read: move it away to start from the beginning"
        )
    return None


def check_identity(path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run. Fields that the checkpoint lacks are not compared.

    Raises:
        CheckpointError: a field differs; the message names the first.
    """
    known = {key: identity[key] for key in identity if key in saved}
    if "diffusion" in known:
        known["diffusion"] = {
            key: value for key, value in known["diffusion"].items() if key in saved["diffusion"]
        }
    for field, was, now in differences(saved, known):
        if field.startswith("content"):
            numbers = field.partition(".")[2]
            raise CheckpointError(
                f"{path} was trained with other pictures: those numbered {numbers} in the data were replaced "
                "since: take the old ones back, or another output, with init to go on from here"
            )
        raise CheckpointError(
            f"{path} was trained with another {field} ({was}, not {now}): take that one back, or another "
            "output, with init to go on from here"
        )


def saved_identity(folder: Path) -> Mapping[str, Any] | None:
    """Return the identity in the newest readable checkpoint of a folder; None if there is none."""
    for path in checkpoints(folder)[::-1]:
        with suppress(OSError, ValueError):
            saved: dict[str, Any] = json.loads((path / "state.json").read_text())
            return saved
    return None
