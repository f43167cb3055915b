"""Several conditions, decaying guidance and negative prompts, by either door."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from ditserve.service.jobs import ConditionTerm, Job
from tests.service.http.conftest import MANIFEST, OpenStage, Stage

pytestmark = pytest.mark.anyio
OPENAI = "/v1/images/generations"
LEMON, APPLE = {"label": "lemon"}, {"label": "apple"}
COMPOSED: dict[str, Any] = {
    "condition": [{**LEMON, "weight": 1.5}, {**APPLE, "weight": -0.5}],
    "mix": "compose",
}


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **changes}))
    return folder


def config(**changes: Any) -> dict[str, Any]:
    return {"config": {**MANIFEST["config"], **changes}}


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model of three blocks that takes text."""
    return write(tmp_path_factory.mktemp("conditions") / "text", **config(text_size=8, depth=3))


def submitted(stage: Stage) -> Job:
    return stage.worker.claimed[-1].job


async def test_composed_conditions_cost_a_row_each(stage: Stage) -> None:
    await stage.generate(condition=LEMON, guidance_interval=[0.0, 0.5])
    one = submitted(stage)
    answer = await stage.generate(**COMPOSED, guidance_interval=[0.0, 0.5], n=2)
    assert answer.status_code == 200, answer.text
    job = submitted(stage)
    assert job.condition == (ConditionTerm((3, None), 1.5), ConditionTerm((0, None), -0.5))
    assert (job.mix, job.composed, job.oldest_version) == ("compose", 2, 2)
    # One more row at each of 20 steps, guidance as before, and two images.
    assert (job.cost_rows, job.floor_rows) == (2 * (one.cost_rows + 20), 2 * (one.floor_rows + 5))


async def test_one_condition_is_the_same_however_it_is_combined(stage: Stage) -> None:
    for mix, weight in (("compose", 0.5), ("layers", 1), ("spherical", 3)):
        assert (await stage.generate(condition=[{**LEMON, "weight": weight}], mix=mix)).status_code == 200
        job = submitted(stage)
        assert (job.mix, job.composed, job.oldest_version) == ("linear", 1, 1)


async def test_layers_follow_the_blocks(stage: Stage) -> None:
    assert (await stage.generate(condition=[LEMON, {"style": "noto"}], mix="layers")).status_code == 200
    job = submitted(stage)
    assert (job.mix, job.cost_rows, job.oldest_version) == ("layers", 40, 2)


@pytest.mark.parametrize("path", ["/generate", OPENAI])
async def test_decay_and_negative_prompt_reach_the_job_by_either_door(stage: Stage, path: str) -> None:
    options = {"guidance_decay": 0.75, "negative_prompt": " a blurred picture ", "guidance_scale": 3}
    body = {"condition": LEMON} if path == "/generate" else {"prompt": "a lemon"}
    answer = await stage.client.post(path, json={**body, **options})
    assert answer.status_code == 200, answer.text
    job = submitted(stage)
    assert job.requested is not None
    assert job.admitted is not None
    assert job.requested.guidance_decay == job.admitted.guidance_decay == 0.75
    assert (job.negative_prompt, job.cost_rows, job.oldest_version) == ("a blurred picture", 40, 2)


async def test_a_degraded_job_keeps_its_decay_and_its_conditions(stage: Stage) -> None:
    """20 steps are 60 rows, which take 3 s; 5 steps are 15 rows and fit."""
    await stage.worker.report(step_per_row_s=0.05, max_rows=1)
    answer = await stage.generate(**COMPOSED, guidance_decay=1.5, deadline_ms=1500)
    assert answer.status_code == 200, answer.text
    job = submitted(stage)
    assert job.admitted is not None
    assert (job.rung, job.admitted.steps, job.admitted.guidance_decay) == ("floor", 5, 1.5)
    assert (job.composed, job.cost_rows) == (2, 15)


async def test_what_says_nothing_new_is_a_job_for_every_release(stage: Stage) -> None:
    # Without guidance nothing decays.
    await stage.generate(condition=LEMON, guidance_decay=2.0, guidance_scale=1.0)
    assert submitted(stage).oldest_version == 1
    await stage.generate(condition=LEMON, negative_prompt="  ", guidance_decay=-0.0)
    assert submitted(stage).oldest_version == 1


