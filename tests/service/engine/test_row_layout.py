"""The layout of a pass: the worked example, and samples of several conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ditserve.model.spec.diffusion import Schedule
from ditserve.service.engine.conditions import ConditionCaches
from ditserve.service.engine.embedding_cache import Condition
from ditserve.service.engine.geometry import geometry_of
from ditserve.service.engine.row_layout import RowLayout
from ditserve.service.engine.samples import Sample
from ditserve.service.engine.trajectory import make_trajectory
from ditserve.service.jobs import ConditionTerm

Make = Callable[..., Any]


def test_rows_lie_as_in_the_worked_example(make_backend: Make, make_request: Make, make_rung: Make) -> None:
    backend, rung = make_backend(), make_rung(steps=4)
    schedule: Schedule = backend.manifest.diffusion.noise_schedule()
    caches = ConditionCaches(backend)

    def sample(
        scale: float, size: tuple[int, int] | None = None, colours: Sequence[int] = (0,), **fields: Any
    ) -> Sample:
        geometry = geometry_of(size, own=(4, 6), windows=size is not None, multiples=None)
        request = make_request(condition=tuple(ConditionTerm((colour,)) for colour in colours), **fields)
        conditioning = caches.conditioning(request.condition, "compose" if len(colours) > 1 else "linear")
        trajectory = make_trajectory(rung, scale, schedule)
        return Sample(request, {"": conditioning}, trajectory, geometry=geometry, floor=rung, added_at=0.0)

    windowed, composed = sample(1.0, (6, 9)), sample(2.0, colours=(1, 2))
    layout = RowLayout.of([sample(2.0), windowed, sample(1.0), composed, sample(3.0)])
    assert (layout.guided, layout.rows) == ([0, 2], 12)
    assert layout.rows == sum(rows.sample.rows for rows in layout.several) + 5
    assert (layout.conditional, layout.unconditional) == (slice(0, 3), slice(3, 5))
    in_windows, of_conditions = layout.several
    assert (in_windows.sample, of_conditions.sample) == (windowed, composed)
    assert (in_windows.conditional, in_windows.unconditional) == (slice(5, 9), slice(9, 9))
    assert (of_conditions.conditional, of_conditions.unconditional) == (slice(9, 11), slice(11, 12))
    inputs: list[Condition] = [state for _, state in layout.conditioner_inputs()]
    assert [state is caches.null for state in inputs] == [False] * 3 + [True] * 2 + [False] * 6 + [True]
    green, blue = composed.conditioning.conditions
    assert inputs[9:11] == [green, blue]


def test_windows_of_a_composed_sample_are_repeated_for_each_condition(
    make_backend: Make, make_request: Make, make_rung: Make
) -> None:
    backend, rung = make_backend(), make_rung(steps=4)
    caches = ConditionCaches(backend)
    terms = [ConditionTerm((0,), 2.0), ConditionTerm((1,), -1.0)]
    conditioning = caches.conditioning(terms, "compose")
    geometry = geometry_of((6, 9), own=(4, 6), windows=True, multiples=None)
    trajectory = make_trajectory(rung, 2.0, backend.manifest.diffusion.noise_schedule())
    sample = Sample(
        make_request(), {"": conditioning}, trajectory, geometry=geometry, floor=rung, added_at=0.0
    )
    layout = RowLayout.of([sample])
    assert (sample.rows, sample.most_rows, layout.rows) == (12, 12, 12)
    red, green = conditioning.conditions
    states = [state for _, state in layout.conditioner_inputs()]
    assert states == [red] * 4 + [green] * 4 + [caches.null] * 4
    assert conditioning.weights == (2.0, -1.0)
