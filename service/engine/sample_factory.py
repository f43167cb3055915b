"""Samples from requests: their conditions, their size, and their way through the noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Final, NamedTuple

from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.source import first_frame
from ditserve.service.backends import Backend
from ditserve.service.engine.conditions import ConditionCaches, Conditioning
from ditserve.service.engine.geometry import geometry_of
from ditserve.service.engine.latent_pool import Floats
from ditserve.service.engine.samples import Sample, SampleRequest
from ditserve.service.engine.snapshots import Snapshot
from ditserve.service.engine.trajectory import Trajectory, make_trajectory, regrid_trajectory
from ditserve.service.errors import ModelReplaced
from ditserve.service.planning.ladder import Ladder, steps_left
from ditserve.service.planning.planner import Change
from ditserve.service.rung import Rung

TRAJECTORIES_KEPT: Final = 256  # from noise: most requests ask for the same few


class NewSample(NamedTuple):
    """A sample that may join, its latent (C, H, W), and its solver history as `LatentPool.take` wants it."""

    sample: Sample
    latent: Floats
    history: Sequence[Floats]


class SampleFactory:
    """The maker of one bundle's samples, which also moves them to other rungs.

    Args:
        backend: the bundle's own network.
        caches: of every network by its name, "" for the bundle's own.
        schedule: the noise schedule the bundle was trained with.
        clock: returns seconds; a sample waits for its first step from when its conditions are there.
    """

    def __init__(
        self,
        backend: Backend,
        caches: Mapping[str, ConditionCaches],
        ladder: Ladder,
        schedule: Schedule,
        clock: Callable[[], float],
    ) -> None:
        config = backend.manifest.config
        self._channels, self._own_size = config.in_channels, config.image_size
        self._size_multiples, self._caches = backend.size_multiples, caches
        self._ladder, self._schedule, self._clock = ladder, schedule, clock
        self._make_trajectory = lru_cache(TRAJECTORIES_KEPT)(partial(make_trajectory, schedule=schedule))

    def make(self, request: SampleRequest, snapshot: Snapshot | None) -> NewSample:
        """Return the sample of a request, from noise or where a snapshot of it stands.

        Raises:
            InvalidRequest: its condition cannot be mixed, or the backend does not run its size.
            ModelReplaced: a rung names a network that this bundle has not.
            ValueError: its rung is not one, or its snapshot or picture does not fit.
        """
        if unknown := {*request.rung.backbones, *request.requested.backbones} - self._caches.keys():
            detail = f"The model has no network {min(unknown)} any more; send the request again."
            raise ModelReplaced(detail, retry_after=1.0)
        geometry = geometry_of(
            request.size, own=self._own_size, windows=request.windows, multiples=self._size_multiples
        )
        if snapshot is not None and snapshot.latent.shape[1:] != geometry.size:
            raise ValueError(f"the snapshot of sample {request.id} is of another size")
        conditionings = {"": self._conditioning(request, "")}
        if snapshot is None:
            scale = request.guidance_scale if conditionings[""].can_be_guided else 1.0
            trajectory = self._make_trajectory(request.rung, scale, area=geometry.row_area)
        else:
            trajectory = snapshot.trajectory(self._schedule)
        # The planner may move it up to the rung that it asks for, so that must be one as well.
        self._make_trajectory(request.requested, trajectory.scale, area=geometry.row_area)
        floor = self._floor(request)
        sample = Sample(
            request, conditionings, trajectory, geometry=geometry, floor=floor, added_at=self._clock()
        )
        self._add_conditionings(sample)
        shape = (self._channels, *geometry.size)
        source = request.source
        if source is not None and source.latent.ndim < len(shape):
            source = first_frame(source, shape[1])
        if source is not None and source.latent.shape != shape:
            raise ValueError(f"the picture of sample {request.id} is of another size")
        start = sample.begin(shape, self._schedule, source)
        if snapshot is None:
            return NewSample(sample, start, ())
        snapshot.resume(sample)
        return NewSample(sample, snapshot.latent, snapshot.estimates)

    def follow(self, sample: Sample, change: Change) -> None:
        """Move a sample to another rung from where it stands; steps already taken are never redone."""
        sample.follow(change, self._trajectory_on(sample, change.rung))
        self._add_conditionings(sample)

    def _trajectory_on(self, sample: Sample, rung: Rung) -> Trajectory:
        scale, area = sample.trajectory.scale, sample.geometry.row_area
        if not sample.taken:
            return self._make_trajectory(rung, scale, area=area)
        steps, schedule = steps_left(sample.remaining_steps, sample.rung, rung), self._schedule.for_area(area)
        return regrid_trajectory(
            rung, scale, schedule, level=sample.level, steps=steps, previous=sample.previous
        )

    def _conditioning(self, request: SampleRequest, backbone: str) -> Conditioning:
        """Return the conditions of a request for a backbone. Raises `InvalidRequest`."""
        # A window shows a part of the frame, or none.
        told = None if request.windows or request.source is None else request.source.latent
        return self._caches[backbone].conditioning(
            request.condition,
            request.mix,
            negative_prompt=request.negative_prompt,
            guidance_embedded=request.guidance_embedded,
            adapters=request.adapters,
            first_frame=told,
        )

    def _add_conditionings(self, sample: Sample) -> None:
        """Give a sample its conditions for the backbones that are new in its trajectory."""
        for name in {*sample.trajectory.backbones} - sample.conditionings.keys():
            sample.conditionings[name] = self._conditioning(sample.request, name)

    def _floor(self, request: SampleRequest) -> Rung:
        """Return the lowest rung that a request consents to."""
        return self._ladder.lowest(request.rung, request.consent) if request.allow_degraded else request.rung
