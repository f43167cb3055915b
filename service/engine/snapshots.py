"""A snapshot: a sample on its way, for another engine of the same bundle to continue to the same image.

Values and their plain form. Pure: no I/O, no clock, no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Schedule
from ditserve.service.engine.courses import Course, along
from ditserve.service.engine.samples import Sample
from ditserve.service.rung import Rung
from ditserve.service.wire import build

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Where a sample stands: its course, its place on it, and the arrays that its next step needs."""

    rung: Rung
    scale: float
    timesteps: tuple[int, ...]  # of the course
    previous: int | None  # the timestep before the course, where it continues another
    cursor: int
    taken: int
    degraded: bool
    reason: str | None
    latent: Floats  # x, (C, H, W)
    history: Floats  # D of the last step, (C, H, W)
    noise: tuple[
        int, ...
    ]  # where its generator stands: Philox's counter, key, buffer, and what is left of a draw

    @classmethod
    def of(cls, sample: Sample, latent: Floats, history: Floats) -> Snapshot:
        course = sample.course
        return cls(
            rung=sample.rung,
            scale=course.scale,
            timesteps=course.timesteps,
            previous=course.previous,
            cursor=sample.cursor,
            taken=sample.taken,
            degraded=sample.degraded,
            reason=sample.reason,
            latent=latent,
            history=history,
            noise=_noise(sample.generator),
        )

    def course(self, schedule: Schedule) -> Course:
        """The course it is on."""
        return along(self.rung, self.scale, schedule, self.timesteps, previous=self.previous)

    def resume(self, sample: Sample) -> None:
        """Put a sample, new and on this snapshot's course, where this one stood."""
        sample.rung, sample.cursor, sample.taken = self.rung, self.cursor, self.taken
        sample.degraded, sample.reason = self.degraded, self.reason
        _set_noise(sample.generator, self.noise)

    def to_wire(self) -> dict[str, Any]:
        """Plain data; the arrays as little-endian float32."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        arrays = {name: fields[name].astype("<f4").tobytes() for name in ("latent", "history")}
        return {**fields, **arrays, "rung": asdict(self.rung), "shape": self.latent.shape}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Snapshot:
        """Raises `ValueError` for anything that `to_wire` did not write."""
        try:
            fields = dict(data)
            shape = tuple(fields.pop("shape"))
            for name in ("latent", "history"):
                fields[name] = np.frombuffer(fields[name], "<f4").astype(np.float32).reshape(shape)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a snapshot: {error}") from error
        snapshot = build(cls, fields)
        if not 0 <= snapshot.cursor < len(snapshot.timesteps) or len(snapshot.noise) != _NOISE:
            raise ValueError("not a snapshot: it stands nowhere")
        return snapshot


_NOISE = 4 + 2 + 4 + 3


def _noise(generator: np.random.Generator) -> tuple[int, ...]:
    state: dict[str, Any] = dict(generator.bit_generator.state)
    arrays = (state["state"]["counter"], state["state"]["key"], state["buffer"])
    scalars = (state["buffer_pos"], state["has_uint32"], state["uinteger"])
    return tuple(int(number) for array in arrays for number in array) + tuple(map(int, scalars))


def _set_noise(generator: np.random.Generator, noise: tuple[int, ...]) -> None:
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array(noise[:4], np.uint64), "key": np.array(noise[4:6], np.uint64)},
        "buffer": np.array(noise[6:10], np.uint64),
        "buffer_pos": noise[10],
        "has_uint32": noise[11],
        "uinteger": noise[12],
    }
