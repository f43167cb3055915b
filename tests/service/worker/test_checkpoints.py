"""Checkpoints: a worker that leaves writes them, and only an equal worker goes on from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ditserve.service import wire
from ditserve.service.engine.samples import Finished
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.worker.handoff import checkpoint_origin, read_checkpoint, write_checkpoint
from tests.service.engine.stepping import finished, run

Make = Callable[..., Any]


@pytest.fixture
def states(make_engine: Make, make_request: Make) -> list[Any]:
    """Return the states of three samples: one under way, one done, one not begun."""
    engine = make_engine()
    engine.add(make_request("a/0"))
    for _ in range(3):
        engine.step()
    done = finished(run(make_engine(), [make_request("a/1", seed=8)]))["a/1"]
    return [engine.export("a/0"), done, None]


def test_a_checkpoint_says_where_every_sample_stands(states: list[Any]) -> None:
    data = write_checkpoint(states, origin="here", version=1)
    under_way, done, not_begun = read_checkpoint(data, origin="here", samples=3)
    assert isinstance(under_way, Snapshot)
    assert isinstance(done, Finished)
    assert not_begun is None
    assert (under_way.taken, under_way.rung) == (3, states[0].rung)
    np.testing.assert_array_equal(under_way.latent, states[0].latent)
    np.testing.assert_array_equal(done.latent, states[1].latent)
    assert replace(done, latent=states[1].latent) == states[1]


def test_nothing_done_is_nothing_to_keep() -> None:
    assert write_checkpoint([None, None], origin="here", version=1) == b""


def test_a_checkpoint_is_of_the_version_of_its_job(
    states: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "READABLE", (*wire.READABLE, 9))
    older, newer = (write_checkpoint(states, origin="here", version=version) for version in (1, 9))
    monkeypatch.undo()
    assert len(read_checkpoint(older, origin="here", samples=3)) == 3
    with pytest.raises(ValueError, match="schema version 9"):
        read_checkpoint(newer, origin="here", samples=3)


def test_a_strangers_checkpoint_is_refused(states: list[Any]) -> None:
    data = write_checkpoint(states, origin="here", version=1)
    with pytest.raises(ValueError, match="another bundle"):
        read_checkpoint(data, origin="there", samples=3)
    with pytest.raises(ValueError, match="3 samples"):
        read_checkpoint(data, origin="here", samples=2)


@pytest.mark.parametrize("cut", [1, 20, 200, 900])
def test_a_damaged_checkpoint_is_refused(states: list[Any], cut: int) -> None:
    data = write_checkpoint(states, origin="here", version=1)
    for damaged in (data[:-cut], data.replace(b"latent", b"talent"), b"\x80", b""):
        with pytest.raises(ValueError, match=r"."):
            read_checkpoint(damaged, origin="here", samples=3)


def test_the_origin_is_of_the_bundle_and_the_backend(make_backend: Make) -> None:
    manifest = make_backend().manifest
    same = make_backend().manifest
    other = manifest.model_copy(update={"version": "2"})
    assert checkpoint_origin(manifest, "onnx") == checkpoint_origin(same, "onnx")
    assert len({checkpoint_origin(m, b) for m in (manifest, other) for b in ("onnx", "torch")}) == 4
