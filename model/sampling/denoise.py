"""Sampling in torch, from a model at hand: the offline twin of the service's engine, on the same solver tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import Network
from ditserve.model.spec.diffusion import Schedule, guidance_weight, guided
from ditserve.model.spec.mixing import assign_blocks, compose_outputs, normalised_weights, splice_states
from ditserve.model.spec.solvers import StepTable, learned_log_variance, trajectory, variance_bounds


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: strength, where it acts, on how many channels (None: all), and its decay with noise.

    Raises:
        ValueError: an interval or a decay that `guidance_weight` refuses, or no channel.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        guidance_weight(self.scale, 0, 1, self.interval, self.decay)
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels must be 1 or more, or None for all, not {self.channels}")


@dataclass(frozen=True, slots=True)
class Conditions:
    """Several conditions at once, embeddings (N, D) each.

    "compose": the network runs under each, outputs are summed by `weights` (relative, one each; negative steers away).
    "layers": it runs once, the first condition steering the shallow blocks and the last the deep ones.

    Raises:
        ValueError: no condition, embeddings of different shapes, or for "compose" not one weight each.
    """

    embeddings: tuple[Tensor, ...]
    weights: tuple[float, ...] = (1.0,)
    how: Literal["compose", "layers"] = "compose"

    def __post_init__(self) -> None:
        shapes = {tuple(embedding.shape) for embedding in self.embeddings}
        if len(shapes) != 1:
            raise ValueError(
                f"give one or more condition embeddings (N, D) of one shape, not {sorted(shapes)}"
            )
        if self.how == "compose":
            normalised_weights(self.weights, len(self.embeddings))


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The guided network as a function of (x, timestep)."""

    model: Network
    schedule: Schedule
    conditions: Conditions
    guidance: Guidance = Guidance()

    def __call__(self, x: Tensor, timestep: int) -> Tensor:
        """(N, C, H, W) → the raw output (N, C_out, H, W); channels beyond C (a learned variance) are not guided."""
        t = torch.full((len(x),), float(timestep), device=x.device)
        output = self._conditional(x, t)
        weight = guidance_weight(
            self.guidance.scale,
            timestep,
            self.schedule.timesteps,
            self.guidance.interval,
            self.guidance.decay,
        )
        if weight == 1.0:
            return output
        labels = null_labels(self.model.config, len(x), x.device)
        empty = self.model.backbone(x, self.model.modulate(t, self.model.embed(labels)))
        return guided(output, empty, weight, self.guidance.channels or x.shape[1])

    def _conditional(self, x: Tensor, t: Tensor) -> Tensor:
        model, conditions = self.model, self.conditions
        states = [model.modulate(t, embedding) for embedding in conditions.embeddings]
        if conditions.how == "layers":
            depth = model.config.depth
            return model.backbone(x, splice_states(model.config, states, assign_blocks(depth, len(states))))
        return compose_outputs([model.backbone(x, state) for state in states], conditions.weights)


def generator(seed: int) -> np.random.Generator:
    """The source of one sample's noise, here and in the service: its start, then what a stochastic solver draws.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a seed must be 0 or more, not {seed}")
    return np.random.Generator(np.random.Philox(seed))


def noise(seed: int, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """The noise (C, H, W) a seed means, everywhere."""
    return drawn(generator(seed), shape)


def drawn(source: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The next standard normal numbers of `source`, float32."""
    return source.standard_normal(shape, dtype=np.float32).reshape(shape)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    table: StepTable,
    seeds: Sequence[int],
    size: tuple[int, int] | None = None,
    *,
    clip_x0: bool = True,
) -> Iterator[Tensor]:
    """Walk one sample per seed down `table`; yields the x0 estimate (N, C, H, W) of each step, the last the sample.

    `size` (H, W) is the trained one unless given. A DDPM table on a model of learned variance uses that variance.

    Raises:
        ValueError: a size the model cannot take, or not one seed for each row of the conditions.
    """
    config = denoiser.model.config
    rows = len(denoiser.conditions.embeddings[0])
    if len(seeds) != rows:
        raise ValueError(f"give one seed for each of the {rows} rows of the conditions, not {len(seeds)}")
    shape = (config.in_channels, *(size or config.image_size))
    sources = [generator(seed) for seed in seeds]
    device = next(denoiser.model.parameters()).device

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([drawn(source, shape) for source in sources])).to(device)

    network, more_noise = (
        _learned(denoiser, table, draw) if table.solver == "ddpm" else (_mean(denoiser), draw)
    )
    for _, x0 in trajectory(table, draw(), network, noise=more_noise, clip_x0=clip_x0):
        yield x0


Output = Callable[[Tensor, int], Tensor]
Noise = Callable[[], Tensor]


def _mean(denoiser: Denoiser) -> Output:
    return lambda x, t: denoiser(x, t)[:, : x.shape[1]]


def _learned(denoiser: Denoiser, table: StepTable, draw: Noise) -> tuple[Output, Noise]:
    """The network, and noise scaled from the table's variance to the one learned with the step at hand."""
    if not denoiser.model.config.learn_sigma:
        return _mean(denoiser), draw
    low, high = variance_bounds(table.timestep.tolist(), denoiser.schedule)
    place = {int(t): k for k, t in enumerate(table.timestep)}
    scale: list[Tensor] = []

    def network(x: Tensor, t: int) -> Tensor:
        mean, v = denoiser(x, t).chunk(2, dim=1)
        step = place[t]
        log_variance = learned_log_variance(v, float(low[step]), float(high[step]))
        scale[:] = [torch.exp(0.5 * log_variance) / float(table.s[step] or 1.0)]
        return mean

    return network, lambda: draw() * scale[0]
