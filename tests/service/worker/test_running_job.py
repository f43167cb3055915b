"""The metadata of image files, and the rungs that a job runs on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.source import SourceLatent
from ditserve.service.engine.samples import Finished
from ditserve.service.jobs import AdapterUse, Claim, ConditionTerm, EventKind, Job, Lease
from ditserve.service.planning.ladder import Ladder
from ditserve.service.queue.broker import Broker
from ditserve.service.rung import Rung
from ditserve.service.source_picture import SourcePicture
from ditserve.service.worker.progress_events import ProgressEvents
from ditserve.service.worker.running_job import RunningJob, RunningJobs, describe
from tests.service.wire_examples import SNAPSHOT

FACTORS = (
    Factor(name="label", classes=("lemon", "strawberry")),
    Factor(name="style", classes=("noto", "twemoji")),
)
LATENT = np.zeros((3, 8, 8), np.float32)
FINISHED = cast(
    Finished,
    SimpleNamespace(
        latent=LATENT, steps_used=8, rung=Rung("half", "dpmpp-2m", 8, "uniform-t", (0.2, 0.8), 0.1)
    ),
)


def described(job: Job, **changes: Any) -> dict[str, str]:
    return describe(replace(job, **changes), FINISHED, 7, FACTORS)


def test_a_file_says_how_to_draw_it_again(make_job: Callable[..., Job]) -> None:
    metadata = described(make_job(), condition=(ConditionTerm((1, 0)),))
    assert json.loads(metadata["condition"]) == {"label": "strawberry", "style": "noto"}
    assert (metadata["seed"], metadata["steps"], metadata["sampler"], metadata["grid"]) == (
        "7",
        "8",
        "dpmpp-2m",
        "uniform-t",
    )
    assert metadata["guidance_interval"] == "[0.2, 0.8]"
    assert "mix" not in metadata


def test_a_file_names_listed_noise_levels_as_a_request_does(make_job: Callable[..., Job]) -> None:
    rung = Rung("ddim-3", "ddim", 3, "999,700,300", (0.0, 1.0), 0.0)
    finished = cast(Finished, SimpleNamespace(latent=LATENT, steps_used=3, rung=rung))
    metadata = describe(make_job(), finished, 7, FACTORS)
    assert json.loads(metadata["noise_levels"]) == [999, 700, 300]
    assert "grid" not in metadata


def test_a_file_names_the_adapters_as_a_request_does(make_job: Callable[..., Job]) -> None:
    uses = (AdapterUse("noir", -0.5, "11"), AdapterUse("pixel-art", 0.8, "22"))
    written = [{"name": "noir", "scale": -0.5}, {"name": "pixel-art", "scale": 0.8}]
    assert json.loads(described(make_job(), adapters=uses)["adapters"]) == written
    assert "adapters" not in described(make_job())


def test_a_mix_is_written_as_it_is_asked_for(make_job: Callable[..., Job]) -> None:
    mixed = (ConditionTerm((1, None), 0.25), ConditionTerm((None, 1), 1.0, "on a table"))
    metadata = described(make_job(), condition=mixed, mix="spherical")
    first, second = json.loads(metadata["condition"])
    assert first == {"label": "strawberry", "weight": 0.25}
    assert second == {"style": "twemoji", "text": "on a table"}
    assert metadata["mix"] == "spherical"


def test_a_class_that_was_not_given_is_told_where_there_is_a_default(make_job: Callable[..., Job]) -> None:
    usual = [FACTORS[0], FACTORS[1].model_copy(update={"default": FACTORS[1].classes[0]})]
    job = replace(make_job(), condition=(ConditionTerm((1, None)),))
    assert json.loads(describe(job, FINISHED, 7, usual)["condition"]) == {
        "label": "strawberry",
        "style": None,
    }


def test_a_picture_is_drawn_again_with_the_steps_and_the_strength_that_were_asked(
    make_job: Callable[..., Job],
) -> None:
    job = make_job(source=SourcePicture(b"", None, 0.4))
    rung = Rung("ddim-20", "ddim", 20, "trailing", (0.0, 1.0), 0.0, strength=0.4)
    finished = cast(Finished, SimpleNamespace(latent=LATENT, steps_used=8, rung=rung))
    metadata = describe(job, finished, 7, FACTORS)
    assert (metadata["steps"], metadata["strength"]) == ("20", "0.4")
    # One that was moved under way took steps of two rungs.
    moved = cast(Finished, SimpleNamespace(latent=LATENT, steps_used=10, rung=rung))
    assert describe(job, moved, 7, FACTORS)["steps"] == "10"


def test_a_job_whose_picture_is_encoded_is_where_it_was(make_job: Callable[..., Job]) -> None:
    """It is not in the engine yet, and handed back it keeps what an earlier worker did of it."""
    job = make_job(seeds=(1, 2), source=SourcePicture(b"", None, 0.4))
    claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=False)
    states = [SNAPSHOT, None]
    running, jobs = RunningJob(claim, Ladder(()), claimed_at=0.0, states=states), RunningJobs()
    jobs.add(running)
    assert jobs.samples_in_engine == 0
    assert running.sample_states({}) == states
    source = SourceLatent(np.zeros((3, 4, 6), np.float32))
    assert [(request.source, state) for request, state in running.join(source)] == [
        (source, SNAPSHOT),
        (source, None),
    ]
    assert jobs.samples_in_engine == 2
    assert running.sample_states({}) == [None, None]


BETTER, WORSE = (
    Rung(f"ddim-{steps}", "ddim", steps, "leading", (0.0, 1.0), quality)
    for steps, quality in ((10, 0.1), (4, 0.9))
)


def rungs(job: Job, ladder: Ladder) -> set[tuple[Rung | None, Rung]]:
    claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=False)
    running = RunningJob(claim, ladder, claimed_at=0.0, states=[None] * len(job.seeds))
    return {(request.requested, request.rung) for request, _ in running.starts}


def test_a_job_brings_its_rungs_whatever_ladder_its_worker_has(make_job: Callable[..., Job]) -> None:
    job = make_job(rung=WORSE.name, requested=BETTER, admitted=WORSE)
    assert rungs(job, Ladder(())) == {(BETTER, WORSE)}


def test_a_job_of_an_earlier_release_is_looked_up_on_the_ladder(make_job: Callable[..., Job]) -> None:
    ladder = Ladder((BETTER, WORSE))
    assert rungs(make_job(rung=WORSE.name), ladder) == {(BETTER, WORSE)}
    assert rungs(make_job(rung=None), ladder) == {(BETTER, BETTER)}


def test_a_file_says_how_guidance_decayed_and_what_it_subtracted(make_job: Callable[..., Job]) -> None:
    rung = replace(FINISHED.rung, guidance_decay=0.75)
    finished = cast(Finished, SimpleNamespace(latent=LATENT, steps_used=8, rung=rung))
    terms = (ConditionTerm((1, None), 1.5), ConditionTerm((0, None), -0.5))
    job = make_job(condition=terms, mix="compose", negative_prompt="fog\0")
    metadata = describe(job, finished, 7, FACTORS)
    assert [term["weight"] for term in json.loads(metadata["condition"])] == [1.5, -0.5]
    assert (metadata["mix"], metadata["guidance_decay"], metadata["negative_prompt"]) == (
        "compose",
        "0.75",
        '"fog\\u0000"',
    )
    assert not {"guidance_decay", "negative_prompt"} & described(make_job()).keys()


def test_a_clip_says_its_frames_and_a_rate_if_it_plays(make_job: Callable[..., Job]) -> None:
    clip = cast(Finished, SimpleNamespace(latent=np.zeros((3, 6, 8, 8)), steps_used=8, rung=FINISHED.rung))
    for fps, told in ((12.5, {"frames": "6", "fps": "12.5"}), (0.0, {"frames": "6"})):
        metadata = describe(make_job(fps=fps), clip, 7, FACTORS)
        assert {name: metadata[name] for name in ("frames", "fps") if name in metadata} == told
    assert not {"frames", "fps"} & describe(make_job(), FINISHED, 7, FACTORS).keys()


def test_a_job_counts_its_rows_by_their_tokens(make_job: Callable[..., Job]) -> None:
    for row_cost, windows, rows in ((2.0, 0, 8), (0.3, 0, 2), (3.0, 3, 12), (0.0, 3, 12), (0.0, 0, 4)):
        job = make_job(seeds=(1, 2), guidance_scale=2.0, row_cost=row_cost, windows=windows)
        claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=False)
        assert RunningJob(claim, Ladder(()), claimed_at=0.0, states=[None, None]).rows == rows


def test_a_composed_job_takes_a_row_for_each_condition(make_job: Callable[..., Job]) -> None:
    terms = tuple(ConditionTerm((k,)) for k in (0, 1, 0))
    for scale, mix, rows in ((2.0, "compose", 8), (1.0, "compose", 6), (2.0, "layers", 4)):
        job = make_job(condition=terms, mix=mix, guidance_scale=scale, seeds=(1, 2), negative_prompt="fog")
        claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=False)
        running = RunningJob(claim, Ladder(()), claimed_at=0.0, states=[None, None])
        assert running.rows == rows
        assert {(request.mix, request.negative_prompt) for request in running.requests} == {(mix, "fog")}


def test_samples_have_the_weight_of_their_jobs_priority(make_job: Callable[..., Job]) -> None:
    job = make_job(caller="alice", priority="high")
    claim = Claim(job, Lease(job.id, "w1", 1), run_isolated=False)
    running = RunningJob(claim, Ladder(()), claimed_at=0.0, states=[None])
    assert [(request.caller, request.weight) for request in running.requests] == [("alice", 4.0)]


def of_samples(make_job: Callable[..., Job], samples: int) -> RunningJob:
    claim = Claim(make_job(seeds=tuple(range(samples))), Lease("job", "w1", 1), run_isolated=False)
    return RunningJob(claim, Ladder(()), claimed_at=0.0, states=[None] * samples)


def test_a_job_of_several_samples_moves_while_any_of_them_does(make_job: Callable[..., Job]) -> None:
    job = of_samples(make_job, 4)
    names = [request.id for request in job.requests]
    engine = dict.fromkeys(names, (0, 20))
    told = [job.step(engine)]
    for name in names[:3]:
        for step in range(1, 21):
            engine[name] = (step, 20)
            told.append(job.step(engine))
        del engine[name]
        job.finish(cast(Finished, SimpleNamespace(id=name)), at=0.0)
        assert job.step(engine) == told[-1]
    assert told == sorted(told)
    assert {step for step, _ in told} == set(range(16))
    assert job.step({names[3]: (10, 20)}) == (17, 20)
    assert job.step({}) == (0, 0)


def test_progress_never_goes_back(make_job: Callable[..., Job]) -> None:
    told: list[tuple[int, int]] = []

    class Listening(ProgressEvents):
        def _publish(self, job: RunningJob, kind: EventKind, data: dict[str, Any]) -> None:
            told.append((data["step"], data["steps"]))

    job = of_samples(make_job, 1)
    (request,) = job.requests
    events = Listening(cast(Broker, None), step_event_s=0.0)
    # Degraded from 20 to 10 steps, and given 20 again at step 7.
    for number, sample in enumerate([(4, 20), (5, 10), (7, 10), (8, 20), (12, 20), (14, 20), (15, 20)], 1):
        events.steps([job], {request.id: sample}, float(number))
    assert told == [(4, 20), (5, 10), (7, 10), (14, 20), (15, 20)]
