"""Compare imported pipelines in torch, eager and compiled (`--compile`), on a few batches of other sizes.

    python -m bench.compiled BUNDLE [BUNDLE …]

Every bundle is opened twice. Batches of 1 to 4 rows with texts of other lengths go through both, two of them
at another size. The table tells the largest difference of the outputs relative to the largest number, the
graphs compiled for the first two batches and for all later ones, and the seconds of CPU that this took.
Writes bench/results/compiled.json.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from ditserve.bench import report
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import named_path
from ditserve.model.spec.errors import ModelError
from ditserve.service.backends import Backend, Floats, load_backend

# Rows, and the sides of their latents in those of the model. A single row has a graph of its own.
BATCHES = ((1, 1), (3, 1), (2, 1), (4, 1), (3, 2), (1, 2))
FIRST = 2
PROMPTS = ("a red fox in the snow", "a cat", "the moon", "")


@dataclass(frozen=True, slots=True)
class Compared:
    """The largest relative difference, graphs of the first batches and of later ones, seconds of CPU."""

    name: str
    difference: float
    graphs: int
    later: int
    seconds: float


def compare(bundle: Bundle) -> Compared:
    """Return what compiling changes. Raises `ModelError` for a model that is no imported pipeline."""
    eager = load_backend("torch", bundle, threads=1)
    encoder = eager.text_encoder
    if encoder is None:
        raise ModelError(f"{bundle.path} takes no prompts, and this compares imported pipelines")
    texts = np.stack([encoder.encode(prompt) for prompt in PROMPTS])
    expected = _outputs(eager, texts)
    eager.close()
    torch._dynamo.reset()
    counters.clear()
    compiled, began = load_backend("torch", bundle, threads=1, compile=True), _cpu_seconds()
    outputs, graphs = [], []
    for number, _ in enumerate(BATCHES):
        outputs.append(_output(compiled, texts, number))
        graphs.append(counters["stats"]["unique_graphs"])
    difference = max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, outputs, strict=True)
    )
    first = graphs[FIRST - 1]
    return Compared(bundle.manifest.name, difference, first, graphs[-1] - first, _cpu_seconds() - began)


def _outputs(backend: Backend, texts: Floats) -> list[Floats]:
    return [_output(backend, texts, number) for number in range(len(BATCHES))]


def _output(backend: Backend, texts: Floats, number: int) -> Floats:
    """Return the output of a batch, whose rows have noise levels and texts of their own."""
    rows, times = BATCHES[number]
    manifest, random = backend.manifest, np.random.default_rng(number)
    height, width = manifest.config.image_size
    embeddings = backend.embed(np.zeros((rows, 0), np.int64), np.roll(texts, number, axis=0)[:rows])
    levels = np.linspace(0.1, 0.9, rows, dtype=np.float32) * manifest.diffusion.noise_scale
    x = random.standard_normal((rows, manifest.config.in_channels, height, width * times), np.float32)
    return backend.denoise(x, backend.modulate(levels, embeddings))


def _cpu_seconds() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.parser("compiled", __doc__)
    parser.add_argument("bundles", nargs="+", type=named_path)
    options, console, background = parser.parse_args(arguments), Console(), report.BackgroundLoad()

    def work() -> None:
        compared = [compare(Bundle.open(Path(path))) for path in options.bundles]
        columns = ["", "largest difference", "graphs", "later", "seconds"]
        rows = [
            [one.name, f"{one.difference:.1e}", str(one.graphs), str(one.later), f"{one.seconds:.0f}"]
            for one in compared
        ]
        console.print(report.table("compiled beside eager", columns, rows, text={""}))
        report.save("compiled", options, background, {"pipelines": [asdict(one) for one in compared]})

    return report.run_command("compiled", work)


if __name__ == "__main__":
    sys.exit(main())
