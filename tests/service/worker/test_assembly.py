"""What an image file says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from model.bundle import Factor
from service.engine.samples import Finished
from service.jobs import ConditionTerm, Job
from service.planning.rungs import Rung
from service.worker.assembly import describe

FACTORS = (
    Factor(name="label", classes=("lemon", "strawberry")),
    Factor(name="style", classes=("noto", "twemoji")),
)
FINISHED = cast(
    Finished, SimpleNamespace(steps_used=8, rung=Rung("half", "dpmpp-2m", 8, "uniform-t", (0.2, 0.8), 0.1))
)


def described(job: Job, **changes: Any) -> dict[str, str]:
    return describe(replace(job, **changes), FINISHED, 7, FACTORS)


def test_a_file_says_how_to_draw_it_again(make_job: Callable[..., Job]) -> None:
    said = described(make_job(), condition=(ConditionTerm((1, 0)),))
    assert json.loads(said["condition"]) == {"label": "strawberry", "style": "noto"}
    assert (said["seed"], said["steps"], said["sampler"], said["grid"]) == ("7", "8", "dpmpp-2m", "uniform-t")
    assert said["guidance_interval"] == "[0.2, 0.8]"
    assert "mix" not in said


def test_a_mix_is_written_as_it_is_asked_for(make_job: Callable[..., Job]) -> None:
    mixed = (ConditionTerm((1, None), 0.25), ConditionTerm((None, 1), 1.0, "on a table"))
    said = described(make_job(), condition=mixed, mix="spherical")
    first, second = json.loads(said["condition"])
    assert first == {"label": "strawberry", "weight": 0.25}
    assert second == {"style": "twemoji", "text": "on a table"}
    assert said["mix"] == "spherical"
