"""The export of an imported pipeline: graphs beside its own files, which hold the weights.

Graphs are verified like those of other models, on the rows of a few unguided runs from prompts. There is no
ladder, golden image or calibration, and no backbone in half precision or INT8: torch has half precision.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from ditserve.export.calibrate import CalibrationRows, TrajectorySettings
from ditserve.export.decoder import save_autoencoder
from ditserve.export.errors import ExportError
from ditserve.export.graph_files import export_record, write_graphs
from ditserve.export.parity import (
    ExpectedOutputs,
    expected_outputs,
    forward,
    verify_graphs,
)
from ditserve.export.source import free_weights
from ditserve.export.verify import PARITY, Band, report, worst
from ditserve.model.nets.factory import Network
from ditserve.model.nets.pipelines.decoder import PipelineDecoder
from ditserve.model.nets.pipelines.network import open_network
from ditserve.model.nets.pipelines.texts import PipelineTexts
from ditserve.model.sampling.denoise import initial_noise
from ditserve.model.spec.bundle import BACKBONE, PIPELINE, Bundle, write_manifest
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.heap import release_memory
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.pipeline_bundle import take_pipeline
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.solvers import step_table, trajectory

# The empty one is that which guidance subtracts.
PROMPTS = ("a red fox in the snow", "")
# A graph of any size cannot choose to decode in tiles: no latent is larger.
NO_TILES: Final = 1 << 40
NOT_FOR_PIPELINES: Final = {
    "vae": "it brings its autoencoder",
    "data": "no training pictures are compared",
    "ladder": "no ladder is measured of it",
    "weights": "its weights stay as they were imported",
    "half": "torch computes it in half precision (--backend torch --precision bf16)",
}

Bands = dict[str, tuple[Band, ...]]


def export_pipeline(
    bundle: Bundle, folder: Path, card: Mapping[str, Any], settings: TrajectorySettings
) -> dict[str, Any]:
    """Write the pipeline of `bundle` with its graphs into `folder`, which is empty; return the parity report.

    `card` has fields of the manifest to change. The text encoders are freed before the transformer is read,
    and its weights before a graph is opened.

    Raises:
        ExportError: a graph cannot be written or is beyond its limit.
        PipelineError: a part of the pipeline cannot be opened.
    """
    manifest = Manifest.model_validate({**bundle.manifest.model_dump(), **card, "files": {}})
    take_pipeline(bundle, folder)
    texts = _encoded_prompts(folder / PIPELINE, manifest, settings.samples)
    autoencoder = _write_autoencoder(manifest, folder)
    release_memory()
    try:
        rows, expected = _write_and_run(manifest, folder, texts, settings)
        release_memory()
        graphs = verify_graphs(manifest, folder, rows, expected) | autoencoder
    except ModelError:
        raise
    # The errors of the exporter, of what it calls and of the runtime share no base class.
    except Exception as error:
        raise ExportError(f"{manifest.name} has no graph, serve it in torch: {_cause(error)}") from error
    summary = {
        "rows": len(rows),
        "rows_sha256": rows.digest(),
        "weights": {"stored": "as imported"},
        "graphs": {name: report(bands) for name, bands in graphs.items()},
    }
    (folder / PARITY).write_text(json.dumps(summary, indent=1) + "\n")
    metrics = {"onnx_relative_l2": float(f"{worst(graphs[BACKBONE]).relative_l2:.4g}")}
    provenance = {**manifest.provenance, "export": export_record(manifest.config)}
    write_manifest(folder, manifest.model_copy(update={"provenance": provenance, "metrics": metrics}))
    return summary


def refuse_options(given: Mapping[str, Any]) -> None:
    """Refuse an option of an export that is not for a pipeline; `given` has all by name.

    Raises:
        ExportError: one is set.
    """
    for option, reason in NOT_FOR_PIPELINES.items():
        if given[option] not in (None, "auto", "none"):
            raise ExportError(f"--{option} is not for an imported pipeline: {reason}; leave it out")


def _cause(error: BaseException) -> str:
    """Return the message that an error began with, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]


def _encoded_prompts(folder: Path, manifest: Manifest, samples: int) -> Tensor:
    """Return the encodings (samples, text_width) of the prompts, one after the other."""
    encoder = PipelineTexts(folder, _config(manifest), key="")
    known = [torch.from_numpy(encoder.encode(prompt)) for prompt in PROMPTS[:samples]]
    return torch.stack([known[k % len(known)] for k in range(samples)])


def _write_and_run(
    manifest: Manifest, folder: Path, texts: Tensor, settings: TrajectorySettings
) -> tuple[CalibrationRows, ExpectedOutputs]:
    """Write the graphs of the network; return rows to verify them on, and what torch makes of these."""
    pipeline = open_network(folder / PIPELINE, _config(manifest), dtype=torch.float32)
    pipeline.guidance = manifest.guidance_embedded or 0.0
    # It has the methods of this project's networks that graphs are made of.
    network = cast(Network, pipeline)
    rows = _rows(network, manifest, texts, settings)
    write_graphs(network, manifest, folder)
    expected = expected_outputs(network, rows)
    free_weights(network)
    return rows, expected


@torch.no_grad()
def _rows(
    network: Network, manifest: Manifest, texts: Tensor, settings: TrajectorySettings
) -> CalibrationRows:
    """Return the rows that the network sees on unguided runs of `texts` (S, text_width)."""
    schedule, config = manifest.diffusion.noise_schedule(), manifest.config
    labels, steps = torch.zeros(len(texts), 0, dtype=torch.int64), list[CalibrationRows]()

    def denoised(x: Tensor, level: float) -> Tensor:
        told = torch.full((len(x),), float(schedule.told(level)))
        steps.append(CalibrationRows(x, told, labels, texts))
        return forward(network, steps[-1])[:, : x.shape[1]]

    shape = (config.in_channels, *config.image_size)
    start = np.stack([initial_noise(settings.seed + k, shape) for k in range(len(texts))])
    count = min(settings.steps, schedule.max_steps)
    levels = noise_levels(even_grid(schedule), count, schedule)
    deque(trajectory(step_table("ddim", levels, schedule), torch.from_numpy(start), denoised), maxlen=0)
    x, timestep = (torch.cat([getattr(rows, name) for rows in steps]) for name in ("x", "timestep"))
    return CalibrationRows(x, timestep, labels.repeat(len(steps), 1), texts.repeat(len(steps), 1))


def _write_autoencoder(manifest: Manifest, folder: Path) -> Bands:
    assert manifest.latents is not None
    autoencoder = PipelineDecoder(folder / PIPELINE / "vae", manifest.latents)
    autoencoder.tile = NO_TILES
    return save_autoencoder(autoencoder, folder, manifest.config.in_channels)


def _config(manifest: Manifest) -> PipelineConfig:
    assert isinstance(manifest.config, PipelineConfig)
    return manifest.config
