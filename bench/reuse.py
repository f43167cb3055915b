"""Measure whether reuse between steps belongs on a ladder: of guidance, and of the features of a network.

    python -m bench.reuse BUNDLE [--data data/emoji64.npz] [--samples 12] [--threads 1]

Guidance: the difference of the conditional and the unconditional output is kept, and computed anew at every
second or third step. Features: at every second or third step the middle blocks are computed, and otherwise
the change that they made is added, extrapolated linearly from the last two (Δ-DiT, arXiv:2406.01125;
TaylorSeer, arXiv:2503.06923). Both are drawn offline, along the same trajectories and from the same noise as
the plain solvers. StepReuse belongs on the ladder where the ladder's own rule would keep it.

The cost is in rows of the network. A row whose middle is not computed counts by its time here, as a share of
that of a whole row. That still favours features: a server would run three graphs in place of one, and keep
the changes of every sample.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import cast

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from ditserve.bench import report
from ditserve.model.evaluation.fidelity import energy_scores
from ditserve.model.evaluation.front import Distance, front
from ditserve.model.evaluation.ladder import AT_ONCE, LadderInputs, denoiser_of, draw_inputs, guidance_of
from ditserve.model.evaluation.ladder_plan import DRAWS
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.dit import DiT
from ditserve.model.nets.factory import make_network
from ditserve.model.sampling.denoise import Denoiser, denoise
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import named_path, positive, thread_count
from ditserve.model.spec.dit_config import SIZES, published_config
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.guidance import guidance_weight, guided
from ditserve.model.spec.manifest import RungSpec
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import LoadedModel, load_bundle

# Plain solvers, at so many counts of steps that one is near every cost, and what reuses on which of them.
SOLVERS = ("unipc-1", "dpmpp-2m")
PLAIN_STEPS = (24, 22, 20, 18, 16, 14, 12, 10, 9, 8, 7, 6, 5, 4)
SOLVER, STEPS = "unipc-1", (24, 20, 16, 12, 10, 8)
LONG_RUN = ("ddim", 100)
FEWEST_BLOCKS = 4
TURNS = 10
OUTER = 4  # blocks at each end of a DiT-XL/2 that always run
COLUMNS = ("", "operating point", "rows", "to its long run", "to real pictures")


@dataclass(frozen=True, slots=True)
class StepReuse:
    """The reuse along a trajectory: of guidance, or of what the blocks `middle` change, for `every` steps."""

    every: int = 1
    middle: tuple[int, int] | None = None
    skipped_cost: float = 1.0  # rows that a row costs whose middle is not computed

    @property
    def name(self) -> str:
        if self.every == 1:
            return ""
        kept = f"blocks {self.middle[0]}-{self.middle[1] - 1}" if self.middle else "guidance"
        return f" {kept} every {self.every}"


@dataclass(slots=True)
class BlockChange:
    """The change that middle blocks made of one branch, and its extrapolation. `step` is the current one."""

    before: Tensor | None = None
    known: list[tuple[int, Tensor]] = field(default_factory=list)

    def keep(self, step: int, change: Tensor) -> None:
        self.known = [*self.known[-1:], (step, change)]

    def at(self, step: int) -> Tensor:
        """Return the change at a step, on the line through the last two that were computed."""
        last, change = self.known[-1]
        if len(self.known) == 1:
            return change
        earlier, other = self.known[0]
        return change + (change - other) * ((step - last) / (last - earlier))


class MiddleBlock(nn.Module):
    """A block among the middle ones: it runs at due steps, and at others the first adds the change."""

    def __init__(self, block: nn.Module, owner: KeptFeatures, *, first: bool, last: bool) -> None:
        super().__init__()
        self.block, self.first, self.last = block, first, last
        # A plain reference: the owner's network holds this block.
        self.owner = owner

    def forward(self, h: Tensor, *arguments: object) -> Tensor:
        owner = self.owner
        change = owner.changes[owner.branch]
        if not owner.is_due:
            return h + change.at(owner.step) if self.first else h
        if self.first:
            change.before = h
        h = self.block(h, *arguments)
        if self.last:
            change.keep(owner.step, h - cast(Tensor, change.before))
        return h


class KeptFeatures:
    """A network whose middle blocks run at due steps only, with a change for each branch of guidance.

    `step`, `branch` and `is_due` are those of the call that comes next.
    """

    def __init__(self, network: DiT, middle: tuple[int, int]) -> None:
        self.step, self.branch, self.is_due = 0, 0, True
        self.changes = (BlockChange(), BlockChange())
        first, end = middle
        blocks = [
            MiddleBlock(block, self, first=k == first, last=k == end - 1) if first <= k < end else block
            for k, block in enumerate(network.blocks)
        ]
        self.network = copy.copy(network)
        self.network._modules = {**network._modules, "blocks": nn.ModuleList(blocks)}


@dataclass(frozen=True, slots=True)
class ReusingDenoiser(Denoiser):
    """A guided network that reuses guidance or features; `rows` counts what it computed."""

    reuse: StepReuse = StepReuse()
    steps: Iterator[int] = field(default_factory=itertools.count)
    difference: list[Tensor] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    features: KeptFeatures | None = None

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """Return the raw output (N, C_out, H, W) at x (N, C, H, W)."""
        step = next(self.steps)
        is_due = step % self.reuse.every == 0
        if self.features is not None:
            self.features.step, self.features.is_due = step, is_due
        output = self._branch(0, x, level, self.conditions.embeddings[0])
        guidance = self.guidance
        weight = guidance_weight(guidance.scale, level, self.schedule, guidance.interval, guidance.decay)
        if weight == 1.0:
            return output
        if self.features is not None or is_due or not self.difference:
            null = self.model.embed(null_labels(self.model.config, len(x), x.device))
            self.difference[:] = [output - self._branch(1, x, level, null)]
        channels = guidance.channels or x.shape[1]
        return guided(output, output - self.difference[0], weight, channels, guidance.norm)

    def _branch(self, branch: int, x: Tensor, level: float, embedding: Tensor) -> Tensor:
        told = torch.full((len(x),), float(self.schedule.told(level)), device=x.device)
        state, network, cost = self.model.modulate(told, embedding), self.model, 1.0
        if self.features is not None:
            self.features.branch, network = branch, self.features.network
            cost = 1.0 if self.features.is_due else self.reuse.skipped_cost
        self.rows.append(cost)
        return network.backbone(x, state)


@torch.no_grad()
def draw(
    model: LoadedModel, inputs: LadderInputs, solver: str, steps: int, reuse: StepReuse
) -> tuple[Tensor, float]:
    """Return the pictures (N, C, H, W) along a trajectory that reuses, and the rows of one."""
    schedule, diffusion = model.schedule, model.manifest.diffusion
    table = step_table(solver, noise_levels(even_grid(schedule), steps, schedule), schedule)
    guidance = guidance_of(model.manifest, model.manifest.defaults.guidance_interval)
    chunks, rows = [], 0.0
    for index in torch.arange(len(inputs)).split(AT_ONCE):
        plain = denoiser_of(model, model.network, inputs, index, guidance)
        features = KeptFeatures(model.dit, reuse.middle) if reuse.middle else None
        denoiser = ReusingDenoiser(
            plain.model, plain.schedule, plain.conditions, plain.guidance, reuse, features=features
        )
        *_, x0 = denoise(denoiser, table, index.tolist(), clip_x0=diffusion.clip_x0)
        chunks.append(x0 if model.manifest.decoder != "identity" else x0.clamp(-1, 1))
        rows = sum(denoiser.rows)
    return torch.cat(chunks), rows


def reuses(model: LoadedModel) -> tuple[StepReuse, ...]:
    """Return the kinds of reuse to try. Of seven blocks the middle are all but the last."""
    depth = model.dit.config.depth
    middle = (0, depth - max(1, depth // 6))
    cost = skipped_cost(model, middle)
    return StepReuse(2), StepReuse(3), StepReuse(2, middle, cost), StepReuse(3, middle, cost)


@torch.no_grad()
def skipped_cost(model: LoadedModel, middle: tuple[int, int]) -> float:
    """Return the time of a row whose middle is not computed, as a share of that of a whole row.

    It is processor time of the fastest of `TURNS` passes.
    """
    network, config = model.dit, model.dit.config
    features = KeptFeatures(network, middle)
    x = torch.zeros(AT_ONCE, config.in_channels, *config.image_size)
    state = network.modulate(torch.zeros(AT_ONCE), network.embed(null_labels(config, AT_ONCE, x.device)))
    fastest = {True: inf, False: inf}
    for turn in range(2 * TURNS):
        is_due = turn % 2 == 0
        features.step, features.is_due = turn, is_due
        began = time.process_time()
        features.network.backbone(x, state)
        fastest[is_due] = min(fastest[is_due], time.process_time() - began)
    return fastest[False] / fastest[True]


def measure(
    model: LoadedModel, inputs: LadderInputs, kinds: Sequence[StepReuse], progress: Progress
) -> list[RungSpec]:
    """Measure all solvers and step counts with each kind of reuse."""
    target, _ = draw(model, inputs, *LONG_RUN, StepReuse())
    order: Distance = "own" if inputs.real is None else "real"
    points = [(solver, steps, StepReuse()) for steps in PLAIN_STEPS for solver in SOLVERS]
    points += [(SOLVER, steps, reuse) for steps in STEPS for reuse in kinds]
    measured = []
    for solver, steps, reuse in progress.track(points, description="operating points"):
        pictures, rows = draw(model, inputs, solver, steps, reuse)
        own = float((pictures - target).square().mean().sqrt())
        real = None if inputs.real is None else float(energy_scores(pictures, inputs.real).mean())
        measured.append(
            RungSpec(
                name=f"{solver}-{steps}{reuse.name}",
                solver=solver,
                steps=steps,
                grid=even_grid(model.schedule),
                rows=round(rows, 3),
                quality=own if order == "own" or real is None else real,
                own=own,
                real=real,
            )
        )
    return measured


def shown(measured: Sequence[RungSpec], name: str) -> Table:
    kept = front(measured)
    rows = []
    for rung in sorted(measured, key=lambda spec: (-spec.rows, spec.quality)):
        distances = [f"{value:.4f}" if value is not None else "" for value in (rung.own, rung.real)]
        rows.append(("●" if rung in kept else "", rung.name, f"{rung.rows:g}", *distances))
    title = f"{name}: what the ladder's rule would keep is marked"
    return report.table(title, COLUMNS, rows, text={"", "operating point"})


@torch.no_grad()
def large_row(threads: int) -> dict[str, float]:
    """Return what a row of DiT-XL/2 takes where only the `OUTER` blocks at each end run: a share, and bytes.

    A block's time is the difference of networks of two and four blocks, at 256 tokens.
    """
    torch.set_num_threads(threads)
    seconds = {depth: min(_pass_seconds(depth) for _ in range(3)) for depth in (2, 4)}
    block = (seconds[4] - seconds[2]) / 2
    ends = seconds[2] - 2 * block
    depth, width, _ = SIZES["XL"]
    tokens = 256
    return {
        "share_of_a_row": (ends + 2 * OUTER * block) / (ends + depth * block),
        # Two changes of two branches, in fp32.
        "bytes_of_a_sample": 4.0 * 4 * tokens * width,
    }


def _pass_seconds(depth: int) -> float:
    network = make_network(published_config("DiT-XL/2", depth=depth))
    x, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1, 1, dtype=torch.int64)
    state = network.modulate(torch.zeros(1), network.embed(labels))
    network.backbone(x, state)
    began = time.process_time()
    network.backbone(x, state)
    return time.process_time() - began


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("reuse", __doc__)
    parser.add_argument("bundle", type=named_path, nargs="?", default=report.DEFAULT_BUNDLE)
    parser.add_argument("--data", type=named_path, help="the pictures the model was trained on")
    parser.add_argument("--samples", type=positive, default=12, help="conditions, each drawn twice")
    parser.add_argument("--threads", type=thread_count, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console = parse(arguments), Console(width=120)

    def work() -> None:
        background = report.BackgroundLoad()
        torch.set_num_threads(options.threads)
        model = load_bundle(Bundle.open(options.bundle))
        if model.dit.config.depth < FEWEST_BLOCKS or model.manifest.defaults.guidance_scale == 1.0:
            raise ModelError(
                f"{options.bundle}: reuse is measured on a guided network of {FEWEST_BLOCKS} blocks or more"
            )
        dataset = None if options.data is None else open_data(model, options.data)
        kinds, name = reuses(model), model.manifest.name
        with Progress(console=Console(stderr=True), transient=True) as progress:
            measured = measure(model, draw_inputs(model, options.samples, dataset), kinds, progress)
        console.print(shown(measured, name))
        costs = {kind.name.strip(): kind.skipped_cost for kind in kinds if kind.middle}
        large, kept = large_row(options.threads), [rung.name for rung in front(measured)]
        reused = [rung for rung in kept if any(rung.endswith(kind.name) for kind in kinds)]
        console.print(f"a row that skips, in rows: {', '.join(f'{k} {v:.2f}' for k, v in costs.items())}")
        console.print(
            f"DiT-XL/2 without all but {OUTER} blocks at each end: {large['share_of_a_row']:.2f} of a row; "
            f"a sample keeps {large['bytes_of_a_sample'] / 1e6:.1f} MB"
        )
        console.print(f"kept with reuse: {', '.join(reused) or 'none'}")
        figures = {
            "pictures": DRAWS * options.samples,
            "kept": kept,
            "skipped_costs": costs,
            "measured": [rung.model_dump(mode="json", exclude={"stretches"}) for rung in measured],
            "dit_xl_2": large,
        }
        report.save(f"reuse-{model.manifest.name}", options, background, figures)

    return report.run_command("reuse", work)


if __name__ == "__main__":
    sys.exit(main())
