"""Training state on disk: atomic writes, the newest valid checkpoint wins, another run's is refused."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditserve.model.distributed.parallel import single_process
from ditserve.model.train.checkpoint import CheckpointError, TrainingState, check_room, restore, save
from ditserve.model.train.ema import Ema
from ditserve.model.train.optimizer import loss_scaler

IDENTITY: dict[str, Any] = {"seed": 0, "model": {"depth": 2, "hidden_size": 16}, "ema": [0.9, 0.99]}


def fresh(seed: int = 0, width: int = 4) -> TrainingState:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return TrainingState(
        single_process(module), optimizer, Ema(module, (0.9, 0.99)), loss_scaler("fp16", "cpu")
    )


def advance(state: TrainingState, steps: int = 1) -> None:
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = state.model(torch.ones(2, 3)).square().sum()
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.ema.update(state.model.parameters())
        state.step += 1


def assert_equal(a: TrainingState, b: TrainingState) -> None:
    assert a.step == b.step
    assert a.ema.updates == b.ema.updates
    assert a.scaler.state_dict() == b.scaler.state_dict()
    parts, others = a.tensors(), b.tensors()
    assert parts.keys() == others.keys()
    for part, tensors in parts.items():
        assert tensors.keys() == others[part].keys()
        assert all(torch.equal(tensor, others[part][name]) for name, tensor in tensors.items())


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Limit the size of every file to `limit` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_restored_state_continues_as_the_saved_one(tmp_path: Path) -> None:
    state, other = fresh(), fresh(seed=1)
    advance(state, 3)
    state.skipped, state.rollbacks = 5, 2
    save(tmp_path, state, IDENTITY)
    advance(other, 1)
    assert restore(tmp_path, other, IDENTITY) == tmp_path / "step-0000003"
    assert_equal(state, other)
    assert (other.skipped, other.failures, other.rollbacks) == (5, 0, 2)
    advance(state)
    advance(other)
    assert_equal(state, other)


def test_nothing_but_tensors_and_json_is_written(tmp_path: Path) -> None:
    state = fresh()
    advance(state)
    path = save(tmp_path, state, IDENTITY)
    assert sorted(file.name for file in path.iterdir()) == [
        "ema-0.99.safetensors",
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((path / "state.json").read_text())["step"] == 1


def test_the_newest_are_kept_and_what_was_written_after_a_step_gone_back_to_is_not(tmp_path: Path) -> None:
    state = fresh()
    for _ in range(4):
        advance(state)
        save(tmp_path, state, IDENTITY, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000003", "step-0000004"]
    shutil.copytree(tmp_path / "step-0000003", tmp_path / "step-0000009")
    advance(state)
    save(tmp_path, state, IDENTITY, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-0000004", "step-0000005"]


def test_what_a_user_keeps_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    state, other = fresh(), fresh(seed=1)
    advance(other)
    save(tmp_path, other, IDENTITY)
    (tmp_path / "step-0000001").rename(tmp_path / "step-best")
    (tmp_path / "step-0000001.tar").write_bytes(b"")
    for _ in range(2):
        advance(state)
        save(tmp_path, state, IDENTITY, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-0000002", "step-best", "step-0000001.tar"}
    assert restore(tmp_path, other, IDENTITY) == tmp_path / "step-0000002"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "ema-0.99.safetensors", "optimizer.safetensors", "state.json"]
)
def test_a_truncated_checkpoint_is_passed_over_with_a_notice(tmp_path: Path, file: str) -> None:
    state = fresh()
    advance(state)
    save(tmp_path, state, IDENTITY)
    advance(state)
    newest = save(tmp_path, state, IDENTITY)
    (newest / file).write_bytes((newest / file).read_bytes()[:-7])
    notices: list[str] = []
    assert restore(tmp_path, state, IDENTITY, notice=notices.append) == tmp_path / "step-0000001"
    assert state.step == 1
    assert len(notices) == 1
    assert notices[0].startswith(f"{newest} is passed over, it is damaged")


def test_when_none_can_be_read_nothing_is_begun_anew(tmp_path: Path) -> None:
    assert restore(tmp_path, fresh(), IDENTITY) is None
    path = save(tmp_path, fresh(), IDENTITY)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        restore(tmp_path, fresh(), IDENTITY, notice=lambda _: None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, r"step-0000000 was trained with another seed \(0, not 1\)"),
        ({"model": {"depth": 3, "hidden_size": 16}}, r"another model\.depth \(2, not 3\)"),
        ({"model": {"depth": 2, "hidden_size": 16, "rope": True}}, r"another model\.rope \(null, not true\)"),
        ({"model": {"depth": 2}}, r"another model\.hidden_size \(16, not null\)"),
    ],
)
def test_another_runs_checkpoint_is_refused_by_field(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    save(tmp_path, fresh(), IDENTITY)
    with pytest.raises(CheckpointError, match=sentence):
        restore(tmp_path, fresh(), {**IDENTITY, **change})


def test_fields_that_an_older_checkpoint_does_not_tell_are_not_compared(tmp_path: Path) -> None:
    save(tmp_path, fresh(), IDENTITY)
    assert restore(tmp_path, fresh(), {**IDENTITY, "precision": "fp32"}) is not None


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    state = fresh(width=64)
    advance(state)
    good = save(tmp_path, state, IDENTITY)
    advance(state)
    with (
        file_size_limit(1000),
        pytest.raises(CheckpointError, match=r"step-0000002 cannot be written .*intact"),
    ):
        save(tmp_path, state, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    other = fresh(width=64)
    assert restore(tmp_path, other, IDENTITY) == good
    assert other.step == 1


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = fresh()
    check_room(tmp_path, state, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(CheckpointError, match="MiB free"):
        check_room(tmp_path, state, keep=2)


def test_a_killed_writers_leavings_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".writing-1").mkdir()
    save(tmp_path, fresh(), IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000"]


@pytest.mark.parametrize("where", ["model", "ema-0.99", "optimizer"])
def test_a_state_knows_when_it_is_not_finite(where: str) -> None:
    state = fresh()
    advance(state)
    assert state.is_finite()
    with torch.no_grad():
        next(iter(state.tensors()[where].values())).view(-1)[0] = float("inf")
    assert not state.is_finite()
