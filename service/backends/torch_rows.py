"""Rows that live on a device of torch: latents, history, noise and condition states in slabs, stepped there.

One step is one function of fixed tensors: it gathers the latents and states of its rows by their places, runs
the network, guides, takes the solver's step and writes latents and history back. It reads the numbers of its
step by a counter that it moves on itself, so on CUDA it is captured once a batch size and then launched for
every step of a turn, without a word from the host in between. The arithmetic is that of
`service.engine.latent_pool`, operation by operation. None of it has run on a GPU yet; on the CPU its pictures
are those of the host's own path, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ditserve.model.spec.guidance import guided
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.solvers import learned_log_variance
from ditserve.service.backends.adapters import RowUses
from ditserve.service.backends.resident import (
    MOST_STEPS,
    NEWEST,
    NOISE,
    NUMBERS,
    ROW_OF,
    SLAB,
    SLOT,
    SUBTRACTED,
    DeviceTurn,
    Landed,
    Slab,
)
from ditserve.service.backends.state import Floats
from ditserve.service.backends.torch_stream import TorchStream, Work, computing

Network = Callable[[Tensor, Sequence[Tensor]], Tensor]
Adapted = Callable[[Sequence[RowUses]], AbstractContextManager[None]]
# The bytes of noise for which there is room beyond one block a row.
NOISE_BYTES = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class _Buffers:
    """The fixed tensors of one batch size, on the device, and what launches a step over them.

    `counter` (1,) is the step of the turn that comes next.
    """

    places: Tensor
    numbers: Tensor
    counter: Tensor
    finite: Tensor
    launch: Work


@dataclass(slots=True, eq=False)
class _Staging:
    """The host's ends of the copies of a turn. The next one has others, because this one may be under way."""

    places: Tensor
    numbers: Tensor
    finite: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _TorchTicket:
    stream: TorchStream
    began: Any
    ended: Any
    finite: Tensor
    latents: list[Tensor]
    estimates: list[Tensor]

    def wait(self) -> Landed:
        self.stream.wait(self.ended)
        finite: npt.NDArray[np.bool_] = self.finite.numpy().copy()
        return Landed(
            finite,
            [latent.numpy() for latent in self.latents],
            [estimate.numpy() for estimate in self.estimates],
            self.stream.seconds(self.began, self.ended),
        )