async def test_guiding_nothing_costs_nothing(stage: Stage) -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"condition": [{}, {}], "mix": "layers"},
        {"condition": {"text": "fog"}, "negative_prompt": "fog"},
    ]
    for unguided in bodies:
        await stage.generate(**unguided)
        assert (submitted(stage).guidance_scale, submitted(stage).cost_rows) == (1.0, 20)
    await stage.generate(negative_prompt="fog")
    assert (submitted(stage).guidance_scale, submitted(stage).cost_rows) == (2.0, 40)


def detail(answer: httpx.Response) -> str:
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["code"] == "invalid-request"
    return str(problem["detail"])


TWO = [LEMON, APPLE]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"condition": [{**LEMON, "weight": -1}]}, 'condition: A negative weight needs "mix": "compose"'),
    ({"condition": [{**LEMON, "weight": -1}], "mix": "compose"}, "must sum to more than 0, not -1"),
    ({"condition": COMPOSED["condition"]}, 'condition: A negative weight needs "mix": "compose"'),
    ({"condition": [LEMON, {**APPLE, "weight": -1}], "mix": "compose"}, "must sum to more than 0, not 0"),
    ({"condition": [LEMON, {**APPLE, "weight": -2}], "mix": "compose"}, "must sum to more than 0, not -1"),
    (
        {"condition": [{**LEMON, "weight": 1000}, {**APPLE, "weight": -999.9}], "mix": "compose"},
        "condition: The weights nearly cancel: none may be more than 100 times their sum.",
    ),
    (
        {"condition": [{**LEMON, "weight": 2}, APPLE], "mix": "layers"},
        "Conditions in layers have no weights",
    ),
    ({"condition": [LEMON] * 4, "mix": "layers"}, "mix: 3 blocks can follow 1 to 3 conditions, not 4."),
    (
        {"negative_prompt": "fog", "guidance_scale": 1},
        "negative_prompt: Only guidance subtracts it",
    ),
]


@pytest.mark.parametrize(("body", "message"), REFUSED)
async def test_what_cannot_be_combined_is_refused(stage: Stage, body: dict[str, Any], message: str) -> None:
    assert message in detail(await stage.generate(**{"condition": LEMON, **body}))
    assert not stage.worker.claimed


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"mix": "stir"}, "#/mix"),
        ({"condition": [{**LEMON, "weight": -0.0}, APPLE], "mix": "compose"}, "#/condition/0/weight"),
        ({"condition": [{**LEMON, "weight": -1001}, APPLE], "mix": "compose"}, "#/condition/0/weight"),
        ({"condition": [LEMON] * 9, "mix": "compose"}, "#/condition"),
        ({"guidance_decay": 20.5}, "#/guidance_decay"),
        ({"guidance_decay": None}, "#/guidance_decay"),
        ({"negative_prompt": 7}, "#/negative_prompt"),
        ({"negative_prompt": "x" * 2001}, "#/negative_prompt"),
    ],
)
async def test_a_wrong_field_is_named(stage: Stage, body: dict[str, Any], pointer: str) -> None:
    answer = await stage.generate(**{"condition": LEMON, **body})
    assert detail(answer)
    assert answer.json()["errors"][0]["pointer"].startswith(pointer)


async def test_a_model_refuses_what_it_cannot_do(open_stage: OpenStage, tmp_path: Path) -> None:
    tokens = await open_stage(
        bundle=write(tmp_path / "tokens", **config(depth=3, blocks=["cross_attention"]))
    )
    assert "mix: Blocks that read the condition as tokens" in detail(
        await tokens.generate(condition=TWO, mix="layers")
    )
    assert "negative_prompt: This model takes no text" in detail(
        await tokens.generate(condition=LEMON, negative_prompt="fog")
    )
    refused = await tokens.client.post(OPENAI, json={"prompt": "a lemon", "negative_prompt": "fog"})
    assert (refused.status_code, "takes no text" in refused.text) == (400, True)
    defaults = {**MANIFEST["defaults"], "guidance_scale": 1.0}
    unguided = await open_stage(bundle=write(tmp_path / "none", guidance="none", defaults=defaults))
    assert "guidance_scale: No unconditional prediction of this model was trained" in detail(
        await unguided.generate(condition=LEMON, guidance_scale=2)
    )
    assert (await unguided.generate(**COMPOSED)).status_code == 200
    assert (await unguided.generate(condition=LEMON, guidance_scale=1)).status_code == 200


