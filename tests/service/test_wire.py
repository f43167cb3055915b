"""Bytes are what earlier releases wrote: recorded messages are read, and written again the same."""

from __future__ import annotations

import json
from base64 import b64decode
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from ditserve.model.spec.stretches import Stretch
from ditserve.service.fleet import WorkerState, read_report
from ditserve.service.jobs import Job, JobResult
from ditserve.service.rung import Rung
from ditserve.service.source_picture import SourcePicture
from ditserve.service.wire import Message, WireError, build, fields_of, pack, unpack
from ditserve.service.worker.handoff import read_checkpoint, write_checkpoint
from tests.service import wire_examples as examples

RECORDED = {
    name: b64decode(text)
    for name, text in json.loads(Path(__file__).with_name("recorded_wire.json").read_text()).items()
}
MESSAGES: dict[str, Message] = {
    "plain job": examples.PLAIN_JOB,
    "full job": examples.FULL_JOB,
    "composed job": examples.COMPOSED_JOB,
    "stitched job": examples.STITCHED_JOB,
    "picture job": examples.PICTURE_JOB,
    "adapted job": examples.ADAPTED_JOB,
    "result": examples.RESULT,
    "worker state": examples.STATE,
    "starting": examples.STARTING,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_has_the_bytes_of_earlier_releases(name: str) -> None:
    message = MESSAGES[name]
    assert message.to_bytes() == RECORDED[name]
    assert type(message).from_bytes(RECORDED[name]) == message


def test_a_job_has_the_oldest_version_that_says_all_of_it() -> None:
    """A worker of the release before claims version 1 only, and would draw another picture of the others."""
    plain = examples.FULL_JOB
    assert (examples.PLAIN_JOB.oldest_version, plain.oldest_version) == (1, 1)
    newer: list[dict[str, Any]] = [
        {"mix": "compose"},
        {"mix": "layers"},
        {"negative_prompt": "fog"},
        {"guidance_embedded": 3.5},
        {"solver": "unipc-2"},
        {"requested": replace(examples.FULL, guidance_decay=-1.0)},
        {"admitted": replace(examples.HALF, stretches=(Stretch(0.0, "student"),))},
        {"requested": replace(examples.HALF, stretches=(Stretch(0.0, "student"),))},
        {"min_quality": 0.25},
        {"source": SourcePicture(b"image", None, 1.0)},
        {"adapters": examples.ADAPTED_JOB.adapters},
        {"size": (8, 48, 48), "format": "gif", "fps": 12.0},
        {"format": "npz"},
    ]
    for change in newer:
        job = replace(plain, **change)
        assert msgpack.unpackb(job.to_bytes())["v"] == job.oldest_version == 2
        assert Job.from_bytes(job.to_bytes()) == job


def test_a_report_is_of_either_kind() -> None:
    assert read_report(RECORDED["worker state"]) == examples.STATE
    assert read_report(RECORDED["starting"]) == examples.STARTING


def test_a_checkpoint_has_the_bytes_of_earlier_releases() -> None:
    assert write_checkpoint(examples.SAMPLES, origin="here", version=1) == RECORDED["checkpoint"]
    for sample, expected in zip(
        read_checkpoint(RECORDED["checkpoint"], origin="here", samples=3), examples.SAMPLES, strict=True
    ):
        if expected is None:
            assert sample is None
            continue
        assert type(sample) is type(expected)
        for name, value in fields_of(expected).items():
            np.testing.assert_array_equal(getattr(sample, name), value)


def test_an_event_has_the_bytes_of_earlier_releases() -> None:
    assert pack({"step": 3, "steps": 20}) == RECORDED["event"]
    assert unpack(RECORDED["event"]) == {"step": 3, "steps": 20}


def test_fields_of_later_releases_have_defaults() -> None:
    job, state = unpack(RECORDED["plain job"]), unpack(RECORDED["worker state"])
    for name in ("trace", "size", "vocabulary", "windows", "floor_rows", "requested", "admitted"):
        del job[name]
    del job["negative_prompt"]
    del job["guidance_embedded"]
    del job["fps"]
    del job["row_cost"]
    del job["condition"][0]["text"]
    for name in ("network", "dues", "bundle", "given_rows", "formats"):
        del state[name]
    assert Job.from_bytes(pack(job)) == examples.PLAIN_JOB
    assert WorkerState.from_bytes(pack(state)).dues == ()


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_interval": [0.0]},
        {"guidance_interval": [0.0, 1.0, 2.0]},
        {"size": [1]},
        {"condition": None},
        {"condition": [3]},
        {"requested": {"name": "ddim-20"}},
        {"seeds": 7},
        {"seeds": ["7"]},
        {"seeds": "777"},
        {"steps": "20"},
        {"guidance_scale": float("nan")},
        {"format": "bmp"},
        {"caller": None},
        {"trace": {"traceparent": 1}},
        {"trace": []},
        {"source": {"image": "text", "mask": None, "strength": 0.5}},
        {"source": {"image": b"", "mask": None, "strength": 0.0}},
    ],
)
def test_a_field_of_another_form_is_refused(change: dict[str, object]) -> None:
    fields = unpack(RECORDED["full job"])
    with pytest.raises(WireError, match="not a job: "):
        Job.from_bytes(pack({**fields, **change}))


def test_the_message_of_another_type_is_refused() -> None:
    with pytest.raises(WireError, match="not a job result: "):
        JobResult.from_bytes(RECORDED["plain job"])


@dataclass(frozen=True, slots=True)
class Nested:
    rungs: tuple[Rung, ...]
    best: Rung | None
    spare: tuple[int, Rung] | None = None


def test_dataclasses_may_hold_dataclasses() -> None:
    value = Nested((examples.FULL, examples.HALF), examples.FULL, (1, examples.HALF))
    assert build(Nested, unpack(pack(fields_of(value)))) == value
    assert build(Nested, {"rungs": [], "best": None}) == Nested((), None)
