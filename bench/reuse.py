"""Measure whether reuse between steps belongs on a ladder: of guidance, and of what the first blocks change.

    python -m bench.reuse BUNDLE [--data data/emoji64.npz] [--samples 12] [--threads 1]

Guidance: the difference of the conditional and the unconditional output is kept, and computed anew at every
second or third step. Blocks: the first run at every second or third step, with a block cache
(`export.block_cache`), which the bundle need not have. Both are drawn offline, along the same trajectories
and from the same noise as the plain solvers. Reuse belongs on the ladder where the ladder's own rule would
keep it.

The cost is in rows of the network. A row whose first blocks do not run counts by its time here, as a share of
that of a whole row.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ditserve.bench import report
from ditserve.export.block_cache import PartCosts, default_blocks, with_block_caches
from ditserve.model.evaluation.fidelity import energy_scores
from ditserve.model.evaluation.front import Distance, OperatingPoint, front
from ditserve.model.evaluation.ladder import (
    AT_ONCE,
    LadderInputs,
    denoiser_of,
    draw_inputs,
    draw_pictures,
    guidance_of,
)
from ditserve.model.evaluation.ladder_plan import DRAWS
from ditserve.model.evaluation.picture_sets import open_data
from ditserve.model.nets.conditioner import null_labels
from ditserve.model.nets.factory import make_network
from ditserve.model.sampling.denoise import Denoiser, denoise
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import named_path, positive, thread_count
from ditserve.model.spec.dit_config import SIZES, published_config
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.guidance import guidance_weight, guided
from ditserve.model.spec.manifest import RungSpec, StretchSpec
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.loaded_model import LoadedModel, load_bundle

# Plain solvers, at so many counts of steps that one is near every cost. The one that is more often on the
# front of these reuses.
SOLVERS = ("unipc-1", "dpmpp-2m")
PLAIN_STEPS = (24, 22, 20, 18, 16, 14, 12, 10, 9, 8, 7, 6, 5, 4)
REUSED_STEPS = (24, 20, 16, 12, 10, 8)
EVERY = (2, 3)
LONG_RUN = ("ddim", 100)
FEWEST_BLOCKS = 4
TURNS = 10
OUTER = 8  # blocks of a DiT-XL/2 that always run
COLUMNS = ("", "operating point", "rows", "to its long run", "to real pictures")


@dataclass(frozen=True, slots=True)
class GuidanceReuse(Denoiser):
    """A guided network that computes what guidance adds at every `every`-th step; `rows` counts its rows."""

    every: int = 1
    steps: Iterator[int] = field(default_factory=itertools.count)
    difference: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor, level: float) -> Tensor:
        """Return the raw output (N, C_out, H, W) at x (N, C, H, W)."""
        is_due, guidance = next(self.steps) % self.every == 0, self.guidance
        told = torch.full((len(x),), float(self.schedule.told(level)), device=x.device)
        output = self._conditional(x, told)
        self.rows.append(1)
        weight = guidance_weight(guidance.scale, level, self.schedule, guidance.interval, guidance.decay)
        if weight == 1.0:
            return output
        if is_due or not self.difference:
            null = self.model.embed(null_labels(self.model.config, len(x), x.device))
            self.difference[:] = [output - self._run(-1, x, self.model.modulate(told, null))]
            self.rows.append(1)
        channels = guidance.channels or x.shape[1]
        return guided(output, output - self.difference[0], weight, channels, guidance.norm)


@torch.no_grad()
def draw_reusing_guidance(
    model: LoadedModel, inputs: LadderInputs, point: OperatingPoint, every: int
) -> tuple[Tensor, float]:
    """Return the pictures (N, C, H, W) of a point where guidance is reused, and the rows of one."""
    levels = noise_levels(point.grid, point.steps, model.schedule)
    table = step_table(point.solver, levels, model.schedule)
    guidance = guidance_of(model.manifest, point.guidance_interval)
    chunks, rows = [], 0
    for index in torch.arange(len(inputs)).split(AT_ONCE):
        plain = denoiser_of(model, model.network, inputs, index, guidance)
        denoiser = GuidanceReuse(plain.model, plain.schedule, plain.conditions, plain.guidance, every)
        *_, x0 = denoise(denoiser, table, index.tolist(), clip_x0=model.manifest.diffusion.clip_x0)
        chunks.append(x0 if model.manifest.decoder != "identity" else x0.clamp(-1, 1))
        rows = sum(denoiser.rows)
    return torch.cat(chunks), float(rows)


def caching(model: LoadedModel) -> LoadedModel:
    """Return a model with the block caches to try in place of its further backbones."""
    blocks = default_blocks(model.dit.config)
    manifest = with_block_caches(model.manifest, {}, blocks, EVERY, part_costs(model, blocks))
    return replace(model, manifest=manifest, backbones=dict.fromkeys(manifest.backbones, model.network))


@torch.no_grad()
def part_costs(model: LoadedModel, blocks: int) -> PartCosts:
    """Return the costs of the first blocks and of the rest: processor time of the fastest of `TURNS`."""
    network, config = model.dit, model.dit.config
    x = torch.zeros(AT_ONCE, config.in_channels, *config.image_size)
    state = network.modulate(torch.zeros(AT_ONCE), network.embed(null_labels(config, AT_ONCE, x.device)))
    change = network.trunk(x, state, blocks)
    parts: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: network.backbone(x, state),
        "trunk": lambda: network.trunk(x, state, blocks),
        "tail": lambda: network.tail(x, state, change, blocks),
    }
    fastest = dict.fromkeys(parts, inf)
    for _ in range(TURNS):
        for name, compute in parts.items():
            began = time.process_time()
            compute()
            fastest[name] = min(fastest[name], time.process_time() - began)
    return PartCosts(fastest["trunk"] / fastest["whole"], fastest["tail"] / fastest["whole"])


def measure(model: LoadedModel, inputs: LadderInputs, progress: Progress) -> list[RungSpec]:
    """Measure all solvers and step counts, and one of the solvers with each kind of reuse."""
    grid, interval = even_grid(model.schedule), model.manifest.defaults.guidance_interval
    target = draw_pictures(model, inputs, OperatingPoint(*LONG_RUN, grid, interval))
    order: Distance = "own" if inputs.real is None else "real"
    total = len(PLAIN_STEPS) * len(SOLVERS) + len(REUSED_STEPS) * 2 * len(EVERY)
    task = progress.add_task("operating points", total=total)

    def measured(point: OperatingPoint, every: int = 1) -> RungSpec:
        if every > 1:
            pictures, rows = draw_reusing_guidance(model, inputs, point, every)
        else:
            pictures, rows = draw_pictures(model, inputs, point), point.rows(model.manifest)
        progress.advance(task)
        own = float((pictures - target).square().mean().sqrt())
        real = None if inputs.real is None else float(energy_scores(pictures, inputs.real).mean())
        return RungSpec(
            name=point.name + (f" guidance every {every}" if every > 1 else ""),
            solver=point.solver,
            steps=point.steps,
            grid=point.grid,
            guidance_interval=point.guidance_interval,
            stretches=point.stretches,
            rows=round(rows, 3),
            quality=own if order == "own" or real is None else real,
            own=own,
            real=real,
        )

    points = [OperatingPoint(solver, steps, grid, interval) for steps in PLAIN_STEPS for solver in SOLVERS]
    plain = [measured(point) for point in points]
    best = Counter(rung.solver for rung in front(plain)).most_common(1)[0][0]
    reused = [OperatingPoint(best, steps, grid, interval) for steps in REUSED_STEPS]
    cached = [
        replace(point, stretches=(StretchSpec(above=0.0, backbone=name),))
        for point in reused
        for name in model.manifest.backbones
    ]
    plain += [measured(point) for point in cached]
    return plain + [measured(point, every) for point in reused for every in EVERY]


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
    """Return what a row of DiT-XL/2 takes where only `OUTER` blocks run: a share, and bytes.

    A block's time is the difference of networks of two and four blocks, at 256 tokens.
    """
    torch.set_num_threads(threads)
    seconds = {depth: min(_pass_seconds(depth) for _ in range(3)) for depth in (2, 4)}
    block = (seconds[4] - seconds[2]) / 2
    ends = seconds[2] - 2 * block
    depth, width, _ = SIZES["XL"]
    tokens = 256
    return {
        "share_of_a_row": (ends + OUTER * block) / (ends + depth * block),
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
        model, name = caching(model), model.manifest.name
        with Progress(console=Console(stderr=True), transient=True) as progress:
            measured = measure(model, draw_inputs(model, options.samples, dataset), progress)
        console.print(shown(measured, name))
        costs = {name: spec.row_cost for name, spec in model.manifest.backbones.items()}
        large, kept = large_row(options.threads), [rung.name for rung in front(measured)]
        reused = [rung for rung in kept if "every" in rung]
        console.print(f"a row with a block cache: {', '.join(f'{k} {v:.2f}' for k, v in costs.items())}")
        console.print(
            f"DiT-XL/2 without all but {OUTER} blocks: {large['share_of_a_row']:.2f} of a row; "
            f"a sample keeps {large['bytes_of_a_sample'] / 1e6:.1f} MB"
        )
        console.print(f"kept with reuse: {', '.join(reused) or 'none'}")
        figures = {
            "pictures": DRAWS * options.samples,
            "kept": kept,
            "row_costs": costs,
            "measured": [rung.model_dump(mode="json") for rung in measured],
            "dit_xl_2": large,
        }
        report.save(f"reuse-{model.manifest.name}", options, background, figures)

    return report.run_command("reuse", work)


if __name__ == "__main__":
    sys.exit(main())
