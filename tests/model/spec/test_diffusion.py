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
    Schedule,
    add_noise,
    guidance_weight,
    guided,
    loss_weights,
    make_schedule,
    training_target,
    x0_coefficients,
)

reference: Any = diffusers  # untyped
predictions = st.sampled_from(PREDICTIONS)
schedules = st.builds(
    make_schedule,
    st.sampled_from(["linear", "cosine"]),
    st.integers(1, 1200),
    prediction=predictions,
    log_snr_shift=st.floats(-5.0, 5.0),
)


# -- schedules


@pytest.mark.parametrize(("kind", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_are_the_published_ones(kind: str, theirs: str) -> None:
    published = reference.DDIMScheduler(beta_schedule=theirs).alphas_cumprod.numpy()
    np.testing.assert_allclose(make_schedule(kind).alpha_bar, published, rtol=2e-4)


def test_the_linear_schedule_has_ddpm_betas_in_float64() -> None:
    alpha_bar = make_schedule("linear").alpha_bar
    betas = 1.0 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    np.testing.assert_allclose(betas, 1e-4 + (2e-2 - 1e-4) * np.arange(1000) / 999, rtol=1e-10)


def test_cosine_betas_are_clipped_so_the_noisy_end_keeps_a_trace_of_signal() -> None:
    alpha_bar = make_schedule("cosine").alpha_bar
    assert 1.0 - alpha_bar[-1] / alpha_bar[-2] == pytest.approx(0.999, rel=1e-12)
    assert 1e-9 < alpha_bar[-1] < 1e-8


@settings(max_examples=40, deadline=None)
@given(schedules)
def test_any_schedule_is_variance_preserving_and_loses_signal_at_every_timestep(schedule: Schedule) -> None:
    assert schedule.alpha_bar.dtype == np.float64
    assert schedule.alpha_bar.shape == (schedule.timesteps,)
    assert np.all(np.diff(schedule.alpha_bar) < 0)
    np.testing.assert_allclose(schedule.alphas**2 + schedule.sigmas**2, 1.0, rtol=1e-14)
    last = schedule.timesteps - 1
    assert schedule.alpha(last) == pytest.approx(schedule.alphas[last], rel=1e-15)
    assert schedule.sigma(last) == pytest.approx(schedule.sigmas[last], rel=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 1200), st.floats(-5.0, 5.0))
def test_the_shift_is_added_to_the_log_snr(kind: str, timesteps: int, shift: float) -> None:
    plain = make_schedule(kind, timesteps).alpha_bar
    shifted = make_schedule(kind, timesteps, log_snr_shift=shift).alpha_bar
    change = np.log(shifted / (1 - shifted)) - np.log(plain / (1 - plain))
    np.testing.assert_allclose(change, shift, atol=1e-7)


def test_the_clean_image_is_a_timestep_of_its_own() -> None:
    schedule = make_schedule("linear")
    assert (schedule.alpha(CLEAN), schedule.sigma(CLEAN)) == (1.0, 0.0)
    for t in (-2, 1000):
        with pytest.raises(ValueError, match=r"in -1\.\.999"):
            schedule.alpha(t)
        with pytest.raises(ValueError, match=r"in -1\.\.999"):
            schedule.sigma(t)


def test_a_schedule_keeps_its_own_read_only_copy() -> None:
    source = np.array([0.9, 0.5, 0.1])
    schedule = Schedule(source)
    source[0] = 0.0
    assert schedule.alpha_bar[0] == 0.9
    with pytest.raises(ValueError, match="read-only"):
        schedule.alpha_bar[0] = 0.0


@pytest.mark.parametrize(
    "table", [[], [[0.5]], [0.5, 0.5], [0.1, 0.9], [1.0, 0.5], [0.5, 0.0], [float("nan")]]
)
def test_a_table_that_is_no_schedule_is_refused(table: Any) -> None:
    with pytest.raises(ValueError, match="alpha_bar must"):
        Schedule(np.array(table))


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
    np.testing.assert_array_equal(guided(cond[0], uncond[0], 4.0, 3), expected[0])
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
    assert guidance_weight(scale, t, timesteps, (low, high)) == (scale if inside else 1.0)


def test_the_whole_interval_covers_every_timestep() -> None:
    assert {guidance_weight(3.0, t, 1000) for t in range(1000)} == {3.0}
    assert guidance_weight(3.0, 0, 1) == 3.0


def test_guidance_decays_with_noise() -> None:
    weights = [guidance_weight(4.0, t, 1000, decay=0.7) for t in (0, 500, 999)]
    np.testing.assert_allclose(weights, 4.0 * np.exp(-0.7 * np.array([0.0, 0.5, 0.999])), rtol=1e-14)
    assert guidance_weight(4.0, 500, 1000, decay=-0.7) > 4.0
    assert guidance_weight(4.0, 999, 1000, (0.0, 0.5), decay=0.7) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": (0.5, 0.2)}, "0 <= low <= high <= 1"),
        ({"interval": (-0.1, 0.2)}, "0 <= low <= high <= 1"),
        ({"interval": (0.0, float("nan"))}, "0 <= low <= high <= 1"),
        ({"t": 1000}, r"in 0\.\.999"),
        ({"t": -1}, r"in 0\.\.999"),
        ({"decay": 21.0}, r"in -20\.\.20"),
        ({"decay": float("nan")}, r"in -20\.\.20"),
    ],
)
def test_impossible_guidance_is_refused_in_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guidance_weight(**{"scale": 2.0, "t": 5, "timesteps": 1000} | arguments)


