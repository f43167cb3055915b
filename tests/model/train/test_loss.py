"""Losses against formulas written down independently, in numpy and scipy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from ditserve.model.nets.layers import along_rows
from ditserve.model.spec.diffusion import (
    PREDICTIONS,
    Prediction,
    RectifiedFlow,
    Schedule,
    make_schedule,
    training_target,
)
from ditserve.model.train.loss import (
    PosteriorTables,
    TrainingNoise,
    draw_levels,
    gaussian_kl,
    pixel_log_likelihood,
    squared_error,
    training_noise,
    variational_term,
)

T = 50
LEVELS = torch.tensor([0, 7, 25, 49])
ALPHA_BAR = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2  # arXiv:2102.09672, eq. 17
ALPHA_BAR = np.cumprod(1 - np.minimum(1 - ALPHA_BAR[1:] / ALPHA_BAR[:-1], 0.999))
SNR = ALPHA_BAR / (1 - ALPHA_BAR)


def pictures(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((4, 3, 2, 2))).float()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_right_output_has_no_error(prediction: Prediction) -> None:
    x0, noise = pictures(0), pictures(1)
    for schedule in (make_schedule("cosine", T, prediction=prediction), *flows(prediction)):
        levels = LEVELS if schedule.noise_input == "timestep" else LEVELS / T + 0.01
        row = TrainingNoise(schedule, "v", 5.0).at(levels)
        alpha, sigma = along_rows(row.alpha, x0), along_rows(row.sigma, x0)
        output = schedule.output_sign * training_target(prediction, alpha, sigma, x0, noise)
        assert squared_error(row, output, x0, noise).tolist() == [0, 0, 0, 0]
        torch.testing.assert_close(row.image(row.noisy(x0, noise), output), x0, rtol=1e-3, atol=1e-3)


def flows(prediction: Prediction) -> list[Schedule]:
    """Return the flows of a prediction: told sigma, and as SiT is told 1 - sigma, with its sign."""
    if prediction == "epsilon":
        return []
    flow = RectifiedFlow()
    return [Schedule(flow, prediction, "sigma"), Schedule(flow, prediction, "1-sigma", output_sign=-1)]


# Hang et al., arXiv:2303.09556, §3: the factor of Min-SNR-5 on the plain loss, by prediction.
MIN_SNR_5 = {
    "x0": np.minimum(SNR, 5.0),
    "epsilon": np.minimum(SNR, 5.0) / SNR,
    "v": np.minimum(SNR, 5.0) / (SNR + 1.0),
    "flow": np.minimum(SNR, 5.0) / (np.sqrt(SNR) + 1.0) ** 2,
}
PLAIN = {prediction: np.ones(T) for prediction in PREDICTIONS}
V_OF_X0 = {"x0": np.minimum(1.0 / (1.0 - ALPHA_BAR), 5.0)}


@pytest.mark.parametrize(
    ("prediction", "space", "cap", "weights"),
    [
        *[(prediction, "epsilon", 5.0, MIN_SNR_5) for prediction in PREDICTIONS],
        *[(prediction, prediction, None, PLAIN) for prediction in PREDICTIONS],
        ("x0", "v", 5.0, V_OF_X0),
    ],
)
def test_a_row_is_weighted_by_its_noise(
    prediction: Prediction, space: Prediction, cap: float | None, weights: dict[str, np.ndarray]
) -> None:
    row = TrainingNoise(make_schedule("cosine", T, prediction=prediction), space, cap).at(torch.arange(T))
    x0, noise, output = (
        torch.randn(T, 3, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(3)
    )
    alpha, sigma = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)
    targets = {
        "x0": x0,
        "epsilon": noise,
        "flow": noise - x0,
        "v": torch.from_numpy(alpha)[:, None, None, None] * noise,
    }
    targets["v"] = targets["v"] - torch.from_numpy(sigma)[:, None, None, None] * x0
    plain = ((output - targets[prediction]) ** 2).double().mean((1, 2, 3)).numpy()
    losses = squared_error(row, output, x0, noise).numpy()
    np.testing.assert_allclose(losses, plain * weights[prediction], rtol=2e-5)


def test_learned_channels_do_not_enter_the_squared_error() -> None:
    row = TrainingNoise(make_schedule("linear", T), "epsilon").at(LEVELS)
    x0, noise, output = pictures(0), pictures(1), pictures(2)
    both = torch.cat([output, pictures(3)], dim=1)
    assert torch.equal(squared_error(row, both, x0, noise), squared_error(row, output, x0, noise))


def posterior(t: int, x0: np.ndarray, x_t: np.ndarray) -> tuple[np.ndarray, float]:
    """Return mean and variance of q(x_{t−1} | x_t, x_0) by Bayes' rule, from its two Gaussian factors."""
    before, step = ALPHA_BAR[t - 1], ALPHA_BAR[t] / ALPHA_BAR[t - 1]
    precision = 1 / (1 - before) + step / (1 - step)
    mean = (np.sqrt(before) * x0 / (1 - before) + np.sqrt(step) * x_t / (1 - step)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_variational_term_is_the_divergence_from_the_posterior(prediction: Prediction) -> None:
    schedule = make_schedule("cosine", T, prediction=prediction)
    levels = torch.tensor([1, 7, 25, 40])
    row_noise = TrainingNoise(schedule, "epsilon").at(levels)
    x0, noise, output, v = (pictures(seed).clamp(-1, 1) for seed in range(4))
    x_t = row_noise.noisy(x0, noise)
    both = torch.cat([output, v], 1)
    terms = variational_term(PosteriorTables.of(schedule), row_noise, both, x0, x_t, levels)
    for row, t in enumerate(levels.tolist()):
        a, s = np.sqrt(ALPHA_BAR[t]), np.sqrt(1 - ALPHA_BAR[t])
        x, out = x_t[row].double().numpy(), output[row].double().numpy()
        estimates = {"x0": out, "epsilon": (x - s * out) / a, "v": a * x - s * out}
        estimate = {**estimates, "flow": (x - s * out) / (a + s)}[prediction]
        mean_q, variance_q = posterior(t, x0[row].double().numpy(), x)
        mean_p, _ = posterior(t, estimate, x)
        beta, share = 1 - ALPHA_BAR[t] / ALPHA_BAR[t - 1], (v[row].double().numpy() + 1) / 2
        variance_p = beta**share * variance_q ** (1 - share)
        nats = 0.5 * np.log(variance_p / variance_q) - 0.5
        nats = nats + (variance_q + (mean_q - mean_p) ** 2) / (2 * variance_p)
        assert terms[row].item() == pytest.approx(nats.mean() / np.log(2), rel=2e-3)


def test_the_divergence_is_its_integral() -> None:
    for mean_q, std_q, mean_p, std_p in [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.2, 0.8), (1.0, 2.0, 0.0, 0.7)]:
        q, p = norm(mean_q, std_q), norm(mean_p, std_p)
        value, _ = quad(lambda x, q=q, p=p: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -20, 20)
        given = (torch.tensor(number, dtype=torch.float64) for number in (mean_q, std_q, mean_p, std_p))
        a, b, c, d = given
        assert gaussian_kl(a, 2 * b.log(), c, 2 * d.log()).item() == pytest.approx(value, abs=1e-8)


