"""Sampling in torch with a loaded model: the offline twin of the service's engine, on the same solver tables.

denoiser = Denoiser(model, schedule, Conditions((embedding,)), Guidance(2.0))
table = step_table("ddim", noise_levels("trailing", 20, schedule), schedule)
*_, x0 = denoise(denoiser, table, seeds=[5, 6])  # (2, C, H, W)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import Network
from ditserve.model.spec.block_cache import BlockCache, extrapolated
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.guidance import GuidanceNorm, check_guidance, guidance_weight, guided
from ditserve.model.spec.mixing import assign_blocks, compose_outputs, normalised_weights, splice_states
from ditserve.model.spec.sizes import Size
from ditserve.model.spec.solvers import LEARNED, StepTable, learned_log_variance, trajectory, variance_bounds
from ditserve.model.spec.source import NoisySource, SourceLatent
from ditserve.model.spec.stretches import Stretch, stretch_at


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance.

    `scale` is its strength, and `decay` lowers it with noise. It acts where t / (T − 1), or sigma of a flow,
    lies in `interval`, on the first `channels` channels (None: all). See `guidance_weight`. `norm` is that of
    `guided`.

    Raises:
        ValueError: an interval or a decay that `guidance_weight` refuses, or no channel.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    decay: float = 0.0
    norm: GuidanceNorm | None = None

    def __post_init__(self) -> None:
        check_guidance(self.interval, self.decay)
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels must be 1 or more, or None for all, not {self.channels}")


@dataclass(frozen=True, slots=True)
class Conditions:
    """One or more conditions of N samples, embeddings (N, D) each.

    "compose": the network runs under each condition, and the outputs are summed by `weights` (relative, one
    for each condition; a negative one steers away). "layers": the network runs once; the first condition
    steers the shallow blocks, the last the deep ones. Guidance subtracts `negative` (N, D); None: the null
    classes and no text.

    Raises:
        ValueError: no condition, embeddings of different shapes, or for "compose" not one weight each.
    """

    embeddings: tuple[Tensor, ...]
    weights: tuple[float, ...] = (1.0,)
    how: Literal["compose", "layers"] = "compose"
    negative: Tensor | None = None

    def __post_init__(self) -> None:
        given = self.embeddings if self.negative is None else (*self.embeddings, self.negative)
        shapes = {tuple(embedding.shape) for embedding in given}
        if len(shapes) != 1:
            raise ValueError(
                f"give one or more condition embeddings (N, D) of one shape, not {sorted(shapes)}"
            )
        if self.how == "compose":
            normalised_weights(self.weights, len(self.embeddings))

    def begun(self, network: DiT, first_frame: Tensor) -> Conditions:
        """Return these conditions with the first frame (C, H, W) of every sample told.

        What guidance subtracts is told it too, so that guidance is about the other conditions alone.
        """
        rows, negative = len(self.embeddings[0]), self.negative
        if negative is None:
            negative = network.embed(null_labels(network.config, rows, first_frame.device))
        told = [network.tell_first_frame(embedding, first_frame) for embedding in self.embeddings]
        return replace(self, embeddings=tuple(told), negative=network.tell_first_frame(negative, first_frame))


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The guided network as a function of (x, noise level)."""

    model: Network
    schedule: Schedule
    conditions: Conditions
    guidance: Guidance = Guidance()

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """Return the raw output (N, C_out, H, W) at x (N, C, H, W).

        Channels beyond C, which predict a learned variance, are not guided.
        """
        t = torch.full((len(x),), float(self.schedule.told(level)), device=x.device)
        output = self._conditional(x, t)
        guidance = self.guidance
        weight = guidance_weight(guidance.scale, level, self.schedule, guidance.interval, guidance.decay)
        if weight == 1.0:
            return output
        negative = self.conditions.negative
        if negative is None:
            negative = self.model.embed(null_labels(self.model.config, len(x), x.device))
        unconditional = self._run(-1, x, self.model.modulate(t, negative))
        return guided(output, unconditional, weight, guidance.channels or x.shape[1], guidance.norm)

    def _conditional(self, x: Tensor, t: Tensor) -> Tensor:
        model, conditions = self.model, self.conditions
        states = [model.modulate(t, embedding) for embedding in conditions.embeddings]
        if conditions.how == "layers":
            depth = model.config.depth
            return model.backbone(x, splice_states(model.config, states, assign_blocks(depth, len(states))))
        outputs = [self._run(k, x, state) for k, state in enumerate(states)]
        return compose_outputs(outputs, conditions.weights)

    def _run(self, branch: int, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Return the network's output under a condition, or under what guidance subtracts: branch -1."""
        return self.model.backbone(x, state)


@dataclass(frozen=True, slots=True)
class CachingDenoiser(Denoiser):
    """A denoiser whose first blocks run at some steps only, as `cache` says. It is for one trajectory."""

    cache: BlockCache | None = None
    memory: BlockMemory = field(default_factory=lambda: BlockMemory())

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """Return the raw output (N, C_out, H, W) at x (N, C, H, W)."""
        guidance = self.guidance
        weight = guidance_weight(guidance.scale, level, self.schedule, guidance.interval, guidance.decay)
        self.memory.go_on(guided=weight != 1.0)
        return Denoiser.__call__(self, x, level)

    def _run(self, branch: int, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        network, cache, memory = self.model, self.cache, self.memory
        assert isinstance(network, DiT)
        assert cache is not None
        if cache.is_due(memory.since):
            memory.keep(branch, network.trunk(x, state, cache.blocks))
        return network.tail(x, state, memory.change(branch), cache.blocks)


class BlockMemory:
    """The changes that the first blocks made along a trajectory, by branch.

    There are none where guidance begins or ends.
    """

    def __init__(self) -> None:
        self.since, self._guided = -1, False
        self._known: dict[int, list[tuple[int, Tensor]]] = {}

    def go_on(self, *, guided: bool) -> None:
        """Go to the next step."""
        if guided != self._guided:
            self.since, self._known = -1, {}
        self.since, self._guided = self.since + 1, guided

    def keep(self, branch: int, change: Tensor) -> None:
        """Remember a change (N, h, w, D) at this step."""
        self._known[branch] = [*self._known.get(branch, [])[-1:], (self.since, change)]

    def change(self, branch: int) -> Tensor:
        """Return the change at this step."""
        return extrapolated(self._known[branch], self.since)


@dataclass(frozen=True, slots=True)
class StitchedDenoiser(Denoiser):
    """A denoiser whose network depends on the noise level: `others` have those that `stretches` name."""

    stretches: tuple[Stretch, ...] = ()
    others: Mapping[str, Denoiser] = field(default_factory=dict)

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """Return the raw output (N, C_out, H, W) at x (N, C, H, W) of the network for this level."""
        name = stretch_at(self.stretches, self.schedule.share(level)).backbone
        return self.others[name](x, level) if name else Denoiser.__call__(self, x, level)


def noise_generator(seed: int) -> np.random.Generator:
    """Return the generator of one sample's noise, the same as in the service.

    It draws the initial noise, and then the noise of each step of a stochastic solver.

    Raises:
        ValueError: a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a seed must be 0 or more, not {seed}")
    return np.random.Generator(np.random.Philox(seed))


def initial_noise(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the noise, (C, H, W) or (C, F, H, W), that a seed means, here and in the service."""
    return draw_noise(noise_generator(seed), shape)


def draw_noise(generator: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return the next standard normal numbers of `generator`, float32."""
    return generator.standard_normal(shape, dtype=np.float32).reshape(shape)


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    table: StepTable,
    seeds: Sequence[int],
    size: Size | None = None,
    *,
    clip_x0: bool = True,
    source: SourceLatent[Tensor] | None = None,
    strength: float = 1.0,
) -> Iterator[Tensor]:
    """Denoise one sample per seed along `table`, and yield the x0 estimate (N, C, H, W) of each step.

    The last estimate is the sample. `size`, (H, W) or (F, H, W), is the trained one unless given. With a DDPM
    table, a model of learned variance uses that variance. From a `source` the steps of the table are those
    that are walked at this `strength`.

    Raises:
        ValueError: a size the model cannot take, or not one seed for each row of the conditions.
    """
    config = denoiser.model.config
    rows = len(denoiser.conditions.embeddings[0])
    if len(seeds) != rows:
        raise ValueError(f"give one seed for each of the {rows} rows of the conditions, not {len(seeds)}")
    shape = (config.in_channels, *(size or config.image_size))
    generators = [noise_generator(seed) for seed in seeds]
    device = next(denoiser.model.parameters()).device

    def draw() -> Tensor:
        return torch.from_numpy(np.stack([draw_noise(rng, shape) for rng in generators])).to(device)

    if table.solver == LEARNED and config.learn_sigma:
        network, step_noise = _with_learned_variance(denoiser, table, draw)
    else:
        network, step_noise = _without_variance(denoiser), draw
    x, keep = draw(), None
    if source is not None:
        noisy = NoisySource(source, x, denoiser.schedule)
        x, keep = noisy.start(float(table.level[0]), strength), noisy.keep
    for _, x0 in trajectory(table, x, network, noise=step_noise, clip_x0=clip_x0, keep=keep):
        yield x0 if keep is None else keep(x0, None)


Output = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def _without_variance(denoiser: Denoiser) -> Output:
    return lambda x, level: denoiser(x, level)[:, : x.shape[1]]


def _with_learned_variance(denoiser: Denoiser, table: StepTable, draw: Noise) -> tuple[Output, Noise]:
    """Return the network's mean output, and noise with the deviation learned for the current step.

    The solver multiplies noise by the table's deviation, so the noise is divided by it here.
    """
    levels = table.level.tolist()
    low, high = variance_bounds(levels, denoiser.schedule)
    scale: list[Tensor] = []

    def network(x: Tensor, level: float) -> Tensor:
        mean, v = denoiser(x, level).chunk(2, dim=1)
        step = levels.index(level)
        log_variance = learned_log_variance(v, float(low[step]), float(high[step]))
        scale[:] = [torch.exp(0.5 * log_variance) / float(table.s[step] or 1.0)]
        return mean

    return network, lambda: draw() * scale[0]
