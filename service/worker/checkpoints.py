"""A checkpoint: what a worker that leaves has done of a job, for the next one to go on from.

Only a worker of the same release, bundle and backend goes on from it, so that a seed still means an image; for any other it is
nothing, and the job starts anew. Pure: no I/O, no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ditserve.model.spec.bundle import Manifest
from ditserve.service.engine.samples import Finished
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.wire import WireError, build, fields_of, pack, unpack

VERSION = 1  # of what a checkpoint holds and what it means to the engine

Standing = Snapshot | Finished | None  # of one sample: under way, done, or not begun


def origin(manifest: Manifest, backend: str) -> str:
    """Names what a checkpoint may be continued by: equal for workers that make equal images."""
    facts = f"{VERSION}\0{backend}\0{manifest.model_dump_json()}"
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def write(samples: Sequence[Standing], *, origin: str) -> bytes:
    """The checkpoint of a job, its samples in seed order; empty when there is nothing to keep."""
    if not any(samples):
        return b""
    return pack({"origin": origin, "samples": [_to_wire(sample) for sample in samples]})


def read(data: bytes, *, origin: str, samples: int) -> tuple[Standing, ...]:
    """What `write` was given. Raises `ValueError` for what another origin wrote, or nobody."""
    try:
        fields = unpack(data)
        if fields["origin"] != origin:
            raise ValueError("it is of another bundle, backend or release")
        standings = tuple(_from_wire(sample) for sample in fields["samples"])
    except (AttributeError, KeyError, TypeError, WireError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if len(standings) != samples:
        raise ValueError(f"it has {len(standings)} samples, and the job {samples}")
    return standings


def _to_wire(sample: Standing) -> dict[str, Any] | None:
    if isinstance(sample, Snapshot):
        return {"under_way": sample.to_wire()}
    if sample is None:
        return None
    shape, latent = sample.latent.shape, sample.latent.astype("<f4").tobytes()
    return {"done": {**fields_of(sample), "latent": latent, "shape": shape}}


def _from_wire(data: Mapping[str, Any] | None) -> Standing:
    if data is None:
        return None
    if "under_way" in data:
        return Snapshot.from_wire(data["under_way"])
    done = dict(data["done"])
    latent = np.frombuffer(done.pop("latent"), "<f4").astype(np.float32).reshape(done.pop("shape"))
    return build(Finished, {**done, "latent": latent})
