"""Solvers, compared with the formulas of the papers, with diffusers, and with exact solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import (
    CLEAN,
    Prediction,
    Schedule,
    VariancePreserving,
    make_schedule,
    variance_preserving,
)
from ditserve.model.spec.grids import GRIDS, grid
from ditserve.model.spec.solvers import step_table
from tests.model.spec.solver_cases import (
    ORDERS,
    START,
    Samples,
    bent,
    draws,
    gaussian,
    grids,
    marginal_std,
    run,
    tables,
)

reference: Any = diffusers  # untyped


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddim_is_equation_12(kind: str, eta: float) -> None:
    schedule = make_schedule(kind)
    timesteps = grid("trailing", 30)
    table = step_table("ddim", timesteps, schedule, eta=eta)
    x, noise, z = np.random.default_rng(0).standard_normal((3, 8))
    for i, (t, after) in enumerate(pairwise((*timesteps, CLEAN))):
        now, then = (schedule.alpha(k) ** 2 for k in (t, after))
        std = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        image = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        direction = math.sqrt(max(float(1 - then - std**2), 0.0)) * noise
        expected = math.sqrt(then) * image + direction + std * z
        ours = table.a[i] * x + table.b[i] * (table.x0_x[i] * x + table.x0_out[i] * noise) + table.s[i] * z
        np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)
    assert not table.c.any()


def test_ddpm_is_the_posterior_of_equation_7_and_needs_no_eta() -> None:
    schedule = make_schedule("linear", prediction="x0")
    timesteps = range(999, -1, -1)
    table = step_table("ddpm", timesteps, schedule)
    alpha_bar = variance_preserving("linear").alpha_bar[::-1]
    before = np.append(alpha_bar[1:], 1.0)
    beta = 1.0 - alpha_bar / before
    np.testing.assert_allclose(table.a, np.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(table.b, np.sqrt(before) * beta / (1.0 - alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(table.s**2, beta * (1.0 - before) / (1.0 - alpha_bar), rtol=1e-9)
    ancestral = step_table("ddim", timesteps, schedule, eta=1.0)
    np.testing.assert_array_equal(table.s, ancestral.s)


@settings(max_examples=40, deadline=None)
@given(st.data(), tables)
def test_euler_is_eulers_method_on_the_ode_in_sigma_over_alpha(
    data: st.DataObject, schedule: Schedule
) -> None:
    timesteps = data.draw(grids(schedule))
    table = step_table("euler", timesteps, schedule)
    x, image = np.random.default_rng(0).standard_normal((2, 8))
    for i, (t, after) in enumerate(pairwise((*timesteps, CLEAN))):
        now, then = (schedule.sigma(k) / schedule.alpha(k) for k in (t, after))
        scaled = x / schedule.alpha(t)
        expected = schedule.alpha(after) * (scaled + (then - now) * (scaled - image) / now)
        rounding = 1e-13 / float(schedule.alpha(t))
        np.testing.assert_allclose(table.a[i] * x + table.b[i] * image, expected, atol=rounding)


@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_dpmpp_2m_is_algorithm_2(kind: str) -> None:
    schedule = make_schedule("cosine", prediction="x0")
    timesteps = grid(kind, 12)
    table = step_table("dpmpp-2m", timesteps, schedule)
    lam = [math.log(schedule.alpha(t) / schedule.sigma(t)) for t in timesteps]
    x, image, last = np.random.default_rng(0).standard_normal((3, 8))
    for i, (t, after) in enumerate(pairwise(timesteps)):
        h = lam[i + 1] - lam[i]
        blended = image
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            blended = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * last
        ratio = schedule.sigma(after) / schedule.sigma(t)
        expected = ratio * x - schedule.alpha(after) * (math.exp(-h) - 1) * blended
        ours = table.a[i] * x + table.b[i] * image + table.c[i] * last
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def theirs(
    scheduler: Any, x: Samples, *, noise: Callable[[], Samples] | None = None, **options: Any
) -> list[Samples]:
    """Return the sample after every step of a diffusers scheduler with the network `bent`."""
    sample = torch.from_numpy(x)
    states = []
    for t in scheduler.timesteps.tolist():
        if noise is not None:
            options["variance_noise"] = torch.from_numpy(noise())
        sample = scheduler.step(bent(sample, t), t, sample, **options).prev_sample
        states.append(sample.numpy())
    return states


def in_double_precision(scheduler: Any) -> None:
    """Let a diffusers scheduler compute in float64, so that nothing but the formulas is compared."""
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def schedule_of(scheduler: Any, prediction: Prediction = "epsilon") -> Schedule:
    return Schedule(VariancePreserving(scheduler.alphas_cumprod.double().numpy()), prediction)


THEIR_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


@pytest.mark.parametrize("prediction", list(THEIR_PREDICTIONS))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("leading", 16), ("trailing", 20)])
def test_ddim_agrees_with_diffusers_where_its_stride_is_whole(
    spacing: str, steps: int, eta: float, prediction: Prediction
) -> None:
    # diffusers steps to t - 1000 // N, which is on its own grid only for "leading" and where N divides 1000.
    scheduler = reference.DDIMScheduler(
        timestep_spacing=spacing, clip_sample=True, prediction_type=THEIR_PREDICTIONS[prediction]
    )
    in_double_precision(scheduler)
    scheduler.set_timesteps(steps)
    noise = draws(1) if eta else None
    expected = theirs(scheduler, START, eta=eta, noise=noise, use_clipped_model_output=True)
    table = step_table("ddim", grid(spacing, steps), schedule_of(scheduler, prediction), eta=eta)
    ours = run(table, START, bent, noise=draws(1), clip_x0=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddpm_agrees_with_diffusers(steps: int) -> None:
    scheduler = reference.DDPMScheduler(timestep_spacing="leading", clip_sample=True)
    in_double_precision(scheduler)
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, START, generator=torch.Generator().manual_seed(3))
    ours_draw = torch.Generator().manual_seed(3)

    def noise() -> Samples:
        z: Samples = torch.randn(2, 4, generator=ours_draw, dtype=torch.float64).numpy()
        return z

    table = step_table("ddpm", grid("leading", steps), schedule_of(scheduler))
    ours = run(table, START, bent, noise=noise, clip_x0=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


MULTISTEP: list[tuple[str, float, str, dict[str, Any]]] = [
    ("dpmpp-2m", 0.0, "DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    (
        "dpmpp-2m",
        1.0,
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    ("ddim", 0.0, "DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
    ("ddpm", 0.0, "DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}),
    ("unipc-1", 0.0, "UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh2"}),
    ("unipc-2", 0.0, "UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy 2
@pytest.mark.parametrize(("solver", "eta", "scheduler_name", "options"), MULTISTEP)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("kind", "spacing", "steps"),
    [("uniform-t", "linspace", steps) for steps in (1, 2, 3, 10, 33)]
    + [("trailing", "trailing", steps) for steps in (1, 2, 3, 20)],
)
def test_multistep_solvers_agree_with_diffusers(
    solver: str,
    eta: float,
    scheduler_name: str,
    options: dict[str, Any],
    prediction: Prediction,
    beta_schedule: str,
    kind: str,
    spacing: str,
    steps: int,
) -> None:
    scheduler = getattr(reference, scheduler_name)(
        beta_schedule=beta_schedule,
        prediction_type=THEIR_PREDICTIONS[prediction],
        timestep_spacing=spacing,
        **options,
    )
    scheduler.set_timesteps(steps)
    assert grid(kind, steps) == tuple(scheduler.timesteps.tolist())
    in_double_precision(scheduler)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    stochastic = eta or solver == "ddpm"
    expected = theirs(scheduler, START, noise=draws(2) if stochastic else None)
    table = step_table(solver, grid(kind, steps), schedule_of(scheduler, prediction), eta=eta)
    ours = run(table, START, bent, noise=draws(2))
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(ours) / scale, np.array(expected) / scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), ORDERS)
def test_deterministic_solvers_converge_to_the_exact_ode_at_their_order(
    solver: str, order: int, kind: str
) -> None:
    schedule = make_schedule(kind, prediction="x0")
    std, start, end = 2.0, 900, 100
    exact = marginal_std(schedule, end, std) / marginal_std(schedule, start, std)
    errors = []
    for stride in (16, 8, 4, 2) if order > 2 else (32, 16, 8, 4):
        timesteps = range(start, end - 1, -stride)
        states = run(step_table(solver, timesteps, schedule), 1.0, gaussian(schedule, std))
        errors.append(abs(states[-2] - exact))  # on arrival at `end`
    rates = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    np.testing.assert_allclose(rates[-1], order, atol=0.2)
    assert rates[0] > order - 0.5


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 0.5), ("dpmpp-2m", 1.0)])
def test_stochastic_solvers_sample_the_distribution_of_the_data(solver: str, eta: float) -> None:
    schedule = make_schedule("cosine", prediction="x0")
    rng = np.random.default_rng(0)
    table = step_table(solver, grid("trailing", 200), schedule, eta=eta)
    network = gaussian(schedule, 0.5)
    states = run(table, rng.standard_normal(20_000), network, noise=lambda: rng.standard_normal(20_000))
    assert states[-1].std() == pytest.approx(0.5, rel=0.03)
    assert abs(states[-1].mean()) < 0.02
