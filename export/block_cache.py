"""`python -m export.block_cache BUNDLE`: let a bundle's network skip its first blocks at some steps.

A network is added for each count of steps: its first blocks run at every second, third … step, and what they
change is extrapolated in between. They share two graphs, and the weights of the bundle. They are further
backbones like others, which `python -m bench.ladder` measures and puts into the ladder where they pay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnxruntime as ort
import torch
from pydantic import ValidationError
from torch import Tensor

from ditserve.commands import command_line
from ditserve.export.backbone import blank_inputs, fastest_seconds
from ditserve.export.calibrate import CalibrationRows
from ditserve.export.errors import ExportError
from ditserve.export.graph import tail_graph, trunk_graph
from ditserve.export.parity import compare_rows
from ditserve.export.storage import save_graph
from ditserve.export.verify import LIMITS, Arrays, check, open_session, run, worst
from ditserve.model.nets.dit import DiT
from ditserve.model.spec.block_cache import BlockCache
from ditserve.model.spec.bundle import BACKBONE, CALIBRATION, TAIL, TRUNK, Bundle, write_manifest
from ditserve.model.spec.command_line import guarded, named_path, positive
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.errors import wrong_field
from ditserve.model.spec.manifest import BackboneSpec, Manifest
from ditserve.model.spec.output_folder import revision
from ditserve.model.train.loaded_model import load_bundle

STEPS = (2, 3)
# What keeps its name in the bundle: the network whose blocks run at every second step is "every-2".
NAME = "every-{}"


@dataclass(frozen=True, slots=True)
class PartCosts:
    """The time of a row in the first blocks, and in the rest, in rows of the whole backbone."""

    trunk: float
    tail: float


def add_block_caches(folder: Path, every: Sequence[int] = STEPS, blocks: int | None = None) -> Manifest:
    """Add a network for each count of steps to the bundle in `folder`; return its new manifest.

    They take the place of those that it had, whose rungs leave the ladder. `blocks` run at so many steps;
    None: all but the last sixth, one at least.

    Raises:
        ExportError: the network has no such blocks, or a graph is beyond the fp32 limit.
        BundleError, OutputError, OSError: the bundle cannot be read, or written.
    """
    bundle = Bundle.open(folder)
    model = load_bundle(bundle)
    manifest, network = bundle.manifest, model.network
    if not isinstance(network, DiT):
        raise ExportError(f"{folder} is a U-Net, and the blocks of a DiT are what can be cached")
    blocks = default_blocks(network.config) if blocks is None else blocks
    others = {name: spec for name, spec in manifest.backbones.items() if spec.block_cache is None}
    # Refused before graphs are made.
    with_block_caches(manifest, others, blocks, every, PartCosts(1.0, 1.0))
    rows = CalibrationRows.load(bundle.file(CALIBRATION)).with_null(network.config)
    with revision(folder) as scratch:
        save_graph(trunk_graph(network, blocks, scratch), scratch / TRUNK)
        save_graph(tail_graph(network, blocks, scratch), scratch / TAIL)
        parts = {name: open_session(scratch / name) for name in (TRUNK, TAIL, BACKBONE)}
        bands = compare_rows(model, rows, partial(_in_parts, network.state_names, parts))
        check(f"{TRUNK} with {TAIL}", bands, LIMITS["fp32"])
        manifest = with_block_caches(manifest, others, blocks, every, part_costs(manifest, parts))
        metrics = {**manifest.metrics, "block_cache_relative_l2": float(f"{worst(bands).relative_l2:.4g}")}
        manifest = manifest.model_copy(update={"metrics": metrics})
        write_manifest(scratch, manifest)
    return manifest


def default_blocks(config: DiTConfig) -> int:
    """Return the first blocks that a cache is of: all but the last sixth, which is one at least."""
    return config.depth - max(1, config.depth // 6)


def with_block_caches(
    manifest: Manifest,
    others: Mapping[str, BackboneSpec],
    blocks: int,
    every: Sequence[int],
    costs: PartCosts,
) -> Manifest:
    """Return a manifest with a backbone for each block cache beside `others`. Raises `ExportError`."""
    try:
        caches = [BlockCache(blocks=blocks, every=count) for count in every]
        cached = {
            NAME.format(cache.every): BackboneSpec(
                config=manifest.config,
                embedding_size=manifest.embedding_size,
                state=manifest.state,
                row_cost=round(cache.row_cost(costs.trunk, costs.tail), 4),
                guidance="classifier-free" if manifest.guidance == "classifier-free" else "none",
                block_cache=cache,
                defaults=manifest.defaults,
            )
            for cache in caches
        }
        # A copy is not checked.
        return Manifest.model_validate(manifest.with_backbones({**others, **cached}).model_dump())
    except ValidationError as error:
        raise ExportError(": ".join(filter(None, wrong_field(error)))) from None


def _in_parts(
    names: Sequence[str], parts: Mapping[str, ort.InferenceSession], x: Tensor, state: Sequence[Tensor]
) -> Tensor:
    """Return the output of a backbone in two parts, of which all run."""
    inputs = {name: tensor.numpy() for name, tensor in zip(("x", *names), (x, *state), strict=True)}
    inputs |= run(parts[TRUNK], _taken(parts[TRUNK], inputs))
    return torch.from_numpy(run(parts[TAIL], _taken(parts[TAIL], inputs))["output"])


def _taken(session: ort.InferenceSession, inputs: Arrays) -> Arrays:
    return {entry.name: inputs[entry.name] for entry in session.get_inputs()}


def part_costs(manifest: Manifest, parts: Mapping[str, ort.InferenceSession]) -> PartCosts:
    """Return the costs of both parts, on one core."""
    inputs = blank_inputs(manifest)
    inputs |= run(parts[TRUNK], _taken(parts[TRUNK], inputs))
    sessions = [parts[name] for name in (TRUNK, TAIL, BACKBONE)]
    trunk, tail, whole = fastest_seconds([(session, _taken(session, inputs)) for session in sessions])
    return PartCosts(trunk / whole, tail / whole)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=command_line("export.block_cache"),
        description="Add networks whose first blocks run at some steps only to a bundle.",
    )
    parser.add_argument("bundle", type=named_path)
    parser.add_argument(
        "--every", type=positive, nargs="+", default=STEPS, help="steps at one of which they run: 2 and 3"
    )
    parser.add_argument("--blocks", type=positive, help="the first blocks; all but the last sixth")
    options = parser.parse_args(arguments)

    def work() -> None:
        manifest = add_block_caches(options.bundle, options.every, options.blocks)
        for name, spec in manifest.backbones.items():
            if (cache := spec.block_cache) is not None:
                print(
                    f"{options.bundle}: has the backbone {name}, whose first {cache.blocks} blocks run at "
                    f"one of {cache.every} steps; a row takes {spec.row_cost:.2f} of the time of its own"
                )
        print(f"{command_line('bench.ladder')} {options.bundle} --write measures where it pays")

    return guarded("export.block_cache", work)


if __name__ == "__main__":
    sys.exit(main())
