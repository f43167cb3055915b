"""A snapshot: a running sample as a value, so that another engine continues it to the same image.

Pure: no I/O, no clock, no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ditserve.model.spec.diffusion import Schedule
from ditserve.service.engine.samples import KnownChange, Sample
from ditserve.service.engine.trajectory import StepCoefficients, Trajectory, trajectory_from_levels
from ditserve.service.rung import Rung
from ditserve.service.wire import build

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A sample between two steps: its trajectory, its position on it, and the arrays of its next step.

    The names of the fields are those on the wire. `timesteps` are the noise levels of the trajectory and
    `previous` the one before them, `scale` is its guidance scale. `latent` is x, `history` the estimate D
    of the last step, and `earlier` that of the one before, each (C, H, W); `earlier` is None where the next
    step does not need it. `noise` is the state of the sample's Philox generator: counter, key,
    buffer, and the rest of a draw. `cached` (K, C, H, W) are the latents of the steps `cached_steps` of the
    trajectory, of which its block cache is made; None where the next step needs none.
    """

    rung: Rung
    scale: float
    timesteps: tuple[float, ...]
    previous: float | None
    cursor: int
    taken: int
    degraded: bool
    reason: str | None
    latent: Floats
    history: Floats
    noise: tuple[int, ...]
    earlier: Floats | None = None
    cached_steps: tuple[int, ...] = ()
    cached: Floats | None = None

    @classmethod
    def of(cls, sample: Sample, latent: Floats, history: Floats) -> Snapshot:
        """Return the snapshot of a sample with this latent (C, H, W) and solver history (2, C, H, W)."""
        trajectory = sample.trajectory
        last, earlier = history
        known = sample.known_changes if sample.since else []
        return cls(
            rung=sample.rung,
            scale=trajectory.scale,
            timesteps=trajectory.levels,
            previous=trajectory.previous,
            cursor=sample.cursor,
            taken=sample.taken,
            degraded=sample.degraded,
            reason=sample.reason,
            latent=latent,
            history=last,
            noise=_noise_state(sample.generator),
            earlier=earlier if StepCoefficients(*sample.coefficients).d else None,
            cached_steps=tuple(each.step for each in known),
            cached=np.stack([each.latent for each in known]) if known else None,
        )

    def trajectory(self, schedule: Schedule) -> Trajectory:
        """Return the trajectory that the sample is on."""
        return trajectory_from_levels(self.rung, self.scale, schedule, self.timesteps, previous=self.previous)

    @property
    def estimates(self) -> tuple[Floats, ...]:
        """The solver history (C, H, W), the newest first."""
        return (self.history,) if self.earlier is None else (self.history, self.earlier)

    def resume(self, sample: Sample) -> None:
        """Bring a new sample, on this snapshot's trajectory, to the state of the old one."""
        sample.rung, sample.cursor, sample.taken = self.rung, self.cursor, self.taken
        sample.degraded, sample.reason = self.degraded, self.reason
        if self.cached is not None:
            sample.known_changes = [
                KnownChange(step, latent, None)
                for step, latent in zip(self.cached_steps, self.cached, strict=True)
            ]
        _set_noise_state(sample.generator, self.noise)

    def to_wire(self) -> dict[str, Any]:
        """Return the fields as plain data, the arrays as bytes of little-endian float32."""
        absent = {name for name in _ARRAYS if getattr(self, name) is None}
        absent |= {"cached_steps"} if self.cached is None else set()
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in absent}
        arrays = {name: fields[name].astype("<f4").tobytes() for name in _ARRAYS if name in fields}
        return {**fields, **arrays, "rung": asdict(self.rung), "shape": self.latent.shape}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Snapshot:
        """Return the snapshot that `to_wire` wrote. Raises `ValueError` for anything else."""
        try:
            fields = dict(data)
            shape = tuple(fields.pop("shape"))
            for name in [name for name in _ARRAYS if name in fields]:
                whole = (len(fields["cached_steps"]), *shape) if name == "cached" else shape
                fields[name] = np.frombuffer(fields[name], "<f4").astype(np.float32).reshape(whole)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a snapshot: {error}") from error
        snapshot = build(cls, fields)
        if not 0 <= snapshot.cursor < len(snapshot.timesteps) or len(snapshot.noise) != _NOISE_NUMBERS:
            raise ValueError("not a snapshot: it stands nowhere")
        if (len(snapshot.cached_steps) > 0) != (snapshot.cached is not None) or not all(
            0 <= step < snapshot.cursor for step in snapshot.cached_steps
        ):
            raise ValueError("not a snapshot: its block cache is of other steps")
        return snapshot


_ARRAYS = ("latent", "history", "earlier", "cached")
_NOISE_NUMBERS = 4 + 2 + 4 + 3  # counter, key, buffer, rest of a draw


def _noise_state(generator: np.random.Generator) -> tuple[int, ...]:
    state: dict[str, Any] = dict(generator.bit_generator.state)
    arrays = (state["state"]["counter"], state["state"]["key"], state["buffer"])
    scalars = (state["buffer_pos"], state["has_uint32"], state["uinteger"])
    return tuple(int(number) for array in arrays for number in array) + tuple(map(int, scalars))


def _set_noise_state(generator: np.random.Generator, noise: tuple[int, ...]) -> None:
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array(noise[:4], np.uint64), "key": np.array(noise[4:6], np.uint64)},
        "buffer": np.array(noise[6:10], np.uint64),
        "buffer_pos": noise[10],
        "has_uint32": noise[11],
        "uinteger": noise[12],
    }
