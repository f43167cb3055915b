"""The layout of a pass: the worked example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditserve.model.spec.diffusion import Schedule
from ditserve.service.engine.conditions import Condition, ConditionCaches
from ditserve.service.engine.geometry import geometry_of
from ditserve.service.engine.row_layout import RowLayout
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.trajectory import make_trajectory

Make = Callable[..., Any]


def test_rows_lie_as_in_the_worked_example(make_backend: Make, make_request: Make, make_rung: Make) -> None:
    backend, rung = make_backend(), make_rung(steps=4)
    schedule: Schedule = backend.manifest.diffusion.noise_schedule()
    caches = ConditionCaches(backend)
    condition = caches.embeddings.get(make_request().condition)

    def sample(scale: float, size: tuple[int, int] | None = None) -> Sample:
        geometry = geometry_of(size, own=(4, 6), windows=size is not None, multiple=None)
        trajectory = make_trajectory(rung, scale, schedule)
        return Sample(make_request(), condition, trajectory, geometry=geometry, floor=rung, added_at=0.0)

    windowed = sample(1.0, (6, 9))
    layout = RowLayout.of([sample(2.0), windowed, sample(1.0), sample(3.0)])
    assert (layout.guided, layout.rows) == ([0, 2], 9)
    assert (layout.conditional, layout.unconditional) == (slice(0, 3), slice(3, 5))
    (rows,) = layout.windowed
    assert rows.sample is windowed
    assert (rows.conditional, rows.unconditional) == (slice(5, 9), slice(9, 9))
    inputs: list[Condition] = [state for _, state in layout.conditioner_inputs(caches.null)]
    assert [state is caches.null for state in inputs] == [False] * 3 + [True] * 2 + [False] * 4
