"""Noise schedules, guidance and training formulas, compared with the papers and with diffusers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditserve.model.spec.diffusion import (
    CLEAN,
    PREDICTIONS,
    Prediction,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
    add_noise,
    loss_weights,
    make_schedule,
    training_target,
    variance_preserving,
    x0_coefficients,
)
from ditserve.model.spec.guidance import guidance_weight, guided

reference: Any = diffusers  # untyped
predictions = st.sampled_from(PREDICTIONS)
processes = st.builds(
    variance_preserving,
    st.sampled_from(["linear", "cosine"]),
    st.integers(1, 1200),
    st.floats(-5.0, 5.0),
)
flows = st.builds(
    Schedule,
    st.just(RectifiedFlow()),
    st.sampled_from(["flow", "v", "x0"]),
    st.sampled_from(["sigma", "1-sigma"]),
    st.sampled_from([1.0, 1000.0]),
    st.sampled_from([1, -1]),
)
schedules = st.builds(Schedule, processes, predictions) | flows


def noisy_levels(schedule: Schedule) -> st.SearchStrategy[float]:
    """Draw levels that a network is trained at."""
    return st.floats(0.0, 1.0).map(lambda share: float(schedule.process.trained_levels(share)))


# -- schedules


@pytest.mark.parametrize(("kind", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_are_the_published_ones(kind: str, theirs: str) -> None:
    published = reference.DDIMScheduler(beta_schedule=theirs).alphas_cumprod.numpy()
    np.testing.assert_allclose(variance_preserving(kind).alpha_bar, published, rtol=2e-4)


def test_the_linear_schedule_has_ddpm_betas_in_float64() -> None:
    alpha_bar = variance_preserving("linear").alpha_bar
    betas = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    np.testing.assert_allclose(betas, 1e-4 + (2e-2 - 1e-4) * np.arange(1000) / 999, rtol=1e-10)


def test_cosine_betas_are_clipped_so_the_noisy_end_keeps_a_trace_of_signal() -> None:
    alpha_bar = variance_preserving("cosine").alpha_bar
    assert 1.0 - alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.999, rel=1e-12)
    assert 1e-9 < alpha_bar[-1] < 1e-8


@settings(max_examples=40, deadline=None)
@given(processes, st.data())
def test_any_table_is_variance_preserving_and_loses_signal_at_every_level(
    process: VariancePreserving, data: st.DataObject
) -> None:
    assert process.alpha_bar.dtype == np.float64
    assert process.alpha_bar.shape == (process.timesteps,)
    between = data.draw(st.lists(st.floats(0.0, process.noisiest), max_size=5))
    levels = np.unique([-1.0, *range(process.timesteps), *between])
    alpha, sigma = process.alpha(levels), process.sigma(levels)
    # Levels may lie nearer to each other than what is computed of them.
    assert np.all(np.diff(alpha) <= 1e-15)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-14)
    np.testing.assert_array_equal(process.alpha(range(process.timesteps)), np.sqrt(process.alpha_bar))


def test_between_timesteps_the_log_snr_is_linear() -> None:
    process = variance_preserving("linear")
    snr = [np.log(process.alpha(t) / process.sigma(t)) for t in (500, 500.25, 501)]
    assert snr[1] == pytest.approx(0.75 * snr[0] + 0.25 * snr[2], rel=1e-12)


def test_a_flow_is_the_line_from_image_to_noise_with_exact_ends() -> None:
    flow = RectifiedFlow()
    sigma = np.linspace(0.0, 1.0, 101)
    np.testing.assert_array_equal(flow.sigma(sigma), sigma)
    np.testing.assert_array_equal(flow.alpha(sigma), 1.0 - sigma)
    ends = [float(of(level)) for level in (0.0, 1.0) for of in (flow.alpha, flow.sigma)]
    assert ends == [1.0, 0.0, 0.0, 1.0]
    for bad in (-1e-9, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"sigma must be in 0\.\.1"):
            flow.alpha(bad)


@settings(max_examples=40, deadline=None)
@given(schedules, st.data())
def test_what_a_network_is_told_tells_its_share_of_the_noise(schedule: Schedule, data: st.DataObject) -> None:
    level = data.draw(noisy_levels(schedule))
    told = schedule.told([level])
    assert told.dtype == np.float32
    np.testing.assert_allclose(schedule.share_told(told), schedule.share(level), atol=1e-6)


def test_a_network_is_told_what_its_family_is_told() -> None:
    table = Schedule(variance_preserving("linear"))
    assert table.told([999.0]).tolist() == [999.0]
    flow = RectifiedFlow()
    told = {
        "SD3": Schedule(flow, "flow", "sigma", 1000.0),
        "FLUX": Schedule(flow, "flow", "sigma"),
        "SiT": Schedule(flow, "flow", "1-sigma", output_sign=-1),
    }
    assert [float(schedule.told(0.75)) for schedule in told.values()] == [750.0, 0.75, 0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RectifiedFlow(), "flow", "timestep"), "noise_input of a flow must be sigma or 1-sigma, not"),
        (
            (variance_preserving("linear"), "v", "sigma"),
            "noise_input of a table of timesteps must be timestep",
        ),
        ((RectifiedFlow(), "epsilon", "sigma"), "prediction of a flow must be flow, v or x0"),
        ((RectifiedFlow(), "flow", "sigma", 0.0), "noise_scale must be positive, not 0"),
        ((RectifiedFlow(), "flow", "sigma", float("nan")), "noise_scale must be positive, not nan"),
        ((RectifiedFlow(), "flow", "sigma", 1.0, 2), "output_sign must be 1 or -1, not 2"),
    ],
)
def test_a_network_that_the_process_does_not_have_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 1200), st.floats(-5.0, 5.0))
def test_the_shift_is_added_to_the_log_snr(kind: str, timesteps: int, shift: float) -> None:
    plain = variance_preserving(kind, timesteps).alpha_bar
    shifted = variance_preserving(kind, timesteps, shift).alpha_bar
    change = np.log(shifted / (1 - shifted)) - np.log(plain / (1 - plain))
    np.testing.assert_allclose(change, shift, atol=1e-7)


def test_the_clean_image_is_a_timestep_of_its_own() -> None:
    schedule = make_schedule("linear")
    assert [float(schedule.alpha(CLEAN)), float(schedule.sigma(CLEAN))] == [1.0, 0.0]
    for t in (-2, -0.5, 999.5, float("nan")):
        with pytest.raises(ValueError, match=r"-1 or in 0\.\.999"):
            schedule.alpha(t)
        with pytest.raises(ValueError, match=r"-1 or in 0\.\.999"):
            schedule.sigma(t)


def test_a_schedule_keeps_its_own_read_only_copy() -> None:
    source = np.array([0.9, 0.5, 0.1])
    process = VariancePreserving(source)
    source[0] = 0.0
    assert process.alpha_bar[0] == 0.9
    with pytest.raises(ValueError, match="read-only"):
        process.alpha_bar[0] = 0.0


@pytest.mark.parametrize(
    "table", [[], [[0.5]], [0.5, 0.5], [0.1, 0.9], [1.0, 0.5], [0.5, 0.0], [float("nan")]]
)
def test_a_table_that_is_no_schedule_is_refused(table: Any) -> None:
    with pytest.raises(ValueError, match="alpha_bar must"):
        VariancePreserving(np.array(table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "quadratic"}, "schedule must be one of linear, cosine"),
        ({"kind": "linear", "timesteps": 0}, "at least 1"),
        ({"kind": "linear", "prediction": "score"}, "prediction must be one of epsilon, v, x0"),
        ({"kind": "linear", "log_snr_shift": float("nan")}, "finite"),
        ({"kind": "linear", "log_snr_shift": 60.0}, "milder"),
        ({"kind": "linear", "log_snr_shift": -900.0}, "milder"),
    ],
)
def test_an_impossible_schedule_is_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(**arguments)


# -- guidance


def test_guidance_of_the_first_channels_is_the_published_models() -> None:
    rng = np.random.default_rng(0)
    cond, uncond = rng.standard_normal((2, 3, 8, 4, 4))
    kept = cond.copy(), uncond.copy()
    expected = np.concatenate([uncond[:, :3] + 4.0 * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], axis=1)
    np.testing.assert_array_equal(guided(cond, uncond, 4.0, 3), expected)
    np.testing.assert_array_equal(guided(cond, uncond, 4.0, 0), cond)
    np.testing.assert_array_equal(guided(cond, uncond, 4.0, 8), guided(cond, uncond, 4.0))
    np.testing.assert_array_equal((cond, uncond), kept)


@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_is_the_same_in_numpy_and_torch_with_a_scale_per_row(channels: int | None) -> None:
    rng = np.random.default_rng(1)
    cond, uncond = rng.standard_normal((2, 3, 4, 2, 2), dtype=np.float32)
    scale = np.array([1.5, 4.0, 0.0], dtype=np.float32).reshape(3, 1, 1, 1)
    ours = guided(cond, uncond, scale, channels)
    theirs = guided(torch.from_numpy(cond), torch.from_numpy(uncond), torch.from_numpy(scale), channels)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(ours[:1], guided(cond[:1], uncond[:1], 1.5, channels))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 20.0), st.integers(1, 1000), st.data())
def test_guidance_outside_its_interval_is_exactly_one(
    scale: float, timesteps: int, data: st.DataObject
) -> None:
    low, high = sorted(data.draw(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0))))
    t = data.draw(st.integers(0, timesteps - 1))
    inside = low <= t / max(timesteps - 1, 1) <= high
    schedule = make_schedule("linear", timesteps)
    assert guidance_weight(scale, t, schedule, (low, high)) == (scale if inside else 1.0)


def test_the_interval_of_a_flow_is_in_sigma() -> None:
    flow = Schedule(RectifiedFlow(), "flow", "1-sigma", output_sign=-1)
    weights = [guidance_weight(3.0, sigma, flow, (0.2, 0.75)) for sigma in (1.0, 0.76, 0.75, 0.2, 0.19)]
    assert weights == [1.0, 1.0, 3.0, 3.0, 1.0]
    assert guidance_weight(4.0, 0.5, flow, decay=0.7) == pytest.approx(4.0 * np.exp(-0.35), rel=1e-14)


def test_the_whole_interval_covers_every_timestep() -> None:
    assert {guidance_weight(3.0, t, make_schedule("linear")) for t in range(1000)} == {3.0}
    assert guidance_weight(3.0, 0, make_schedule("linear", 1)) == 3.0


def test_guidance_decays_with_noise() -> None:
    schedule = make_schedule("linear")
    weights = [guidance_weight(4.0, t, schedule, decay=0.7) for t in (0, 500, 999)]
    np.testing.assert_allclose(weights, 4.0 * np.exp(-0.7 * np.array([0.0, 0.5, 0.999])), rtol=1e-14)
    assert guidance_weight(4.0, 500, schedule, decay=-0.7) > 4.0
    assert guidance_weight(4.0, 999, schedule, (0.0, 0.5), decay=0.7) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": (0.5, 0.2)}, "0 <= low <= high <= 1"),
        ({"interval": (-0.1, 0.2)}, "0 <= low <= high <= 1"),
        ({"interval": (0.0, float("nan"))}, "0 <= low <= high <= 1"),
        ({"level": 1000}, "above -1 and at most 999, not 1000"),
        ({"level": -1}, "above -1 and at most 999, not -1"),
        ({"decay": 21.0}, r"in -20\.\.20"),
        ({"decay": float("nan")}, r"in -20\.\.20"),
    ],
)
def test_impossible_guidance_is_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    legal: dict[str, Any] = {"scale": 2.0, "level": 5, "schedule": make_schedule("linear")}
    with pytest.raises(ValueError, match=message):
        guidance_weight(**(legal | arguments))


# -- training


@settings(max_examples=40, deadline=None)
@given(schedules, st.data())
def test_a_perfect_output_gives_back_the_image_for_every_prediction(
    schedule: Schedule, data: st.DataObject
) -> None:
    level = data.draw(noisy_levels(schedule))
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    x0, noise = np.random.default_rng(0).standard_normal((2, 16))
    noisy = add_noise(alpha, sigma, x0, noise)
    output = schedule.output_sign * training_target(schedule.prediction, alpha, sigma, x0, noise)
    of_x, of_output = schedule.x0_coefficients(level)
    rounding = 1e-14 / float(alpha) if schedule.prediction == "epsilon" else 1e-14
    np.testing.assert_allclose(of_x * noisy + of_output * output, x0, atol=rounding)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_formulas_are_the_same_in_torch_with_a_timestep_per_row(prediction: Prediction) -> None:
    schedule = make_schedule("cosine", prediction=prediction)
    t = np.array([3, 500, 999])
    alpha, sigma = schedule.alpha(t).reshape(3, 1), schedule.sigma(t).reshape(3, 1)
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 16))
    ours = (*_train_row(prediction, alpha, sigma, x0, noise),)
    theirs = _train_row(prediction, *(torch.from_numpy(array) for array in (alpha, sigma, x0, noise)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-14)


def _train_row(prediction: Prediction, alpha: Any, sigma: Any, x0: Any, noise: Any) -> tuple[Any, ...]:
    target = training_target(prediction, alpha, sigma, x0, noise)
    return (
        add_noise(alpha, sigma, x0, noise),
        target,
        *(of + 0 * target for of in x0_coefficients(prediction, alpha, sigma)),
    )


@settings(max_examples=40, deadline=None)
@given(schedules, predictions, st.data())
def test_loss_weights_measure_the_error_in_another_space(
    schedule: Schedule, space: Prediction, data: st.DataObject
) -> None:
    level = data.draw(noisy_levels(schedule))
    alpha, sigma = schedule.alpha(level), schedule.sigma(level)
    error_x0 = 1e-3
    # For the same x_t, an x_0 that is off by error_x0 means noise off by -alpha / sigma times as much.
    error_noise = -alpha / sigma * error_x0
    of_output, of_space = (
        float(training_target(p, alpha, sigma, np.float64(error_x0), np.float64(error_noise)))
        for p in (schedule.prediction, space)
    )
    weight = loss_weights(schedule, level, space)
    assert weight * of_output**2 == pytest.approx(of_space**2, rel=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_capped_epsilon_weight_is_min_snr(prediction: Prediction) -> None:
    process = variance_preserving("linear")
    alpha, sigma = process.alpha(range(1000)), process.sigma(range(1000))
    snr = alpha**2 / sigma**2
    capped = np.minimum(snr, 5.0)
    # An error of the velocity noise - x_0 is one of x_0 times 1 + alpha / sigma.
    flow = capped / (1.0 + alpha / sigma) ** 2
    paper = {"epsilon": capped / snr, "v": capped / (snr + 1.0), "x0": capped, "flow": flow}[prediction]
    schedule = Schedule(process, prediction)
    np.testing.assert_allclose(loss_weights(schedule, range(1000), "epsilon", 5.0), paper, rtol=1e-11)


def test_the_plain_loss_has_equal_weights_and_a_capped_v_loss_is_capped() -> None:
    process = variance_preserving("cosine")
    schedule, t = Schedule(process, "x0"), range(1000)
    np.testing.assert_allclose(loss_weights(schedule, t, "x0"), 1.0, rtol=1e-15)
    capped = np.minimum(1.0 / (1.0 - process.alpha_bar), 4.0)
    np.testing.assert_allclose(loss_weights(schedule, t, "v", 4.0), capped, rtol=1e-12)
    image_of_flow = Schedule(RectifiedFlow(), "x0", "sigma")
    sigma = np.array([0.01, 0.1, 0.5, 1.0])
    np.testing.assert_allclose(
        loss_weights(image_of_flow, sigma, "flow", 400.0), np.minimum(sigma**-2, 400.0), rtol=1e-12
    )


def test_impossible_training_formulas_are_refused_in_one_sentence() -> None:
    schedule = make_schedule("linear")
    unknown: Any = "score"
    with pytest.raises(ValueError, match="cap must be positive"):
        loss_weights(schedule, 5, "v", 0.0)
    with pytest.raises(ValueError, match="prediction must be one of"):
        loss_weights(schedule, 5, unknown)
    with pytest.raises(ValueError, match="prediction must be one of"):
        training_target(unknown, 1.0, 0.0, np.zeros(1), np.zeros(1))


def test_diffusion_and_solvers_load_without_torch() -> None:
    modules = "ditserve.model.spec.grids, ditserve.model.spec.solvers"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
