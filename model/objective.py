"""Training losses of a diffusion model, one row at a time: every function returns (N,) fp32.

With x_t = α·x0 + σ·ε and signal-to-noise ratio α²/σ², the errors of the three predictions are one error in three scales:
|ε̂ − ε|² = SNR·|x̂0 − x0|² and |v̂ − v|² = (SNR + 1)·|x̂0 − x0|² (Salimans & Ho, arXiv:2202.00512).
"""

from __future__ import annotations

from torch import Tensor

from model.diffusion import Prediction


def target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is asked for, shaped as x0 (N, C, H, W); alpha and sigma broadcast against it."""
    if prediction == "epsilon":
        return noise
    return x0 if prediction == "x0" else alpha * noise - sigma * x0


def loss_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, cap: float | None) -> Tensor:
    """Weight of the squared error, (N,), by prediction.

    epsilon and v: min-SNR weighting min(SNR, cap) expressed in their own scale (Hang et al., arXiv:2303.09556), 1 without a cap.
    x0: 1/σ² up to the cap, which is the v loss where the cap does not bind (α² + σ² = 1, so SNR + 1 = 1/σ²).
    """
    snr = ((alpha / sigma) ** 2).flatten()
    if prediction == "x0":
        weight = snr + 1
        return weight if cap is None else weight.clamp(max=cap)
    if cap is None:
        return snr.new_ones(snr.shape)
    return snr.clamp(max=cap) / (snr if prediction == "epsilon" else snr + 1)


def denoising_loss(
    prediction: Prediction,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    cap: float | None = None,
) -> Tensor:
    """Weighted mean squared error of each row, (N,) fp32; alpha and sigma are (N, 1, 1, 1)."""
    error = output.float() - target(prediction, x0, noise, alpha, sigma).float()
    return error.square().flatten(1).mean(1) * loss_weight(prediction, alpha, sigma, cap)