def test_the_likelihood_of_a_pixel_is_that_of_its_bin() -> None:
    values = np.arange(256) / 127.5 - 1
    for mean, std in [(0.0, 0.3), (0.9, 0.05), (-1.4, 0.5)]:
        edges = [-np.inf, *(values[:-1] + values[1:]) / 2, np.inf]
        bins = np.array([norm.cdf(b, mean, std) - norm.cdf(a, mean, std) for a, b in pairwise(edges)])
        probabilities = pixel_log_likelihood(
            torch.from_numpy(values), torch.full((256,), mean), torch.full((256,), np.log(std))
        ).exp()
        np.testing.assert_allclose(probabilities, np.maximum(bins, 1e-12), rtol=1e-5, atol=2e-12)
        assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_at_the_last_step_the_term_is_the_likelihood_in_bits() -> None:
    schedule = make_schedule("cosine", T, prediction="x0")
    tables, t = PosteriorTables.of(schedule), torch.tensor([0])
    x0 = torch.linspace(-1, 1, 12).view(1, 3, 2, 2)
    output = torch.cat([x0 + 0.01, torch.zeros_like(x0)], 1)
    terms = variational_term(tables, TrainingNoise(schedule, "v").at(t), output, x0, x0, t)
    log_std = 0.25 * (tables.log_low[0] + tables.log_high[0])
    expected = -pixel_log_likelihood(x0, tables.mean_x0[0] * (x0 + 0.01) + tables.mean_x[0] * x0, log_std)
    assert terms.item() == pytest.approx(expected.mean().item() / np.log(2), rel=1e-6)


