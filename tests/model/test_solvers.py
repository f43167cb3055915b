"""Solver tables: against the papers' own formulas, closed-form solutions, and diffusers step for step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.diffusion import (
    CLEAN,
    GRIDS,
    PREDICTIONS,
    Prediction,
    Schedule,
    add_noise,
    grid,
    make_schedule,
    regrid,
    training_target,
)
from model.solvers import SOLVERS, StepTable, learned_log_variance, step_table, trajectory, variance_bounds

Samples = npt.NDArray[np.float64]
Network = Callable[[Any, int], Any]
COLUMNS = ("timestep", "x0_x", "x0_out", "a", "b", "c", "s")
DETERMINISTIC = ("ddim", "euler", "dpmpp-2m", "unipc-1")

reference: Any = diffusers  # untyped
schedules = st.builds(
    make_schedule,
    st.sampled_from(["linear", "cosine"]),
    st.integers(2, 1100),
    prediction=st.sampled_from(PREDICTIONS),
    log_snr_shift=st.sampled_from([0.0, -2.0, 1.0]),
)
solvers = st.sampled_from(sorted(SOLVERS))


def chosen(solver: str, eta: float) -> float:
    """`eta` where the solver leaves it open, else 0, which every solver takes."""
    return eta if SOLVERS[solver].eta is None else 0.0


@st.composite
def walks(draw: st.DrawFn, schedule: Schedule) -> tuple[int, ...]:
    """Any legal grid of a schedule, named or not."""
    steps = draw(st.integers(1, min(schedule.timesteps, 60)))
    kind = draw(st.sampled_from([*GRIDS, "any"]))
    if kind != "any":
        return grid(kind, steps, schedule.timesteps)
    values = st.integers(0, schedule.timesteps - 1)
    return tuple(sorted(draw(st.sets(values, min_size=1, max_size=steps)), reverse=True))


def run(table: StepTable, x: Any, network: Network, **options: Any) -> list[Any]:
    """The sample after every step."""
    return [after for after, _ in trajectory(table, x, network, **options)]


def oracle(schedule: Schedule, x0: Any, noise: Any) -> Network:
    """The network that always knows which image and which noise it was."""

    def network(x: Any, t: int) -> Any:
        return training_target(schedule.prediction, schedule.alpha(t), schedule.sigma(t), x0, noise)

    return network


def gaussian(schedule: Schedule, spread: float) -> Network:
    """The exact x0 prediction of data N(0, spread²)."""

    def network(x: Any, t: int) -> Any:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return x * (alpha * spread**2 / (alpha**2 * spread**2 + sigma**2))

    return network


def bent(x: Any, t: int) -> Any:
    """Some smooth output without a closed form, the same in numpy and torch."""
    return 0.8 * x + 0.3 * (x * x + 1.0) ** 0.5 * (1.0 - t / 1000.0) - 0.2


# -- what every table does


@given(st.data(), schedules, solvers, st.floats(0.0, 1.0))
def test_every_step_keeps_the_signal_and_the_noise_at_the_levels_of_its_timestep(
    data: st.DataObject, schedule: Schedule, solver: str, eta: float
) -> None:
    walk = data.draw(walks(schedule))
    table = step_table(solver, walk, schedule, eta=chosen(solver, eta))
    assert len(table) == len(walk)
    assert tuple(table.timestep) == walk
    alpha, sigma = schedule.alphas[table.timestep], schedule.sigmas[table.timestep]
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    np.testing.assert_allclose(table.a * alpha + table.b + table.c, next_alpha, atol=1e-13)
    np.testing.assert_allclose(table.a**2 * sigma**2 + table.s**2, next_sigma**2, atol=1e-13)


@given(st.data(), schedules, solvers, st.floats(0.0, 1.0))
def test_the_last_step_gives_the_clean_image_and_the_first_needs_no_history(
    data: st.DataObject, schedule: Schedule, solver: str, eta: float
) -> None:
    table = step_table(solver, data.draw(walks(schedule)), schedule, eta=chosen(solver, eta))
    assert (table.a[-1], table.b[-1], table.c[-1], table.s[-1]) == (0.0, 1.0, 0.0, 0.0)
    assert table.c[0] == 0.0
    for column in COLUMNS:
        values = getattr(table, column)
        assert values.dtype == (np.int64 if column == "timestep" else np.float64)
        assert np.all(np.isfinite(values))
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


@given(st.data(), schedules, st.sampled_from(DETERMINISTIC))
def test_an_oracle_keeps_the_sample_on_the_line_from_noise_to_image(
    data: st.DataObject, schedule: Schedule, solver: str
) -> None:
    walk = data.draw(walks(schedule))
    x0, noise = np.random.default_rng(0).standard_normal((2, 16))
    x = add_noise(schedule.alpha(walk[0]), schedule.sigma(walk[0]), x0, noise)
    states = run(step_table(solver, walk, schedule), x, oracle(schedule, x0, noise))
    rounding = 1e-13 / schedule.alpha(walk[0])  # of x, as the first estimate of the image sees it
    for t, state in zip((*walk[1:], CLEAN), states, strict=True):
        expected = add_noise(schedule.alpha(t), schedule.sigma(t), x0, noise)
        np.testing.assert_allclose(state, expected, atol=rounding)


@pytest.mark.parametrize("kind", sorted(GRIDS))
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_an_oracle_recovers_the_image_for_any_number_of_steps(solver: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    x0 = rng.standard_normal(4)
    for schedule in (make_schedule(k, prediction=p) for k in ("linear", "cosine") for p in PREDICTIONS):

        def network(x: Any, t: int, schedule: Schedule = schedule) -> Any:
            noise = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
            return training_target(schedule.prediction, schedule.alpha(t), schedule.sigma(t), x0, noise)

        for steps in (1, 2, 3, 10, 37, 250, 1000):
            table = step_table(solver, grid(kind, steps), schedule)
            states = run(table, rng.standard_normal(4), network, noise=lambda: rng.standard_normal(4))
            np.testing.assert_allclose(states[-1], x0, atol=1e-10)


# -- the papers' formulas, written as they are printed there


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddim_is_equation_12(kind: str, eta: float) -> None:
    schedule = make_schedule(kind)
    walk = grid("trailing", 30)
    table = step_table("ddim", walk, schedule, eta=eta)
    x, noise, z = np.random.default_rng(0).standard_normal((3, 8))
    for i, (t, after) in enumerate(pairwise((*walk, CLEAN))):
        now, then = (schedule.alpha(k) ** 2 for k in (t, after))
        spread = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        image = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        direction = math.sqrt(max(1 - then - spread**2, 0.0)) * noise
        expected = math.sqrt(then) * image + direction + spread * z
        ours = table.a[i] * x + table.b[i] * (table.x0_x[i] * x + table.x0_out[i] * noise) + table.s[i] * z
        np.testing.assert_allclose(ours, expected, rtol=1e-7, atol=1e-9)
    assert not table.c.any()


def test_ddpm_is_the_posterior_of_equation_7_and_needs_no_eta() -> None:
    schedule = make_schedule("linear", prediction="x0")
    walk = range(999, -1, -1)
    table = step_table("ddpm", walk, schedule)
    alpha_bar = schedule.alpha_bar[::-1]
    before = np.append(alpha_bar[1:], 1.0)
    beta = 1.0 - alpha_bar / before
    np.testing.assert_allclose(table.a, np.sqrt(1.0 - beta) * (1.0 - before) / (1.0 - alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(table.b, np.sqrt(before) * beta / (1.0 - alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(table.s**2, beta * (1.0 - before) / (1.0 - alpha_bar), rtol=1e-9)
    ancestral = step_table("ddim", walk, schedule, eta=1.0)
    np.testing.assert_array_equal(table.s, ancestral.s)


@given(st.data(), schedules)
def test_euler_is_eulers_method_on_the_ode_in_sigma_over_alpha(
    data: st.DataObject, schedule: Schedule
) -> None:
    walk = data.draw(walks(schedule))
    table = step_table("euler", walk, schedule)
    x, image = np.random.default_rng(0).standard_normal((2, 8))
    for i, (t, after) in enumerate(pairwise((*walk, CLEAN))):
        now, then = (schedule.sigma(k) / schedule.alpha(k) for k in (t, after))
        scaled = x / schedule.alpha(t)
        expected = schedule.alpha(after) * (scaled + (then - now) * (scaled - image) / now)
        rounding = 1e-13 / schedule.alpha(t)
        np.testing.assert_allclose(table.a[i] * x + table.b[i] * image, expected, atol=rounding)


@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_dpmpp_2m_is_algorithm_2(kind: str) -> None:
    schedule = make_schedule("cosine", prediction="x0")
    walk = grid(kind, 12)
    table = step_table("dpmpp-2m", walk, schedule)
    lam = [math.log(schedule.alpha(t) / schedule.sigma(t)) for t in walk]
    x, image, last = np.random.default_rng(0).standard_normal((3, 8))
    for i, (t, after) in enumerate(pairwise(walk)):
        h = lam[i + 1] - lam[i]
        blended = image
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            blended = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * last
        ratio = schedule.sigma(after) / schedule.sigma(t)
        expected = ratio * x - schedule.alpha(after) * (math.exp(-h) - 1) * blended
        ours = table.a[i] * x + table.b[i] * image + table.c[i] * last
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


# -- diffusers, step for step


def theirs(
    scheduler: Any, x: Samples, *, noise: Callable[[], Samples] | None = None, **options: Any
) -> list[Samples]:
    """The sample after every step of a diffusers scheduler on the bent network."""
    sample = torch.from_numpy(x)
    states = []
    for t in scheduler.timesteps.tolist():
        if noise is not None:
            options["variance_noise"] = torch.from_numpy(noise())
        sample = scheduler.step(bent(sample, t), t, sample, **options).prev_sample
        states.append(sample.numpy())
    return states


def schedule_of(scheduler: Any, prediction: Prediction = "epsilon") -> Schedule:
    return Schedule(scheduler.alphas_cumprod.double().numpy(), prediction)


def draws(seed: int) -> Callable[[], Samples]:
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal((2, 4))


THEIR_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
START: Samples = np.random.default_rng(7).standard_normal((2, 4))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("leading", 16), ("trailing", 20)])
def test_ddim_walks_with_diffusers_where_its_stride_is_whole(
    spacing: str, steps: int, eta: float, prediction: Prediction
) -> None:
    # diffusers steps to t - 1000 // N, which is on its own grid only for "leading" and where N divides 1000.
    scheduler = reference.DDIMScheduler(
        timestep_spacing=spacing, clip_sample=True, prediction_type=THEIR_PREDICTIONS[prediction]
    )
    scheduler.set_timesteps(steps)
    noise = draws(1) if eta else None
    expected = theirs(scheduler, START, eta=eta, noise=noise, use_clipped_model_output=True)
    table = step_table("ddim", grid(spacing, steps), schedule_of(scheduler, prediction), eta=eta)
    ours = run(table, START, bent, noise=draws(1), clip_x0=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddpm_walks_with_diffusers(steps: int) -> None:
    scheduler = reference.DDPMScheduler(timestep_spacing="leading", clip_sample=True)
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, START, generator=torch.Generator().manual_seed(3))
    ours_draw = torch.Generator().manual_seed(3)

    def noise() -> Samples:
        z: Samples = torch.randn(2, 4, generator=ours_draw, dtype=torch.float64).numpy()
        return z

    table = step_table("ddpm", grid("leading", steps), schedule_of(scheduler))
    ours = run(table, START, bent, noise=noise, clip_x0=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


MULTISTEP: list[tuple[str, float, str, dict[str, Any]]] = [
    ("dpmpp-2m", 0.0, "DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "dpmsolver++"}),
    (
        "dpmpp-2m",
        1.0,
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    ("ddim", 0.0, "DPMSolverMultistepScheduler", {"solver_order": 1, "algorithm_type": "dpmsolver++"}),
    ("unipc-1", 0.0, "UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh2"}),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy 2
@pytest.mark.parametrize(("solver", "eta", "scheduler_name", "options"), MULTISTEP)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("kind", "spacing", "steps"),
    [("uniform-t", "linspace", 10), ("uniform-t", "linspace", 33), ("trailing", "trailing", 20)],
)
def test_multistep_solvers_walk_with_diffusers(
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
    expected = theirs(scheduler, START, noise=draws(2) if eta else None)
    table = step_table(solver, grid(kind, steps), schedule_of(scheduler, prediction), eta=eta)
    ours = run(table, START, bent, noise=draws(2))
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(ours) / scale, np.array(expected) / scale, atol=1e-4)


# -- Gaussian data: the probability-flow ODE has the exact solution x · std_then / std_now


def marginal_spread(schedule: Schedule, t: int, spread: float) -> float:
    return math.sqrt(schedule.alpha(t) ** 2 * spread**2 + schedule.sigma(t) ** 2)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("euler", 1), ("dpmpp-2m", 2), ("unipc-1", 2)])
def test_deterministic_solvers_converge_to_the_exact_ode_at_their_order(
    solver: str, order: int, kind: str
) -> None:
    schedule = make_schedule(kind, prediction="x0")
    spread, start, end = 2.0, 900, 100
    exact = marginal_spread(schedule, end, spread) / marginal_spread(schedule, start, spread)
    errors = []
    for stride in (32, 16, 8, 4):
        walk = range(start, end - 1, -stride)
        states = run(step_table(solver, walk, schedule), 1.0, gaussian(schedule, spread))
        errors.append(abs(states[-2] - exact))  # on arrival at `end`
    rates = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    np.testing.assert_allclose(rates, order, atol=0.2)


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 0.5), ("dpmpp-2m", 1.0)])
def test_stochastic_solvers_sample_the_distribution_of_the_data(solver: str, eta: float) -> None:
    schedule = make_schedule("cosine", prediction="x0")
    rng = np.random.default_rng(0)
    table = step_table(solver, grid("trailing", 200), schedule, eta=eta)
    network = gaussian(schedule, 0.5)
    states = run(table, rng.standard_normal(20_000), network, noise=lambda: rng.standard_normal(20_000))
    assert states[-1].std() == pytest.approx(0.5, rel=0.03)
    assert abs(states[-1].mean()) < 0.02


# -- re-gridding


def spliced(data: st.DataObject, schedule: Schedule) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """(a grid, how many of its steps are walked, the new grid for the rest)."""
    walk = data.draw(walks(schedule).filter(lambda values: len(values) > 1))
    done = data.draw(st.integers(1, len(walk) - 1))
    steps = data.draw(st.integers(1, min(walk[done] + 1, 40)))
    return (
        walk,
        done,
        regrid(walk[done], steps, data.draw(st.sampled_from(sorted(GRIDS))), schedule.timesteps),
    )


@given(st.data(), schedules, solvers, st.floats(0.0, 1.0))
def test_a_regridded_table_is_the_tail_of_the_table_of_the_spliced_grid(
    data: st.DataObject, schedule: Schedule, solver: str, eta: float
) -> None:
    walk, done, rest = spliced(data, schedule)
    eta = chosen(solver, eta)
    fresh = step_table(solver, (*walk[:done], *rest), schedule, eta=eta)
    again = step_table(solver, rest, schedule, eta=eta, previous=walk[done - 1])
    for column in COLUMNS:
        np.testing.assert_allclose(getattr(again, column), getattr(fresh, column)[done:], rtol=1e-12)


@given(st.data(), schedules, solvers)
def test_a_regridded_sample_is_a_fresh_run_of_the_spliced_grid(
    data: st.DataObject, schedule: Schedule, solver: str
) -> None:
    walk, done, rest = spliced(data, schedule)
    fresh = run(
        step_table(solver, (*walk[:done], *rest), schedule), START, bent, noise=draws(5), clip_x0=True
    )
    noise = draws(5)
    first = trajectory(step_table(solver, walk, schedule), START, bent, noise=noise, clip_x0=True)
    x, denoised = [next(first) for _ in range(done)][-1]
    tail = step_table(solver, rest, schedule, previous=walk[done - 1])
    again = run(tail, x, bent, noise=noise, clip_x0=True, previous=denoised)
    np.testing.assert_allclose(again, fresh[done:], rtol=1e-9, atol=1e-9)


def test_history_keeps_second_order_at_the_first_step_of_a_new_grid() -> None:
    schedule = make_schedule("linear", prediction="x0")
    spread, network = 2.0, gaussian(schedule, 2.0)
    exact = marginal_spread(schedule, 640, spread) / marginal_spread(schedule, 900, spread)
    first = trajectory(step_table("dpmpp-2m", range(900, 0, -20), schedule), 1.0, network)
    x, denoised = [next(first) for _ in range(10)][-1]  # has reached timestep 700
    rest = (700, 640, 580)
    kept = run(step_table("dpmpp-2m", rest, schedule, previous=720), x, network, previous=denoised)
    lost = run(step_table("dpmpp-2m", rest, schedule), x, network)
    assert abs(kept[0] - exact) < 0.2 * abs(lost[0] - exact)


def test_a_sample_may_change_its_solver_on_the_way() -> None:
    schedule = make_schedule("cosine", prediction="x0")
    spread, network = 0.5, gaussian(schedule, 0.5)
    exact = spread / marginal_spread(schedule, 999, spread)
    x: Any = 1.0
    denoised: Any = None
    previous: int | None = None
    plan: Sequence[tuple[str, tuple[int, ...]]] = [
        ("ddim", tuple(range(999, 700, -10))),
        ("unipc-1", tuple(range(699, 400, -10))),
        ("dpmpp-2m", tuple(range(399, 0, -10))),
    ]
    for solver, walk in plan:
        rest = (*walk, *((walk[-1] - 10,) if walk[-1] >= 10 else ()))
        steps = trajectory(
            step_table(solver, rest, schedule, previous=previous), x, network, previous=denoised
        )
        for _ in walk:
            x, denoised = next(steps)
        previous = walk[-1]
    assert x == pytest.approx(exact, rel=0.05)


# -- the variance a network may learn


@pytest.mark.parametrize("steps", [2, 50, 250, 1000])
def test_variance_bounds_are_those_of_the_respaced_process(steps: int) -> None:
    schedule = make_schedule("linear")
    walk = grid("leading", steps)
    kept = schedule.alpha_bar[list(reversed(walk))]
    before = np.append(1.0, kept[:-1])
    betas = 1.0 - kept / before
    posterior = betas * (1.0 - before) / (1.0 - kept)
    low, high = variance_bounds(walk, schedule)
    np.testing.assert_allclose(high[::-1], np.log(betas), rtol=1e-9)
    np.testing.assert_allclose(low[::-1], np.log(np.append(posterior[1], posterior[1:])), rtol=1e-9)
    assert np.all(low[:-1] < high[:-1])


def test_a_single_step_learns_no_range() -> None:
    low, high = variance_bounds((999,), make_schedule("linear"))
    np.testing.assert_array_equal(low, high)


def test_a_learned_variance_goes_from_the_posterior_to_beta_in_numpy_and_torch() -> None:
    low, high = variance_bounds(grid("leading", 10), make_schedule("linear"))
    np.testing.assert_allclose(learned_log_variance(-np.ones(10), low, high), low)
    np.testing.assert_allclose(learned_log_variance(np.ones(10), low, high), high)
    middle = learned_log_variance(torch.zeros(10, dtype=torch.float64), torch.tensor(low), torch.tensor(high))
    np.testing.assert_allclose(middle.numpy(), (low + high) / 2)


# -- samples


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_torch_and_numpy_walk_together_in_float32(solver: str, prediction: Prediction) -> None:
    schedule = make_schedule("cosine", prediction=prediction)
    table = step_table(solver, grid("uniform-t", 20), schedule)
    x = START.astype(np.float32)
    noise_rng, torch_rng = np.random.default_rng(1), np.random.default_rng(1)

    def noise() -> npt.NDArray[np.float32]:
        return noise_rng.standard_normal((2, 4), dtype=np.float32)

    def torch_noise() -> torch.Tensor:
        return torch.from_numpy(torch_rng.standard_normal((2, 4), dtype=np.float32))

    ours = run(table, x, bent, noise=noise, clip_x0=True)
    others = run(table, torch.from_numpy(x), bent, noise=torch_noise, clip_x0=True)
    assert {state.dtype for state in ours} == {np.dtype(np.float32)}
    assert {state.dtype for state in others} == {torch.float32}
    np.testing.assert_allclose(ours, [state.numpy() for state in others], atol=1e-3)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_float32_survives_the_almost_signal_free_end_of_the_cosine_schedule(solver: str) -> None:
    schedule = make_schedule("cosine", prediction="epsilon")
    x0, noise = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    walk = grid("trailing", 250)
    x = add_noise(np.float32(schedule.alpha(999)), np.float32(schedule.sigma(999)), x0, noise)
    states = run(step_table(solver, walk, schedule), x, oracle(schedule, x0, noise))
    np.testing.assert_allclose(states[-1], x0, atol=1 / 255)  # half a level of an 8-bit pixel


def test_clipping_holds_every_estimate_of_the_image_inside_its_range() -> None:
    schedule = make_schedule("linear")
    table = step_table("dpmpp-2m", grid("trailing", 10), schedule)
    clipped = [denoised for _, denoised in trajectory(table, START, bent, clip_x0=True)]
    free = [denoised for _, denoised in trajectory(table, START, bent)]
    assert np.abs(clipped).max() <= 1.0 < np.abs(free).max()


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "heun"}, "solver must be one of ddim, ddpm, euler, dpmpp-2m, unipc-1, not 'heun'"),
        ({"grid": ()}, "one or more strictly decreasing"),
        ({"grid": (5, 5)}, "strictly decreasing"),
        ({"grid": (5, 9)}, "strictly decreasing"),
        ({"grid": (1000, 5)}, r"0\.\.999"),
        ({"grid": (5, -1)}, r"0\.\.999"),
        ({"eta": 1.5}, r"eta must be in 0\.\.1"),
        ({"eta": float("nan")}, r"eta must be in 0\.\.1"),
        ({"solver": "euler", "eta": 0.5}, "fixes eta at 0"),
        ({"solver": "ddpm", "eta": 0.5}, "fixes eta at 1"),
        ({"previous": 500}, "above the first timestep of the grid, 500"),
        ({"previous": 1000}, "below 1000, not 1000"),
    ],
)
def test_an_impossible_table_is_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    legal: dict[str, Any] = {"solver": "ddim", "grid": (500, 250), "schedule": make_schedule("linear")}
    with pytest.raises(ValueError, match=message):
        step_table(**(legal | arguments))


def test_a_walk_without_what_its_table_needs_is_refused_in_one_sentence() -> None:
    schedule = make_schedule("linear")
    with pytest.raises(ValueError, match="this ddpm table is stochastic: pass noise"):
        run(step_table("ddpm", (500, 250), schedule), START, bent)
    with pytest.raises(ValueError, match="pass the previous estimate of the image"):
        run(step_table("dpmpp-2m", (500, 250), schedule, previous=600), START, bent)
