"""Several evaluated models side by side: what each costs, and what its pictures are worth. `python -m model.evaluate A B …` writes it."""

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
from ditserve.model.spec.diffusion import grid, guidance_weight
from ditserve.model.train.loaded_model import LoadedModel

PROBES = 20  # passes of each network, timed in turns
FIGURES = {
    "Fréchet distance ↓": (GENERATED, "frechet_distance"),
    "… of details ↓": (GENERATED, "detail_frechet_distance"),
    "kernel distance ↓": (GENERATED, "kernel_distance"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model by name, and the record that its evaluation left (evaluation.json)."""

    name: str
    opened: LoadedModel
    record: Mapping[str, Any]


def image_rows(record: Mapping[str, Any], timesteps: int) -> int:
    """Forward rows of one image, sampled as in the record: two where guidance acts, else one."""
    how = record["sampling"]
    scale, interval = how["guidance_scale"], tuple(how["guidance_interval"])
    places = grid(how["grid"], how["steps"], timesteps)
    return sum(1 + (guidance_weight(scale, t, timesteps, interval) != 1.0) for t in places)


@torch.no_grad()
def milliseconds(networks: Sequence[Network], probes: int = PROBES) -> list[float]:
    """Processor time of a forward pass of one row in PyTorch with one thread: the median of each network.

    Time on the clock would tell what else the machine does.
    """
    taken: list[list[float]] = [[] for _ in networks]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(probes):
        for network, mine in zip(networks, taken, strict=True):
            config = network.config
            x = torch.zeros(1, config.in_channels, *config.image_size)
            labels = torch.zeros(1, len(config.classes), dtype=torch.int64)
            began = time.process_time()
            network(x, torch.zeros(1), labels)
            mine.append(1e3 * (time.process_time() - began))
    torch.set_num_threads(threads)
    return [statistics.median(mine) for mine in taken]


def compare(entries: Sequence[Entry]) -> str:
    """A table in Markdown, a line per model."""
    figures = dict(FIGURES)
    for which, prefix in ((GENERATED, ""), (UNSEEN, "unseen labels: ")):
        found = {key for each in entries for key in each.record["figures"].get(which, {}) if "_top1" in key}
        figures |= {f"{prefix}{key.removesuffix('_top1')} top-1 ↑": (which, key) for key in sorted(found)}
    head = [
        "",
        "parameters",
        "GFLOPs a row",
        "ms a row",
        "sampling",
        "rows an image",
        "ms an image",
        *figures,
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for entry, ms in zip(entries, milliseconds([each.opened.network for each in entries]), strict=True):
        network, how = cost(entry.opened.network.config), entry.record["sampling"]
        count = image_rows(entry.record, entry.opened.schedule.timesteps)
        cells = [
            entry.name,
            f"{network.parameters / 1e6:.2f} M",
            f"{network.flops / 1e9:.3f}",
            f"{ms:.1f}",
            f"{how['solver']}, {how['steps']} steps, guidance {how['guidance_scale']:g}",
            f"{count}",
            f"{count * ms:.0f}",
            *(_figure(entry.record, which, key) for which, key in figures.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = entries[0].record["pictures"]
    return "\n".join(
        [
            *lines,
            "",
            f"{sizes[GENERATED]} pictures each. ms are processor time of PyTorch, fp32, one thread and one row at a time; an image takes "
            "that for each of its rows.",
            "",
            *entries[0].record["notes"],
        ]
    )


def _figure(record: Mapping[str, Any], which: str, key: str) -> str:
    value = record["figures"].get(which, {}).get(key)
    return "–" if value is None else f"{value:.4g}"