class TorchRows:
    """The `ResidentRows` of a network of torch.

    Args:
        network: computes the output (R, C_out, H, W) of latents and states.
        slabs: of the condition state, in the order of the network's state.
        slots: the samples there may be.
        rows: the most rows of a batch.
        adapted: the context in which a pass uses the adapters of its rows.
    """

    def __init__(
        self,
        network: Network,
        manifest: Manifest,
        slabs: Sequence[Slab],
        stream: TorchStream,
        *,
        slots: int,
        rows: int,
        adapted: Adapted = lambda _: nullcontext(),
    ) -> None:
        self._network, self._slabs, self._stream, self._adapted = network, slabs, stream, adapted
        self._channels = manifest.config.in_channels
        self._spec = manifest.diffusion
        shape = (self._channels, *manifest.config.image_size)
        self._slots = slots
        self.noise_blocks = max(rows, min(MOST_STEPS * rows, NOISE_BYTES // (4 * int(np.prod(shape)))))
        with computing():
            # The slot beyond the last takes what rows that are no sample's write.
            self._latents = stream.zeros((slots + 1, *shape))
            self._history = stream.zeros((2 * (slots + 1), *shape))
            self._noise = stream.zeros((1 + self.noise_blocks, *shape))
            self._pictures = stream.zeros((slots + 1, *shape))
            self._picture_noise = stream.zeros((slots + 1, *shape))
            self._mask = stream.zeros((slots + 1, 1, *shape[1:]))
            self._mask += 1.0
            lines = SLAB + 1 + max((slab.line for slab in slabs), default=-1)
            self._staging = [
                _Staging(
                    stream.staging((MOST_STEPS, lines, rows), torch.int64),
                    stream.staging((MOST_STEPS, NUMBERS, rows), torch.float32),
                    stream.staging((MOST_STEPS, rows), torch.bool),
                )
                for _ in range(2)
            ]
        self._shape, self._lines = shape, lines
        self._buffers: dict[int, _Buffers] = {}

    def put(self, slot: int, latent: Floats) -> None:
        self._put(self._latents[slot], latent)

    def put_history(self, slot: int, history: Sequence[Floats]) -> None:
        with computing():
            self._history[2 * slot : 2 * slot + 2].zero_()
        for place, estimate in enumerate(history, start=2 * slot):
            self._put(self._history[place], estimate)

    def put_source(self, slot: int, latent: Floats, noise: Floats, mask: Floats) -> None:
        self._put(self._pictures[slot], latent)
        self._put(self._picture_noise[slot], noise)
        self._put(self._mask[slot], mask)

    def latent(self, slot: int) -> Floats:
        return self._read(self._latents[slot])

    def history(self, slot: int) -> Floats:
        return self._read(self._history[2 * slot : 2 * slot + 2])

    def noise(self, blocks: int) -> Floats:
        staging = self._staging[0]
        if staging.noise is None:
            staging.noise = self._stream.staging((self.noise_blocks, *self._shape), torch.float32)
        array: Floats = staging.noise[:blocks].numpy()
        return array

    def run(self, turn: DeviceTurn) -> _TorchTicket:
        stream, staging, k, rows = self._stream, self._staging[0], turn.steps, turn.rows
        with computing():
            buffers = self._buffers[rows]
            places = _filled(staging.places, turn.places)
            numbers = _filled(staging.numbers, turn.numbers)
            began = stream.mark()
            buffers.counter.zero_()
            stream.upload(buffers.places[:k], places)
            stream.upload(buffers.numbers[:k], numbers)
            if len(turn.noise):
                assert staging.noise is not None
                stream.upload(self._noise[1 : 1 + len(turn.noise)], staging.noise[: len(turn.noise)])
            if turn.adapters:
                with self._adapted(turn.adapters):
                    for _ in range(k):
                        stream.launch(lambda: self._step(buffers))
            else:
                for _ in range(k):
                    stream.launch(buffers.launch)
            finite = staging.finite.view(-1)[: k * rows].view(k, rows)
            stream.download(finite, buffers.finite[:k])
            latents = [self._fetched(self._latents[slot]) for slot in turn.latents]
            estimates = [self._fetched(self._history[place]) for place in turn.estimates]
            ended = stream.mark()
        self._staging.reverse()
        return _TorchTicket(stream, began, ended, finite, latents, estimates)

    def open(self, rows: int) -> None:
        if rows not in self._buffers:
            with computing():
                self._buffers[rows] = self._opened(rows)

    def _opened(self, rows: int) -> _Buffers:
        """Make the tensors of a batch size and capture its step, over rows that are no sample's."""
        stream = self._stream
        places = stream.zeros((MOST_STEPS, self._lines, rows), torch.int64)
        places[:, SLOT] = self._slots
        places[:, NEWEST] = 2 * self._slots
        numbers = stream.zeros((MOST_STEPS, NUMBERS, rows))
        counter = stream.zeros((1,), torch.int64)
        finite = stream.zeros((MOST_STEPS, rows), torch.bool)
        buffers = _Buffers(places, numbers, counter, finite, lambda: None)

        def work() -> None:
            self._step(buffers)

        return replace(buffers, launch=stream.capture(work))

    def _step(self, buffers: _Buffers) -> None:
        """Take the step of the counter, over all rows of a batch size."""
        places = buffers.places.index_select(0, buffers.counter)[0]  # (lines, R)
        x = self._latents.index_select(0, places[SLOT])  # (R, C, H, W)
        state = [slab.array.index_select(0, places[SLAB + slab.line]) for slab in self._slabs]
        output = self._network(x.index_select(0, places[ROW_OF]), state)  # (R, C_out, H, W)
        columns = self._column(buffers.numbers.index_select(0, buffers.counter)[0])
        self._advance(buffers, places, columns, x, output)
        buffers.counter.add_(1)

    def _advance(self, buffers: _Buffers, places: Tensor, columns: Tensor, x: Tensor, output: Tensor) -> None:
        """Guide, and take the solver's step: `LatentPool.advance`, for rows that lie here."""
        x0_x, x0_out, a, b, c, d, s, weight, log_low, log_high, alpha, sigma = columns
        newest, spec, channels = places[NEWEST], self._spec, self._channels
        mean, variance = output[:, :channels], output[:, channels:]
        subtracted = mean.index_select(0, places[SUBTRACTED])
        mixed = guided(mean, subtracted, weight, spec.guidance_channels or channels, spec.guidance_norm)
        mean = torch.where(weight != 1.0, mixed, mean)
        if variance.shape[1]:
            log_variance = learned_log_variance(variance, log_low, log_high)
            s = torch.where(torch.isfinite(log_high), torch.exp(0.5 * log_variance), s)
        estimate = x * x0_x + mean * x0_out
        finite = torch.isfinite(estimate).flatten(1).all(1)
        if spec.clip_x0:
            estimate = estimate.clamp(-1.0, 1.0)
        x = x * a + estimate * b
        x = x + self._history.index_select(0, newest) * c
        x = x + self._history.index_select(0, newest ^ 1) * d
        noise = self._noise.index_select(0, places[NOISE])
        x = torch.where(self._column(places[NOISE]) > 0, x + s * noise, x)
        slots = places[SLOT]
        mask = self._mask.index_select(0, slots)
        known = alpha * self._pictures.index_select(0, slots)
        known = known + sigma * self._picture_noise.index_select(0, slots)
        x = (1.0 - mask) * known + mask * x
        self._latents.index_copy_(0, slots, x)
        self._history.index_copy_(0, newest ^ 1, estimate)
        buffers.finite.index_copy_(0, buffers.counter, finite[None])

    def _column(self, numbers: Tensor) -> Tensor:
        """Return numbers (…, R) in a shape that stands beside the latents (R, C, …) of the rows."""
        return numbers.view(*numbers.shape, *(1,) * len(self._shape))

    def _put(self, target: Tensor, array: Floats) -> None:
        with computing():
            self._stream.upload(target, torch.from_numpy(np.ascontiguousarray(array)))

    def _read(self, tensor: Tensor) -> Floats:
        """Return an array of the device, once all before it is done."""
        with computing():
            array = self._fetched(tensor)
            self._stream.wait(self._stream.mark())
        return array.numpy()

    def _fetched(self, tensor: Tensor) -> Tensor:
        """Begin to copy an array of the device to the host."""
        host = self._stream.staging(tensor.shape, tensor.dtype)
        self._stream.download(host, tensor)
        return host


def _filled(staging: Tensor, values: npt.NDArray[Any]) -> Tensor:
    """Return the first part of a staging array, filled with values of any smaller shape."""
    part = staging.view(-1)[: values.size].view(values.shape)
    part.numpy()[...] = values
    return part