# -- training


@settings(max_examples=40, deadline=None)
@given(schedules, st.data())
def test_a_perfect_output_gives_back_the_image_for_every_prediction(
    schedule: Schedule, data: st.DataObject
) -> None:
    t = data.draw(st.integers(0, schedule.timesteps - 1))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x0, noise = np.random.default_rng(0).standard_normal((2, 16))
    noisy = add_noise(alpha, sigma, x0, noise)
    output = training_target(schedule.prediction, alpha, sigma, x0, noise)
    of_x, of_output = x0_coefficients(schedule.prediction, alpha, sigma)
    np.testing.assert_allclose(of_x * noisy + of_output * output, x0, atol=1e-14 / alpha)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_formulas_are_the_same_in_torch_with_a_timestep_per_row(prediction: Prediction) -> None:
    schedule = make_schedule("cosine", prediction=prediction)
    t = np.array([3, 500, 999])
    alpha, sigma = schedule.alphas[t].reshape(3, 1), schedule.sigmas[t].reshape(3, 1)
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
    t = data.draw(st.integers(0, schedule.timesteps - 1))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    error_x0 = 1e-3
    # For the same x_t, an x_0 that is off by error_x0 means noise off by -alpha / sigma times as much.
    error_noise = -alpha / sigma * error_x0
    of_output, of_space = (
        float(training_target(p, alpha, sigma, np.float64(error_x0), np.float64(error_noise)))
        for p in (schedule.prediction, space)
    )
    assert loss_weights(schedule, space)[t] * of_output**2 == pytest.approx(of_space**2, rel=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_capped_epsilon_weight_is_min_snr(prediction: Prediction) -> None:
    schedule = make_schedule("linear", prediction=prediction)
    snr = schedule.alpha_bar / (1.0 - schedule.alpha_bar)
    capped = np.minimum(snr, 5.0)
    paper = {"epsilon": capped / snr, "v": capped / (snr + 1.0), "x0": capped}[prediction]
    np.testing.assert_allclose(loss_weights(schedule, "epsilon", 5.0), paper, rtol=1e-12)


def test_the_plain_loss_has_equal_weights_and_a_capped_v_loss_is_capped() -> None:
    schedule = make_schedule("cosine", prediction="x0")
    np.testing.assert_allclose(loss_weights(schedule, "x0"), 1.0, rtol=1e-15)
    np.testing.assert_allclose(
        loss_weights(schedule, "v", 4.0), np.minimum(1.0 / (1.0 - schedule.alpha_bar), 4.0), rtol=1e-12
    )


def test_impossible_training_formulas_are_refused_in_one_sentence() -> None:
    schedule = make_schedule("linear")
    unknown: Any = "score"
    with pytest.raises(ValueError, match="cap must be positive"):
        loss_weights(schedule, "v", 0.0)
    with pytest.raises(ValueError, match="prediction must be one of"):
        loss_weights(schedule, unknown)
    with pytest.raises(ValueError, match="prediction must be one of"):
        training_target(unknown, 1.0, 0.0, np.zeros(1), np.zeros(1))


def test_diffusion_and_solvers_load_without_torch() -> None:
    modules = "ditserve.model.spec.grids, ditserve.model.spec.solvers"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