async def test_a_prompt_is_the_classes_that_it_tells_or_a_text(stage: Stage) -> None:
    assert (await stage.generate(condition={}, prompt=" a red fox ")).status_code == 200
    assert submitted(stage).condition == (ConditionTerm((None, None), text="a red fox"),)
    assert (await stage.generate(condition={}, prompt="a lemon")).status_code == 200
    assert submitted(stage).condition == (ConditionTerm((3, None)),)
    assert (await stage.generate(condition={"text": "a lemon"})).status_code == 200
    assert submitted(stage).condition == (ConditionTerm((None, None), text="a lemon"),)
    # A class beside the prompt is certain.
    assert (await stage.generate(condition=LEMON, prompt="a red fox")).status_code == 200
    assert submitted(stage).condition == (ConditionTerm((3, None), text="a red fox"),)
    for condition in ({"text": "a lemon"}, [LEMON]):
        refused = await stage.generate(condition=condition, prompt="a fox")
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == "#/prompt"


async def test_emoji_are_read_by_their_names_and_words_are_counted(stage: Stage) -> None:
    drawn = await stage.client.post("/v1/images/generations", json={"prompt": "a 🐱 with 🕶️"})
    assert submitted(stage).condition[0].text == "a cat face with dark sunglasses"
    assert drawn.json()["usage"]["input_tokens_details"]["text_tokens"] == 6
    await stage.client.post("/generate", json={"condition": {"text": "🐱" * 1000}, "negative_prompt": "❤️"})
    job = submitted(stage)
    assert (len(job.condition[0].text), job.negative_prompt) == (2000, "heart")


async def test_a_prompt_names_classes_where_there_is_no_text(open_stage: OpenStage, tmp_path: Path) -> None:
    labels = await open_stage(bundle=write(tmp_path / "labels"))
    assert (await labels.generate(condition={}, prompt="two lemons")).status_code == 200
    assert submitted(labels).condition == (ConditionTerm((3, None)),)


async def test_guidance_that_the_network_is_told(open_stage: OpenStage, tmp_path: Path) -> None:
    defaults = {**MANIFEST["defaults"], "guidance_scale": 1.0}
    told: dict[str, Any] = {"guidance": "embedded", "guidance_embedded": 3.5, "defaults": defaults}
    stage = await open_stage(bundle=write(tmp_path / "told", **config(text_size=8), **told))
    assert (await stage.generate(condition={}, prompt="a fox")).status_code == 200
    assert submitted(stage).guidance_embedded == 3.5
    assert submitted(stage).guidance_scale == 1.0
    assert (await stage.generate(condition={}, prompt="a fox", guidance_embedded=2.0)).status_code == 200
    assert submitted(stage).guidance_embedded == 2.0
    for wrong in ({"guidance_scale": 3.0}, {"negative_prompt": "fog"}):
        refused = await stage.generate(condition={}, prompt="a fox", **wrong)
        assert refused.status_code == 422
        assert refused.json()["errors"][0]["pointer"] == f"#/{next(iter(wrong))}"


async def test_guidance_that_a_network_is_not_told_is_refused(stage: Stage) -> None:
    refused = await stage.generate(condition={}, prompt="a fox", guidance_embedded=2.0)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "#/guidance_embedded"


async def test_conditions_are_composed_by_either_door(stage: Stage) -> None:
    for path in ("/generate", OPENAI):
        answer = await stage.client.post(path, json={**COMPOSED, "seed": 7, "guidance_decay": 0.75})
        assert answer.status_code == 200, answer.text
    ours, theirs = (claim.job for claim in stage.worker.claimed[-2:])
    assert (theirs.mix, theirs.condition, theirs.requested) == (ours.mix, ours.condition, ours.requested)
    assert theirs.composed == 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: Give a prompt, or a condition in its place."),
        ({"prompt": ""}, "prompt: Give a prompt, or a condition in its place."),
        ({"prompt": "a lemon", **COMPOSED}, "prompt: Give a prompt or a list of conditions, not both."),
        ({**COMPOSED, "mix": "linear"}, 'condition: A negative weight needs "mix": "compose"'),
    ],
)
async def test_openai_refuses_conditions_in_a_sentence(
    stage: Stage, body: dict[str, Any], sentence: str
) -> None:
    answer = await stage.client.post(OPENAI, json=body)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]
