"""A training run from start to end: resume or start, step, log, save, draw sample sheets, and roll back.

Every random number is a function of (seed, step): the order of pictures, timesteps, noise and dropped
conditions. So a run that stops, even by SIGKILL, continues from its last checkpoint as if it had not stopped.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing, nullcontext
from types import FrameType, TracebackType
from typing import Any, Self

from ditserve.model.data.sources import NAMED
from ditserve.model.distributed.processes import World
from ditserve.model.nets.signals import COLLAPSED, NetworkSignals
from ditserve.model.sampling.sheet import draw_sheet, sheet_samples
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.output_folder import RUN, claim
from ditserve.model.train.checkpoint import check_room
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.curve import draw_curve
from ditserve.model.train.load import SHEET_STEPS, run_defaults
from ditserve.model.train.recompute import RECOMPUTED
from ditserve.model.train.trainer import Trainer
from ditserve.model.train.training_log import TrainingLog

# The signals after which a run saves its state and ends.
STOPPING = (signal.SIGINT, signal.SIGTERM)
AGAINST_COLLAPSE = "lower lr, or train a network with model.qk_norm=true"


def train(config: TrainConfig, world: World | None = None) -> None:
    """Train to `config.steps`, resuming from `config.output` if it holds a checkpoint.

    Raises:
        ValueError, DataError, LoadError, BundleError, AutoencoderError: a run that cannot work.
        OutputError, CheckpointError, OSError: a folder that must not or cannot be written.
        Diverged: the loss is not finite again and again.
    """
    first = world is None or world.is_first
    with claim(config.output, RUN, apart=(config.data.path,)) if first else nullcontext():
        _train(config, world)


def _train(config: TrainConfig, world: World | None) -> None:
    with closing(Trainer(config, world)) as trainer:
        start(trainer)
        if trainer.state.step < config.steps:
            run_steps(trainer)
            if trainer.parallel.world.is_first:
                draw_curve(config.output)


def start(trainer: Trainer) -> None:
    """Resume, or start from `init` or from scratch. Print the run, and check that it can be written."""
    config, state = trainer.config, trainer.state
    resumed = trainer.resume()
    if resumed is not None:
        print(f"resumed from {resumed}")
    elif trainer.warm_start is not None:
        print(f"{config.start}: {trainer.warm_start}")
    if state.step >= config.steps:
        print(f"{config.output} is at step {state.step} already: raise steps to train on")
    print(
        f"{state.parallel.parameter_count / 1e6:.2f} M parameters, {len(trainer.source.training)} pictures, "
        f"classes {trainer.network_config.classes}"
    )
    print(config.model_dump_json())
    if skipped := trainer.dataset.skipped:
        print(f"{len(skipped)} pictures cannot be read and are left out: {'; '.join(skipped[:NAMED])}")
    for line in trainer.dataset.left_out:
        print(f"{config.data.path}: {line}")
    if config.checkpoint_blocks is None and trainer.recomputes:
        print(RECOMPUTED.format(depth=trainer.network_config.depth))
    if trainer.decoder is None:
        print("no sample sheets: vae does not name the folder of the autoencoder that made these latents")
    check_room(config.output, state, keep=config.keep)
    if state.parallel.world.is_first:
        write_atomic(config.output / "config.json", (config.model_dump_json(indent=1) + "\n").encode())
    if resumed is None:
        trainer.save()
    if config.compile:
        state.model.compile()


def run_steps(trainer: Trainer) -> None:
    """Run the remaining steps: log, save, draw sample sheets, and roll back after too many failures."""
    config, state = trainer.config, trainer.state
    with TrainingLog(config, state) as log, StopSignals() as stop:
        while state.step < config.steps:
            metrics = trainer.step()
            log.record(state, metrics)
            last = state.step == config.steps
            due = last or state.step % config.checkpoint_every == 0
            if state.failures >= config.skip_limit or (due and not state.is_finite()):
                log.print(trainer.roll_back())
                log.rewind(state.step)
                continue
            stopping = stop.agreed(trainer.parallel.world)
            if (due or (stopping and state.is_finite())) and (last or not state.failures):
                trainer.save()
            if stopping and not last:
                raise KeyboardInterrupt
            if last or state.step % config.sheet_every == 0:
                signals = draw_sample_sheet(trainer)
                log.add(state.step, signals)
                if signals.get("attention_entropy_least", 1.0) < COLLAPSED:
                    log.print(f"attention of a layer has collapsed at step {state.step}: {AGAINST_COLLAPSE}")


class StopSignals:
    """The request to stop after this step, by Ctrl-C (SIGINT) or SIGTERM. A second one ends at once.

    Signals can be caught in the main thread alone; in another one nothing changes.
    """

    def __init__(self) -> None:
        self.received = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self, world: World) -> bool:
        """Return True if any process was asked to stop. All processes must call."""
        return not world.all_agree(not self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # `print` may have been interrupted itself.
        os.write(2, b"\nstopping after this step; a second signal ends the run at once\n")
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def draw_sample_sheet(trainer: Trainer) -> dict[str, float]:
    """Sample from the averaged weights at this step, and write sheet-<step>.png. All processes must call.

    Without a decoder of the latents nothing is written. Return the signals of the network in these samples.
    """
    config, step = trainer.config, trainer.state.step
    network, defaults = trainer.averaged_network(), run_defaults(config, trainer.dataset, step)
    signals = NetworkSignals(network)
    if trainer.parallel.world.is_first:
        with signals.measured():
            samples = sheet_samples(
                network,
                trainer.schedule,
                steps=min(SHEET_STEPS, defaults.steps),
                guidance_scale=defaults.guidance_scale,
                seed=config.seed,
                clip_x0=config.diffusion_of(trainer.dataset).clip_x0,
            )
        if trainer.decoder is not None:
            sheet = draw_sheet(samples, trainer.decoder, trainer.dataset.factors, trainer.dataset.fps)
            sheet.save(config.output / f"sheet-{step:07d}.png")
    return signals.figures()
