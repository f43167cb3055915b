"""Training state on disk: safetensors and JSON, written atomically; the newest valid one wins. Nothing is pickled.

<run>/checkpoints/step-0001200/{model,ema,optimizer}.safetensors  state.json  and ema-0.9999.safetensors of a second average

Where processes share the parameters out, each writes files of its own (`model.blocks`), and any number of processes reads them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ditserve.model.distributed.parallel import Share, local
from ditserve.model.spec.errors import ModelError
from ditserve.model.train.ema import Ema
from ditserve.model.train.sharded import make_index, read, write

COUNTERS = ("step", "skipped", "failures", "rollbacks")
Tensors = Mapping[str, Tensor]


class CheckpointError(ModelError):
    """A checkpoint that does not fit or cannot be written; the message is one sentence naming the folder."""


@dataclass(slots=True)
class TrainingState:
    """All that a resumed run needs besides its config: random numbers are functions of (seed, rollbacks, step)."""

    share: Share
    optimizer: torch.optim.Optimizer
    ema: Ema
    scaler: torch.amp.GradScaler
    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    failures: int = 0  # of those, the ones in a row up to now
    rollbacks: int = 0

    @property
    def model(self) -> nn.Module:
        """The network that learns, as far as this process holds it."""
        return self.share.network

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything by file and name; what is kept per parameter is named `<its number>.<what>`."""
        per_parameter = {
            f"{number}.{key}": value
            for number, parameter in enumerate(self.model.parameters())
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        averages = dict(zip(self.averages(), self.ema.averages.values(), strict=True))
        return {"model": self.model.state_dict(), "optimizer": per_parameter, **averages}

    def parts(self) -> list[str]:
        """The names of the files."""
        return ["model", "optimizer", *self.averages()]

    def averages(self) -> list[str]:
        """The names of the averages' files."""
        return [f"ema-{decay}" if number else "ema" for number, decay in enumerate(self.ema.averages)]

    def finite(self) -> bool:
        """Whether no number of any process is NaN or infinite."""
        tensors = chain.from_iterable(part.values() for part in self.tensors().values())
        return self.share.world.agree(all(bool(torch.isfinite(local(each)).all()) for each in tensors))

    @torch.no_grad()
    def load(self, parts: Mapping[str, Tensors], saved: Mapping[str, Any]) -> None:
        """Take over what `tensors()` and the counters once were."""
        self.model.load_state_dict(parts["model"])
        for name, average in zip(self.averages(), self.ema.averages.values(), strict=True):
            for key, tensor in average.items():
                tensor.copy_(parts[name][key])
        parameters = list(self.model.parameters())
        self.optimizer.state.clear()
        for name, value in parts["optimizer"].items():
            number, key = name.split(".", 1)
            parameter = parameters[int(number)]
            self.optimizer.state[parameter][key] = value.to(parameter.device)
        self.ema.updates = saved["ema_updates"]
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        for counter in COUNTERS:
            setattr(self, counter, saved.get(counter, 0))


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run's folder, the newest last; nothing else that a user may keep beside them."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save(folder: Path, state: TrainingState, identity: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write `folder/step-N` completely, then make it visible by one rename, then drop all but the newest `keep`.

    Raises:
        CheckpointError: it cannot be written; what was there before is intact.
    """
    target = folder / f"step-{state.step:07d}"
    scratch, world = folder / f".writing-{target.name}", state.share.world
    for phase in (_begin, _write, _publish):
        failure: OSError | SafetensorError | None = None
        try:
            if world.first or phase is _write:
                phase(scratch, target, state, identity)
        except (OSError, SafetensorError) as error:
            failure = error
        if not world.agree(failure is None):
            with suppress(OSError):
                shutil.rmtree(scratch)
            reason = failure.strerror if isinstance(failure, OSError) else failure or "by another process"
            raise CheckpointError(
                f"{target} cannot be written ({reason}): make room or choose another output; earlier checkpoints are intact"
            )
    if world.first:
        there = checkpoints(folder)
        valid = there[: there.index(target) + 1]
        for path in {*there} - {*valid[-keep:]}:  # the later ones were damaged, or led astray
            shutil.rmtree(path)
    return target


def _begin(scratch: Path, target: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    for left in scratch.parent.glob(".writing-*"):  # by a run that was killed
        shutil.rmtree(left)
    scratch.mkdir(parents=True)


def _write(scratch: Path, target: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    for file in write(scratch, state.share, state.tensors()):
        _settle(file)


def _publish(scratch: Path, target: Path, state: TrainingState, identity: Mapping[str, Any]) -> None:
    facts = {counter: getattr(state, counter) for counter in COUNTERS}
    facts |= {"ema_updates": state.ema.updates, "scaler": state.scaler.state_dict()}
    facts |= {"index": make_index(state.share, state.tensors())}
    (scratch / "state.json").write_text(json.dumps({**identity, **facts}, indent=1))
    _settle(scratch / "state.json")
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    _settle(target.parent)


def check_room(folder: Path, state: TrainingState, *, keep: int) -> None:
    """Refuse a disk with no room for `keep` checkpoints and the one being written.

    Raises:
        CheckpointError: naming the folder.
    """
    weights = 4 * state.share.elements
    needed = (keep + 1) * weights * (3 + len(state.ema.averages))  # weights, two moments, averages
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 2**20:.0f} MiB free, and {keep} checkpoints need {needed / 2**20:.0f}: make room, or keep fewer"
        )


def _settle(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def restore(
    folder: Path, state: TrainingState, identity: Mapping[str, Any], *, notice: Callable[[str], None] = print
) -> Path | None:
    """Load the newest readable checkpoint in `folder` into `state` and tell which; None if there is none.

    Each one that is passed over because it is damaged gives a `notice`.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or there are some and none can be read.
    """
    paths, world = checkpoints(folder)[::-1], state.share.world
    if not world.same(len(paths)):
        raise CheckpointError(
            f"{folder} is not the same to all processes: choose an output on a disk that their machines share"
        )
    for path in paths:
        damage: Exception | None = None
        try:
            saved = json.loads((path / "state.json").read_text())
            check(path, saved, identity)
            parts = {part: read(path, state.share, part, saved.get("index")) for part in state.parts()}
        except (OSError, ValueError, SafetensorError) as error:
            damage = error
        if world.agree(damage is None):
            state.load(parts, saved)
            return path
        reason = str(damage or "another process cannot read its files").splitlines()[0]
        notice(f"{path} is passed over, it is damaged: {reason}")
    if paths:
        raise CheckpointError(
            f"{folder} holds no checkpoint that can be read: move it away to start from the beginning"
        )
    return None


def check(path: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run; what it does not tell is not compared.

    Raises:
        CheckpointError: naming the first field that differs.
    """
    for field, was, now in differences(saved, {key: identity[key] for key in identity if key in saved}):
        change = f"{was}, not {now}" if len(f"{was}{now}") < 60 else "otherwise"
        raise CheckpointError(
            f"{path} was trained with another {field} ({change}): take that one back, or another output, with init to go on from here"
        )


def differences(was: Any, now: Any, field: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted field, JSON that was, JSON that is) of every difference within `now`'s fields, or within either's further down."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*now, *was} if field else now):
            yield from differences(was.get(key), now.get(key), f"{field}.{key}" if field else str(key))
    elif was != now:
        yield field, json.dumps(was), json.dumps(now)
