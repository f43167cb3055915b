"""The operating point of a request to a flow model: grids in sigma, listed sigmas, step counts."""

from __future__ import annotations

from typing import Any

import pytest

from ditserve.model.spec.manifest import Manifest
from ditserve.service.errors import InvalidRequest
from ditserve.service.http.operating_point import requested_rung
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung
from tests.service.http.conftest import MANIFEST

FLOW = {"schedule": "flow", "prediction": "flow", "sigma_grid": {"shift": 3.0}}


def requested(body: dict[str, Any], **diffusion: Any) -> Rung:
    defaults = {**MANIFEST["defaults"], "steps": 8, "grid": "uniform"}
    fields = {**MANIFEST, "diffusion": {**FLOW, **diffusion}, "defaults": defaults, "ladder": []}
    manifest = Manifest.model_validate(fields)
    return requested_rung(GenerateRequest.model_validate(body), manifest, Ladder.from_manifest(manifest))


def test_a_flow_has_grids_of_its_own_and_lists_of_sigmas() -> None:
    assert (requested({}).grid, requested({}).steps) == ("uniform", 8)
    assert requested({"grid": "karras", "sampler": "dpmpp-2m"}).grid == "karras"
    listed = requested({"noise_levels": [1, 0.75, 0.3]})
    assert (listed.grid, listed.steps) == ("1,0.75,0.3", 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"grid": "trailing"}, "grid: There is no 'trailing'; choose among uniform, karras"),
        ({"noise_levels": [1.5, 0.5]}, "noise_levels: A grid must be one or more noise levels"),
        ({"noise_levels": [0.5, 0.25]}, "noise_levels: The grid starts at noise level 0.5 of 1, below"),
        ({"noise_levels": [1, 0.5, 0]}, "noise_levels: A grid must be"),
        ({"noise_levels": [1, 0.5], "steps": 4}, "steps: The noise_levels listed are 2 steps"),
        ({"steps": 1001}, r"steps: Steps must be in 1\.\.1000, not 1001"),
    ],
)
def test_what_a_flow_cannot_do_is_refused_by_field(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        requested(body)


def test_a_distilled_model_takes_its_own_numbers_of_steps_only() -> None:
    counts = {"step_counts": [1, 4, 8]}
    assert requested({"steps": 4}, **counts).steps == 4
    others: dict[str, Any] = {"steps": 5, "noise_levels": [1, 0.5]}
    for field, value in others.items():
        with pytest.raises(
            InvalidRequest, match=f"{field}: This model was trained for runs of 1, 4, 8 steps"
        ):
            requested({field: value}, **counts)
    with pytest.raises(ValueError, match="field defaults: this model was trained for runs of 2 steps, not 8"):
        requested({}, step_counts=[2])
    with pytest.raises(ValueError, match="step_counts must be at most"):
        requested({}, step_counts=[8, 2000])
