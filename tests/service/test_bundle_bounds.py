"""A manifest is refused with one sentence that names its field, or the service can work with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditserve.model.spec.bundle import parse_manifest
from ditserve.model.spec.class_names import class_reference
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest
from ditserve.service.engine.trajectory import make_trajectory
from ditserve.service.http.sizes import AskedSize, in_windows, size_text
from ditserve.service.identity import bundle_digest, vocabulary_digest
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Consent, Rung
from ditserve.service.vocabulary import Vocabulary
from tests.service.tiny_bundle import MANIFEST

SOURCE = Path("model/manifest.json")
RUN = {"solver": "ddim", "steps": 10, "grid": "trailing"}
WHOLE: dict[str, Any] = {
    **MANIFEST.model_dump(mode="json"),
    "decoder": "sd-vae",
    "diffusion": {**MANIFEST.diffusion.model_dump(mode="json"), "clip_x0": False},
    "latents": {"shift": [0.0, 0.1, 0.2], "scale": [1.0, 2.0, 3.0], "factor": 8},
    "ladder": [
        {**RUN, "name": "ddim-10", "rows": 20.0, "quality": 0.1},
        {**RUN, "name": "listed-2", "steps": 2, "grid": "999,400", "rows": 4.0, "quality": 0.2},
    ],
    "golden": {**RUN, "condition": {"label": "a"}, "seed": 7, "guidance_scale": 2.0},
    "provenance": {"training": {"data": {"text": None}}},
    "metrics": {"loss": 0.5},
    "files": {"backbone.onnx": {"sha256": "0" * 64, "bytes": 3}},
}
# fmt: off
HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 7, 999, 1000, 1001, 2**16, 2**31, 2**53, 2**63, 10**30, 10**400,
    0.0, -0.0, 0.5, 1.5, -3.5, 21.0, 1e-300, 5e-324, 1e20, 1e300, float("nan"), float("inf"), -float("inf"),
    "", " ", "a", "\ud800", "\0", "new\nline", "x" * 20_000, "٣", "ddpm", "dpmpp-2m", "unipc-2", "cosine",
    "flow", "linear", "sigma", "uniform", "0.9,0.5", "leading", "ddim-stride", "999,998", "3,3", "1e9",
    "9" * 5000, "sd-vae", "identity", "text",
    [], [1], [0, 0], [1, 0], [0.5, 0.5], [2**31, 2**31], [8, 8], [[]], ["a", "a"], [None], [1e999, 1.0],
    {}, {"a": 1}, {"training": 3}, {"training": {"data": {"text": 3}}}, {"training": {"data": []}},
    {"\ud800": 1.0}, {"label": "nobody"}, {"deep": json.loads("[" * 300 + "]" * 300)},
)
# fmt: on


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every value in a JSON document."""
    inner: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(found for key, part in inner for found in paths(part, (*path, key)))]


def changed(changes: list[tuple[tuple[str | int, ...], Any]]) -> dict[str, Any]:
    """Return the manifest with other values; a path that an earlier change took away is skipped."""
    data = copy.deepcopy(WHOLE)
    for (*parents, last), value in changes:
        target: Any = data
        try:
            for key in parents:
                target = target[key]
            target[last] = copy.deepcopy(value)
        except (LookupError, TypeError):
            continue
    return data


def work_with(manifest: Manifest) -> None:
    """Compute what the API and a worker compute of a manifest before any network runs."""
    assert bundle_digest(manifest) != vocabulary_digest(manifest)
    ladder, defaults = Ladder.from_manifest(manifest), manifest.defaults
    default = ladder.requested(
        defaults.solver, defaults.steps, defaults.grid, defaults.guidance_interval, guided=True
    )
    runs = [(rung, defaults.guidance_scale) for rung in (default, *ladder.rungs)]
    if manifest.golden is not None:
        golden = manifest.golden
        rung = Rung("golden", golden.solver, golden.steps, golden.grid, (0.0, 1.0), 0.0)
        runs.append((rung, golden.guidance_scale))
    for rung, scale in runs:
        trajectory = make_trajectory(rung, scale, manifest.diffusion.noise_schedule())
        coefficients = trajectory.rows[:, :7]  # the others are -inf where no variance was learned
        assert np.isfinite(coefficients).all()
        assert len(trajectory) == rung.steps
        assert ladder.row_steps(rung, scale) >= rung.steps
        ladder.below(rung, Consent())
    vocabulary = Vocabulary(manifest.factors)
    vocabulary.term({factor.name: class_reference(factor, 0) for factor in manifest.factors}, 1.0)
    vocabulary.term(dict(manifest.golden.condition) if manifest.golden else {}, 1.0)
    height, width = (2 * side * manifest.upscale for side in manifest.config.image_size)
    assert in_windows(AskedSize(f"{width}x{height}"), manifest, max_area=4.0).windows
    assert size_text(manifest)
    assert sum(int(np.prod(tensor.shape)) for tensor in manifest.state) >= 0


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(paths(WHOLE)[1:]), st.sampled_from(HOSTILE)), min_size=1, max_size=2)
)
@example([(("diffusion", "timesteps"), 9)])
@example([(("diffusion", "log_snr_shift"), 20.0), (("diffusion", "schedule"), "linear")])
def test_any_manifest_is_refused_in_one_sentence_or_works(
    changes: list[tuple[tuple[str | int, ...], Any]],
) -> None:
    raw = json.dumps(changed(changes)).encode()
    try:
        manifest = parse_manifest(raw, SOURCE)
    except BundleError as error:
        sentence = str(error)
        assert sentence.startswith(f"{SOURCE}"), sentence
        assert "field " in sentence or "JSON" in sentence or "schema_version" in sentence, sentence
        assert "\n" not in sentence
        assert len(sentence) < 1000
    else:
        work_with(manifest)


