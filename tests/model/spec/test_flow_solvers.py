"""Solvers on a flow: every step as diffusers' flow schedulers take it, and the order of their errors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import RectifiedFlow, Schedule
from ditserve.model.spec.solvers import step_table
from tests.model.spec.solver_cases import ORDERS, START, draws, gaussian, run, solvers

reference: Any = diffusers  # untyped
FLOW = Schedule(RectifiedFlow(), "flow", "sigma", 1000.0)
STEPS = [1, 2, 3, 4, 7, 10, 28, 50]
# Theirs, of numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def velocity(x: Any, sigma: float) -> Any:
    """Return a smooth velocity without a closed form, the same in numpy and torch."""
    return 0.8 * x + 0.3 * (x * x + 1.0) ** 0.5 * (1.0 - sigma) - 0.2


EULER = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True}
MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASES: list[tuple[str, float, str, dict[str, Any]]] = [
    ("ddim", 0.0, EULER, {"shift": 3.0}),
    ("euler", 0.0, EULER, {"shift": 1.0, "use_karras_sigmas": True}),
    ("euler", 0.0, EULER, {"shift": 3.0, "use_exponential_sigmas": True}),
    ("euler", 0.0, EULER, {"shift": 3.0, "use_beta_sigmas": True}),
    ("euler", 0.0, EULER, {"shift": 3.0, "shift_terminal": 0.02}),
    ("euler", 0.0, EULER, DYNAMIC),
    ("euler", 0.0, EULER, {**DYNAMIC, "time_shift_type": "linear"}),
    ("euler", 0.0, EULER, {**DYNAMIC, "shift_terminal": 0.1, "use_karras_sigmas": True}),
    ("ddim", 0.0, "DPMSolverMultistepScheduler", {**MULTISTEP, "solver_order": 1}),
    ("dpmpp-2m", 0.0, "DPMSolverMultistepScheduler", {**MULTISTEP, "solver_order": 2}),
    (
        "dpmpp-2m",
        1.0,
        "DPMSolverMultistepScheduler",
        {**MULTISTEP, "solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    (
        "ddpm",
        0.0,
        "DPMSolverMultistepScheduler",
        {**MULTISTEP, "solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
    ),
    ("dpmpp-2m", 0.0, "DPMSolverMultistepScheduler", {**MULTISTEP, **DYNAMIC, "solver_order": 2}),
    ("unipc-1", 0.0, "UniPCMultistepScheduler", {**MULTISTEP, "solver_order": 1, "solver_type": "bh2"}),
    ("unipc-2", 0.0, "UniPCMultistepScheduler", {**MULTISTEP, "solver_order": 2, "solver_type": "bh2"}),
    ("unipc-2", 0.0, "UniPCMultistepScheduler", {**MULTISTEP, **DYNAMIC, "shift_terminal": 0.1}),
]


@pytest.mark.parametrize(("solver", "eta", "name", "options"), CASES)
@pytest.mark.parametrize("steps", STEPS)
def test_every_step_is_that_of_diffusers(
    solver: str, eta: float, name: str, options: dict[str, Any], steps: int
) -> None:
    if steps == 1 and "shift_terminal" in options:
        # There a single step that is stretched divides 0 by 0.
        options = {key: value for key, value in options.items() if key != "shift_terminal"}
    scheduler = getattr(reference, name)(**options)
    scheduler.set_timesteps(steps, **({"mu": 0.9} if DYNAMIC.keys() <= options.keys() else {}))
    stochastic = eta or solver == "ddpm"
    sigmas = tuple(scheduler.sigmas[:-1].double().tolist())
    # In double precision, so that nothing but the formulas is compared.
    scheduler.sigmas = scheduler.sigmas.double()
    noise, sample, expected = draws(2), torch.from_numpy(START), []
    for t, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        more = {"variance_noise": torch.from_numpy(noise())} if stochastic else {}
        sample = scheduler.step(velocity(sample, sigma), t, sample, **more).prev_sample
        expected.append(sample.numpy())
    table = step_table(solver, sigmas, FLOW, eta=eta)
    ours = run(table, START, velocity, noise=draws(2))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def gaussian_velocity(std: float) -> Any:
    """Return the exact velocity for data N(0, std²): E[noise - x_0 | x]."""
    image = gaussian(FLOW, std)

    def network(x: Any, sigma: float) -> Any:
        return (x - image(x, sigma)) / sigma

    return network


@pytest.mark.parametrize(("solver", "order"), ORDERS)
def test_deterministic_solvers_converge_to_the_exact_flow_at_their_order(solver: str, order: int) -> None:
    std, start, end = 2.0, 0.9, 0.1
    scale = [math.sqrt(((1 - sigma) * std) ** 2 + sigma**2) for sigma in (start, end)]
    errors = []
    for steps in (20, 40, 80, 160):
        levels = np.linspace(start, end, steps + 1).tolist()
        states = run(step_table(solver, levels, FLOW), 1.0, gaussian_velocity(std))
        errors.append(abs(states[-2] - scale[1] / scale[0]))  # on arrival at `end`
    rates = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    np.testing.assert_allclose(rates, order, atol=0.25)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m", "unipc-1", "unipc-2"])
@pytest.mark.parametrize("steps", [*range(1, 12), 50, 250])
def test_from_pure_noise_every_number_of_steps_ends_in_the_image(solver: str, steps: int) -> None:
    """At sigma 1 there is no image, and at 0 no noise: both ends are exact."""
    levels = np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()
    x0, noise = np.random.default_rng(0).standard_normal((2, 16))
    states = run(step_table(solver, levels, FLOW), noise, lambda x, sigma: noise - x0)
    for sigma, state in zip([*levels[1:], 0.0], states, strict=True):
        np.testing.assert_allclose(state, (1 - sigma) * x0 + sigma * noise, atol=1e-13)


# To the ends, and to each other, as near as float64 has them.
NEAR_THE_ENDS = st.floats(1e-300, 1.0) | st.floats(1e-9, 1e-8) | st.floats(1.0 - 1e-9, 1.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(NEAR_THE_ENDS, min_size=1, max_size=12, unique=True), solvers)
def test_sigmas_as_near_to_the_ends_and_to_each_other_as_can_be_are_stepped_through(
    sigmas: list[float], solver: str
) -> None:
    levels = sorted(sigmas, reverse=True)
    table = step_table(solver, levels, FLOW)
    for column in table.columns:
        assert np.all(np.isfinite(column))
        assert np.all(np.abs(column) < 2000)
    x0, noise = np.random.default_rng(0).standard_normal((2, 16))
    start = (1 - levels[0]) * x0 + levels[0] * noise
    states = run(table, start, lambda x, sigma: (x - x0) / sigma, noise=draws(1, (16,)))
    np.testing.assert_allclose(states, np.clip(states, -10, 10))
    np.testing.assert_allclose(states[-1], x0, atol=1e-11)


def test_a_table_from_pure_noise_is_the_limit_of_those_from_below() -> None:
    for solver in ("ddim", "dpmpp-2m", "unipc-1", "unipc-2"):
        whole = step_table(solver, (1.0, 0.8, 0.5, 0.2), FLOW)
        gaps = []
        for below in (1e-3, 1e-6, 1e-12):
            near = step_table(solver, (1.0 - below, 0.8, 0.5, 0.2), FLOW)
            pairs = zip(whole.columns, near.columns, strict=True)
            gaps.append(max(float(np.abs(a - b).max()) for a, b in pairs))
        # The length of the first step grows as log(1 / below) only.
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 0.02


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 0.5), ("dpmpp-2m", 1.0)])
def test_stochastic_solvers_keep_the_variance_of_the_flow(solver: str, eta: float) -> None:
    """Every step of a linear network is linear in x and z, so its variance is known without sampling."""
    std, steps = 0.5, 400
    levels = np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()
    table, network = step_table(solver, levels, FLOW, eta=eta), gaussian_velocity(std)
    rng = np.random.default_rng(0)
    states = run(table, rng.standard_normal(20_000), network, noise=lambda: rng.standard_normal(20_000))
    for k in (steps // 2 - 1, steps - 1):
        sigma = [*levels[1:], 0.0][k]
        exact = math.sqrt(((1 - sigma) * std) ** 2 + sigma**2)
        assert states[k].std() == pytest.approx(exact, rel=0.03)
        assert abs(states[k].mean()) < 0.02


def test_one_step_of_the_stochastic_solver_is_the_sde_of_sit() -> None:
    """For small steps "ddpm" is Euler-Maruyama of SiT's SDE with its diffusion form "SBDM".

    Ma et al., arXiv:2401.08740, eq. 5 and 10: dx = (v - w · s / 2) dt + √w dW, run backwards in sigma, with
    the score s = -noise / sigma and w = 2 · sigma / (1 - sigma).
    """
    sigma, h = 0.6, 1e-5
    table = step_table("ddpm", (sigma, sigma - h), FLOW)
    x, image, z = np.random.default_rng(1).standard_normal((3, 8))
    noise = (x - (1 - sigma) * image) / sigma
    w = 2 * sigma / (1 - sigma)
    drift = (noise - image) + w / 2 * noise / sigma
    expected = x - h * drift + math.sqrt(w * h) * z
    ours = table.a[0] * x + table.b[0] * image + table.s[0] * z
    np.testing.assert_allclose(ours, expected, atol=3e-7)
