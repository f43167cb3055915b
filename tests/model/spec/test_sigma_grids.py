"""Grids of flow models against those of diffusers' schedulers and pipelines, and by their own rules."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ditserve.model.spec.diffusion import RectifiedFlow
from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.flow_grids import flow_grid, flow_regrid
from ditserve.model.spec.scheduler_config import GridReading, SchedulerConfigError, read_scheduler_config
from ditserve.model.spec.sigma_grids import SPACINGS, DynamicShift, SigmaGrid, beta_quantile

reference: Any = diffusers  # untyped
COUNTS = [1, 2, 3, 4, 5, 7, 8, 10, 16, 20, 28, 50, 99, 333, 1000]
TOLERANCE = 1e-6
# Theirs, of numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def fields(name: str, **config: Any) -> dict[str, Any]:
    """Return the content of a `scheduler_config.json`, all defaults spelled out, as diffusers writes it."""
    return dict(getattr(reference, name)(**config).config) | {"_class_name": name}


def theirs(name: str, steps: int, *, mu: float | None = None, sigmas: Any = None, **config: Any) -> Any:
    """Return the sigmas of a diffusers scheduler, without the clean end."""
    scheduler = getattr(reference, name)(**config)
    options = {"mu": mu} if mu is not None else {}
    options |= {"sigmas": sigmas} if sigmas is not None else {}
    scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {}), **options)
    return scheduler.sigmas[:-1].numpy()


EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
UNIPC, DPM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
STATIC = [
    (EULER, {}),
    (EULER, {"shift": 3.0}),
    (EULER, {"shift": 0.5, "num_train_timesteps": 500}),
    (EULER, {"shift": 3.0, "use_karras_sigmas": True}),
    (EULER, {"shift": 3.0, "use_exponential_sigmas": True}),
    (EULER, {"shift": 3.0, "use_beta_sigmas": True}),
    (UNIPC, FLOW),
    (UNIPC, {**FLOW, "flow_shift": 5.0}),
    (UNIPC, {**FLOW, "flow_shift": 3.0, "shift_terminal": 0.05}),
    (DPM, FLOW),
    (DPM, {**FLOW, "flow_shift": 3.0, "algorithm_type": "dpmsolver++"}),
]


@pytest.mark.parametrize(("name", "config"), STATIC)
def test_static_grids_are_those_of_diffusers_for_every_number_of_steps(
    name: str, config: dict[str, Any]
) -> None:
    grid = read_scheduler_config(fields(name, **config))
    for steps in COUNTS:
        # There a single step that is stretched divides 0 by 0.
        if steps > 1 or "shift_terminal" not in config:
            np.testing.assert_allclose(
                grid.sigmas(steps), theirs(name, steps, **config), rtol=0, atol=TOLERANCE
            )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_of_heun_is_that_of_diffusers(shift: float) -> None:
    grid = read_scheduler_config(fields(HEUN, shift=shift))
    for steps in COUNTS:
        twice = theirs(HEUN, steps, shift=shift)
        np.testing.assert_allclose(grid.sigmas(steps), [twice[0], *twice[1::2]], rtol=0, atol=TOLERANCE)


DYNAMIC: list[dict[str, Any]] = [
    {},
    {"time_shift_type": "linear"},
    {"shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192},
    {"use_karras_sigmas": True},
    {"use_beta_sigmas": True, "shift_terminal": 0.1},
]


@pytest.mark.parametrize("config", DYNAMIC)
@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 16384])
def test_dynamic_shifts_are_those_of_diffusers_for_every_number_of_tokens(
    config: dict[str, Any], tokens: int
) -> None:
    config = {"use_dynamic_shifting": True, **config}
    own = fields(EULER, **config)
    slope = (own["max_shift"] - own["base_shift"]) / (own["max_image_seq_len"] - own["base_image_seq_len"])
    mu = own["base_shift"] + slope * (tokens - own["base_image_seq_len"])
    scheduler = read_scheduler_config(own, GridReading(tokens))
    pipeline = read_scheduler_config(own, GridReading(tokens, ends="pipeline"))
    for steps in COUNTS:
        if steps == 1 and "shift_terminal" in config:
            continue
        expected = theirs(EULER, steps, mu=mu, **config)
        np.testing.assert_allclose(scheduler.sigmas(steps), expected, rtol=0, atol=TOLERANCE)
        # As the pipelines of FLUX and Qwen-Image call it.
        line = np.linspace(1.0, 1.0 / steps, steps)
        expected = theirs(EULER, steps, mu=mu, sigmas=line, **config)
        np.testing.assert_allclose(pipeline.sigmas(steps), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [UNIPC, DPM])
def test_dynamic_shifts_of_multistep_schedulers_are_those_of_diffusers(name: str) -> None:
    config = {**FLOW, "use_dynamic_shifting": True}
    grid = read_scheduler_config(fields(name, **config), GridReading(4096))
    for steps in COUNTS:
        expected = theirs(name, steps, mu=1.15, **config)
        np.testing.assert_allclose(grid.sigmas(steps), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tokens", [256, 4096, 4300, 4301, 16384])
def test_the_shift_of_flux2_is_that_of_its_pipeline(tokens: int) -> None:
    own = fields(EULER, use_dynamic_shifting=True)
    grid = read_scheduler_config(own, GridReading(tokens, ends="pipeline", mu="flux2"))
    for steps in COUNTS:
        line, mu = np.linspace(1.0, 1.0 / steps, steps), compute_empirical_mu(tokens, steps)
        expected = theirs(EULER, steps, mu=mu, sigmas=line, use_dynamic_shifting=True)
        # The line is rounded to float32 there, which a large shift makes visible.
        atol = max(TOLERANCE, 1.5e-8 * steps)
        np.testing.assert_allclose(grid.sigmas(steps), expected, rtol=0, atol=atol)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.sampled_from(SPACINGS),
    st.floats(0.05, 20.0),
    st.sampled_from([None, 0.01, 0.3]),
    st.booleans(),
)
def test_every_number_of_steps_gives_decreasing_sigmas_from_noise(
    steps: int, spacing: Any, shift: float, terminal: float | None, reaches_last: bool
) -> None:
    last = 0.001 if reaches_last else 0.0
    grid = SigmaGrid(spacing=spacing, shift=shift, terminal=terminal, last=last, reaches_last=reaches_last)
    sigmas = np.array(grid.sigmas(steps))
    assert sigmas.shape == (steps,)
    assert sigmas[0] == 1.0
    assert np.all(np.diff(sigmas) < 0.0)
    assert sigmas[-1] > 0.0
    if terminal is not None and steps > 1:
        assert sigmas[-1] == pytest.approx(terminal)


def test_the_examples_of_the_docstring() -> None:
    assert SigmaGrid().sigmas(4) == (1.0, 0.75, 0.5, 0.25)
    assert SigmaGrid(shift=3.0).sigmas(4) == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert DynamicShift().shift(256, 1) == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("a", [0.6, 0.9])
def test_beta_quantiles_are_those_of_scipy(a: float) -> None:
    share = np.array([0.0, 1e-9, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0])
    np.testing.assert_allclose(beta_quantile(share, a), scipy.stats.beta.ppf(share, a, a), atol=1e-10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "field _class_name: 'DDIMScheduler' gives no grid of a flow"),
        ({}, "field _class_name: 'None'"),
        ({"_class_name": EULER, "shfit": 3.0}, "field shfit: a FlowMatchEuler.* has no such field"),
        ({"_class_name": EULER, "shift": 0}, "field shift: .*greater than 0"),
        ({"_class_name": EULER, "shift": -1.0}, "field shift: .*greater than 0"),
        ({"_class_name": EULER, "shift": math.nan}, "field shift: .*finite"),
        ({"_class_name": EULER, "shift": "3"}, "field shift: .*number"),
        ({"_class_name": EULER, "shift_terminal": 1.5}, "field shift_terminal: .*less than 1"),
        ({"_class_name": EULER, "invert_sigmas": True}, "field invert_sigmas"),
        ({"_class_name": EULER, "stochastic_sampling": True}, "field stochastic_sampling"),
        ({"_class_name": EULER, "time_shift_type": "cubic"}, "field time_shift_type"),
        ({"_class_name": EULER, "num_train_timesteps": 0}, "field num_train_timesteps"),
        (
            {"_class_name": EULER, "use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_karras_sigmas and use_beta_sigmas exclude each other",
        ),
        ({"_class_name": EULER, "base_image_seq_len": 4096}, "base_image_seq_len must be below"),
        (
            {"_class_name": EULER, "use_dynamic_shifting": True, "base_shift": None},
            "base_shift and max_shift must be numbers",
        ),
        ({"_class_name": HEUN, "use_dynamic_shifting": True}, "field use_dynamic_shifting: a Flow.*no such"),
        ({"_class_name": UNIPC}, "field use_flow_sigmas: it must be true"),
        ({"_class_name": UNIPC, "use_flow_sigmas": False}, "field use_flow_sigmas"),
        ({"_class_name": UNIPC, **FLOW, "use_karras_sigmas": True}, "field use_karras_sigmas"),
        ({"_class_name": UNIPC, **FLOW, "final_sigmas_type": "sigma_min"}, "field final_sigmas_type"),
        ({"_class_name": DPM, **FLOW, "use_lu_lambdas": True}, "field use_lu_lambdas"),
    ],
)
def test_a_configuration_that_gives_another_grid_is_refused_by_field(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchedulerConfigError, match=message) as refusal:
        read_scheduler_config(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SigmaGrid(shift=0.0), "shift must be above 0"),
        (lambda: SigmaGrid(terminal=1.0), "terminal must be between 0 and 1"),
        (lambda: SigmaGrid(spacing="cosine"), "spacing must be one of uniform"),  # type: ignore[arg-type]
        (lambda: SigmaGrid(first=0.2, last=0.5), "first and last must decrease inside 0..1"),
        (lambda: SigmaGrid(reaches_last=True), "first and last must decrease"),
        (lambda: SigmaGrid(highest=0.0), "highest must be above 0"),
        (lambda: SigmaGrid().sigmas(0), "steps must be at least 1"),
        (lambda: SigmaGrid(dynamic=DynamicShift()), "tokens of an image must be at least 1"),
        (
            lambda: DynamicShift("linear", base_shift=-1.0).shift(256, 4),
            "tokens the shift -1, not",
        ),
    ],
)
def test_an_impossible_grid_is_refused_in_one_sentence(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_dynamic_shift_grows_with_the_area_of_the_image() -> None:
    grid = SigmaGrid(dynamic=DynamicShift(), tokens=256)
    assert grid.for_area(16.0).sigmas(8) == SigmaGrid(dynamic=DynamicShift(), tokens=4096).sigmas(8)
    assert SigmaGrid(shift=3.0).for_area(16.0) == SigmaGrid(shift=3.0)


FLOWS = [
    RectifiedFlow(),
    RectifiedFlow(grid=SigmaGrid(shift=3.0)),
    RectifiedFlow(grid=SigmaGrid(dynamic=DynamicShift("flux2"), tokens=1024)),
    RectifiedFlow(grid=SigmaGrid(shift=5.0, terminal=0.1, last=0.001, reaches_last=True)),
]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_grid_of_as_many_steps_as_are_left_is_the_old_one(flow: RectifiedFlow, spacing: str) -> None:
    whole = flow_grid(spacing, 20, flow)
    for done in (1, 7, 19):
        again = flow_regrid(whole[done], 20 - done, spacing, flow, whole=20)
        assert again[0] == whole[done]
        np.testing.assert_allclose(again, whole[done:], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FLOWS),
    st.sampled_from([*SPACINGS, "1,0.9,0.3"]),
    st.floats(0.01, 1.0),
    st.integers(1, 60),
    st.integers(1, 100),
)
def test_a_regrid_starts_where_the_sample_is_and_decreases(
    flow: RectifiedFlow, kind: str, level: float, steps: int, whole: int
) -> None:
    sigmas = np.array(flow_regrid(level, steps, kind, flow, whole=whole))
    assert sigmas.shape == (steps,)
    assert sigmas[0] == level
    assert np.all(np.diff(sigmas) < 0.0)
    assert sigmas[-1] > 0.0


@pytest.mark.parametrize(
    ("given", "grid"),
    [
        (None, SigmaGrid()),
        ({"shift": 3.0}, SigmaGrid(shift=3.0)),
        ({"scheduler": {"_class_name": DPM, **FLOW, "flow_shift": 5.0}}, SigmaGrid(shift=5.0, first=0.999)),
        (
            {
                "scheduler": {"_class_name": EULER, "use_dynamic_shifting": True},
                "ends": "pipeline",
                "tokens": 64,
            },
            SigmaGrid(dynamic=DynamicShift(), tokens=64),
        ),
    ],
)
def test_a_bundle_states_the_grid_of_its_flow(given: Any, grid: SigmaGrid) -> None:
    spec = DiffusionSpec(schedule="flow", prediction="flow", sigma_grid=given)
    assert spec.noise_schedule().process.grid == grid  # type: ignore[attr-defined]
    assert DiffusionSpec.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shfit": 3.0}, "shfit"),
        ({"shift": -1.0}, "shift must be above 0"),
        ({"shift": "three"}, "shift"),
        ({"dynamic": {"kind": "cubic"}, "tokens": 4}, "kind"),
        ({"dynamic": {}}, "tokens of an image must be at least 1"),
        ({"scheduler": {"_class_name": EULER, "shfit": 3.0}}, "field shfit: a FlowMatchEuler"),
        ({"scheduler": {"_class_name": EULER}, "end": "pipeline"}, "end"),
        ({"scheduler": 3}, "scheduler must be the object"),
    ],
)
def test_a_bundle_with_an_impossible_grid_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DiffusionSpec(schedule="flow", prediction="flow", sigma_grid=given)


def test_a_table_of_timesteps_has_no_sigma_grid() -> None:
    with pytest.raises(ValidationError, match="sigma_grid is for flows"):
        DiffusionSpec(schedule="linear", prediction="epsilon", sigma_grid=SigmaGrid())