def test_the_whole_manifest_works() -> None:
    work_with(parse_manifest(json.dumps(WHOLE).encode(), SOURCE))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("defaults", "steps"), 1001, "field defaults: steps must be in 1..1000, not 1001"),
        (("ladder", 1, "steps"), 3, "field ladder.1: the explicit grid has 2 timesteps, but 3 steps"),
        (
            ("diffusion", "step_counts"),
            [10],
            "field ladder.1: this model was trained for runs of 10 steps, not 2",
        ),
        (("ladder", 0, "solver"), "heun", "field ladder.0: solver must be one of ddim"),
        (("golden", "grid"), "spiral", "field golden: grid must be one of"),
        (("defaults", "guidance_scale"), float("nan"), "is not valid JSON: NaN is no number of JSON"),
        (("defaults", "guidance_scale"), 1e5, "field defaults.guidance_scale"),
        (("defaults", "guidance_interval"), [0.8, 0.2], "field defaults.guidance_interval: must satisfy"),
        (("golden", "condition", "label"), "z", "field golden.condition: This model has no label 'z'"),
        (("golden", "seed"), -1, "field golden.seed"),
        (
            ("factors", 0, "classes"),
            ["a"],
            "field factors: they have [1, 2] classes",
        ),
        (("factors", 1, "name"), "label", "field factors: two have one name"),
        (("factors",), [], "field factors: they have [] classes"),
        (("description",), "\ud800", "field description"),
        (("provenance", "note"), "\ud800", "field provenance: cannot be written as JSON"),
        (("provenance", "training", "data"), 3, "field provenance: training.data must be an object"),
        (("config", "image_size"), [2**30, 2**30], "field config: image_size may be at most 1048576"),
        (("config", "image_size"), [2**18, 2**18], "field config: image_size 262144x262144 of 3 channels"),
        (("config", "depth"), 10**6, "field config: depth may be at most 1000"),
        (("latents", "scale"), [1.0], "field latents.scale: 1 channels do not fit config.in_channels, 3"),
        (("latents", "factor"), 10**6, "field latents.factor"),
        (("state", 0, "shape"), [2**20, 2**20], "field state: a row has more than"),
        (("state", 0, "shape"), [0], "field state.0.shape.0"),
        (("embedding_size",), 0, "field embedding_size"),
        (("diffusion", "guidance_channels"), 9, "field diffusion.guidance_channels: 9 channels do not fit"),
        (("diffusion", "timesteps"), 10**9, "field diffusion.timesteps"),
        (("diffusion", "log_snr_shift"), 1e3, "field diffusion.log_snr_shift"),
        (("files", "backbone.onnx", "bytes"), -1, "field files.backbone.onnx.bytes"),
    ],
)
def test_each_refusal_names_its_field(path: tuple[str | int, ...], value: Any, sentence: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(changed([(path, value)])).encode(), SOURCE)
    assert sentence in str(caught.value)


EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
# The whole manifest, of a flow.
FLOW: list[tuple[tuple[str | int, ...], Any]] = [
    (("diffusion",), {"schedule": "flow", "prediction": "flow", "clip_x0": False}),
    (("ladder",), [{**WHOLE["ladder"][0], "solver": "euler", "grid": "uniform", "steps": 4}]),
    *(((run, "solver"), "euler") for run in ("defaults", "golden")),
    *(((run, "grid"), "uniform") for run in ("defaults", "golden")),
]


def test_the_whole_manifest_of_a_flow_works() -> None:
    work_with(parse_manifest(json.dumps(changed(FLOW)).encode(), SOURCE))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("diffusion", "sigma_grid"), {"shift": 0}, "field diffusion.sigma_grid: shift must be above 0"),
        (("diffusion", "sigma_grid"), {"shfit": 2}, "field diffusion.sigma_grid.shfit"),
        (("diffusion", "sigma_grid"), {"scheduler": {**EULER, "shift": -1.0}}, "field shift: Input"),
        (("diffusion", "sigma_grid"), {"scheduler": {**EULER, "shfit": 1.0}}, "field shfit: a FlowMatch"),
        (("diffusion", "sigma_grid"), {"scheduler": EULER, "tokns": 3}, "field diffusion.sigma_grid.tokns"),
        (("diffusion", "step_counts"), [4], "field defaults: this model was trained for runs of 4 steps"),
        (("diffusion", "step_counts"), [10], "field ladder.0: this model was trained for runs of 10 steps"),
        (("diffusion", "noise_scale"), 0, "field diffusion.noise_scale"),
        (("ladder", 0, "guidance_interval"), [0.9, 0.1], "field ladder.0.guidance_interval: must satisfy"),
        (("ladder", 0, "grid"), "1.5,0.5,0.2,0.1", "field ladder.0: a grid must be one or more noise levels"),
        (("ladder", 0, "grid"), "1,0.5,0.2,-0.1", "field ladder.0: a grid must be one or more noise levels"),
    ],
)
def test_each_refusal_of_a_flow_names_its_field(
    path: tuple[str | int, ...], value: Any, sentence: str
) -> None:
    with pytest.raises(BundleError) as caught:
        parse_manifest(json.dumps(changed([*FLOW, (path, value)])).encode(), SOURCE)
    assert sentence in str(caught.value)