def test_only_the_variance_learns_from_the_variational_term() -> None:
    schedule = make_schedule("linear", T)
    tables, row = PosteriorTables.of(schedule), TrainingNoise(schedule, "epsilon").at(LEVELS)
    output = torch.cat([pictures(2), pictures(3)], 1).requires_grad_()
    variational_term(tables, row, output, pictures(0), pictures(1), LEVELS).sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad[:, :3], torch.zeros(4, 3, 2, 2))
    assert (output.grad[:, 3:] != 0).flatten(1).any(1).all()


def test_timesteps_follow_their_law() -> None:
    generator = torch.Generator().manual_seed(0)
    schedule = make_schedule("linear", 10)
    uniform = draw_levels(20_000, schedule, generator).long()
    assert np.abs(np.bincount(uniform, minlength=10) / 20_000 - 0.1).max() < 0.01
    middling = draw_levels(20_000, schedule, generator, law=(-0.5, 0.8)).long()
    edges = np.linspace(0, 1, 11)
    with np.errstate(divide="ignore"):
        expected = np.diff(norm.cdf(np.log(edges / (1 - edges)), -0.5, 0.8))
    assert np.abs(np.bincount(middling, minlength=10) / 20_000 - expected).max() < 0.01
    extreme = draw_levels(1000, schedule, generator, law=(0, 500))
    assert set(extreme.tolist()) >= {0, 9}
    assert extreme.max() == 9


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("law", [None, (-0.4, 1.2)])
def test_levels_of_a_flow_follow_their_law(law: tuple[float, float] | None, shift: float) -> None:
    flow = Schedule(RectifiedFlow(), "flow", "sigma")
    drawn = draw_levels(20_000, flow, torch.Generator().manual_seed(0), law=law, shift=shift)
    edges = np.linspace(0, 1, 11)
    # The shift is undone: sigma = s · u / (1 + (s − 1) · u).
    share = edges / (shift - (shift - 1) * edges)
    if law is not None:
        with np.errstate(divide="ignore"):
            share = norm.cdf(np.log(share / (1 - share)), *law)
    expected = np.diff(share)
    assert np.abs(np.histogram(drawn, edges)[0] / 20_000 - expected).max() < 0.012
    assert drawn.min() > 0


def test_a_shift_of_one_draws_the_timesteps_that_a_run_drew_before_there_was_one() -> None:
    drawn = draw_levels(50, make_schedule("linear"), torch.Generator().manual_seed(3))
    assert torch.equal(drawn.long(), torch.randint(1000, (50,), generator=torch.Generator().manual_seed(3)))


def test_an_image_predicted_in_a_flow_is_trained_by_the_error_of_the_velocity() -> None:
    noise = training_noise(Schedule(RectifiedFlow(), "x0", "sigma"))
    sigma = torch.tensor([0.001, 0.05, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(noise.at(sigma).weight, torch.tensor([400.0, 400.0, 4.0, 1.0]))
    assert training_noise(Schedule(RectifiedFlow(), "flow", "sigma")).at(sigma).weight.tolist() == [1.0] * 4
