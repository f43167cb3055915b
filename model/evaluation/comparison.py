"""A table of several evaluated models: the cost of each, and the quality of its pictures.

`python -m model.evaluate A B …` writes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditserve.model.evaluation.picture_sets import GENERATED, UNSEEN
from ditserve.model.nets.cost import cost
from ditserve.model.nets.factory import Network
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.guidance import forward_rows
from ditserve.model.train.loaded_model import LoadedModel

PROBES = 20  # passes of each network, timed in turns
COST_COLUMNS = ("parameters", "GFLOPs a row", "ms a row", "sampling", "rows an image", "ms an image")
# Column → (picture set, figure).
FIGURES = {
    "Fréchet distance ↓": (GENERATED, "frechet_distance"),
    "… of details ↓": (GENERATED, "detail_frechet_distance"),
    "kernel distance ↓": (GENERATED, "kernel_distance"),
}


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model by name, and the record of its evaluation (evaluation.json)."""

    name: str
    loaded: LoadedModel
    record: Mapping[str, Any]


def rows_per_image(record: Mapping[str, Any], schedule: Schedule) -> float:
    """Return the forward rows of one image, sampled as in the record."""
    sampling = record["sampling"]
    levels = noise_levels(sampling["grid"], sampling["steps"], schedule)
    return forward_rows(levels, schedule, sampling["guidance_scale"], tuple(sampling["guidance_interval"]))


@torch.no_grad()
def pass_milliseconds(networks: Sequence[Network], probes: int = PROBES) -> list[float]:
    """Return the median time of a forward pass of one row, in ms, for each network.

    It is processor time of PyTorch with one thread. Wall-clock time would include the other
    work of the machine.
    """
    times: list[list[float]] = [[] for _ in networks]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(probes):
        for network, network_times in zip(networks, times, strict=True):
            config = network.config
            x = torch.zeros(1, config.in_channels, *config.image_size)
            labels = torch.zeros(1, len(config.classes), dtype=torch.int64)
            began = time.process_time()
            network(x, torch.zeros(1), labels)
            network_times.append(1e3 * (time.process_time() - began))
    torch.set_num_threads(threads)
    return [statistics.median(network_times) for network_times in times]


def comparison_table(models: Sequence[EvaluatedModel]) -> str:
    """Return a table in Markdown, a line per model, with notes below it."""
    figures = dict(FIGURES)
    for picture_set, prefix in ((GENERATED, ""), (UNSEEN, "unseen labels: ")):
        keys = {
            key for model in models for key in model.record["figures"].get(picture_set, {}) if "_top1" in key
        }
        figures |= {
            f"{prefix}{key.removesuffix('_top1')} top-1 ↑": (picture_set, key) for key in sorted(keys)
        }
    head = ["", *COST_COLUMNS, *figures]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    times = pass_milliseconds([model.loaded.network for model in models])
    for model, ms in zip(models, times, strict=True):
        cells = [
            model.name,
            *_cost_cells(model, ms),
            *(_figure(model.record, picture_set, key) for picture_set, key in figures.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    counts = models[0].record["pictures"]
    note = (
        f"{counts[GENERATED]} pictures each. "
        "ms are processor time of PyTorch, fp32, one thread and one row at a time; "
        "an image takes that for each of its rows."
    )
    return "\n".join([*lines, "", note, "", *models[0].record["notes"]])


def _cost_cells(model: EvaluatedModel, ms: float) -> list[str]:
    """Return the cells of `COST_COLUMNS`; `ms` is the time of a row."""
    network, sampling = cost(model.loaded.network.config), model.record["sampling"]
    rows = rows_per_image(model.record, model.loaded.schedule)
    return [
        f"{network.parameters / 1e6:.2f} M",
        f"{network.flops / 1e9:.3f}",
        f"{ms:.1f}",
        f"{sampling['solver']}, {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}",
        f"{rows:g}",
        f"{rows * ms:.0f}",
    ]


def _figure(record: Mapping[str, Any], picture_set: str, key: str) -> str:
    value = record["figures"].get(picture_set, {}).get(key)
    return "–" if value is None else f"{value:.4g}"
