"""`python -m export.half BUNDLE`: the backbone in half precision, with fp32 islands, beside the fp32 one.

LayerNorm statistics are computed in fp32 and the conditioner stays fp32 altogether: rounding its timestep frequencies alone would
raise the whole model's error tenfold. fp16 is taken unless activations on real trajectories come near its largest number, then bf16.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.calibrate import Rows, Walk, trajectories
from export.errors import ExportError
from export.graph import backbone_graph
from export.session import open_session, run
from export.source import open_source
from export.storage import save_graph
from export.verify import LIMITS, Band, check, compare, worst
from model.bundle import BundleError, write_manifest
from model.dit import DiT
from model.layers import Attention
from model.opening import Opened

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP16_MAX = 65504.0
HEADROOM = 8.0  # other conditions and noise than the probed may go higher


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest absolute activation seen, and the module it came from."""

    value: float
    module: str

    @property
    def precision(self) -> str:
        """The half precision that holds it with room to spare."""
        return "fp16" if self.value * HEADROOM < FP16_MAX else "bf16"


def filename(precision: str) -> str:
    """The graph file of a half precision."""
    return f"backbone.{precision}.onnx"


@torch.no_grad()
def probe(dit: DiT, rows: Rows) -> Peak:
    """The peak over every module's output and every attention score, along `rows`."""
    peaks: dict[str, float] = {}
    with _watch(dit, peaks):
        for start in range(0, len(rows), 32):
            part = rows.at(torch.arange(start, min(start + 32, len(rows))))
            dit.backbone(part.x, dit.modulate(part.timestep, dit.embed(part.labels)))
    name = max(peaks, key=lambda key: peaks[key])
    return Peak(peaks[name], name)


@contextmanager
def _watch(dit: DiT, peaks: dict[str, float]) -> Iterator[None]:
    def record(name: str, value: Tensor) -> None:
        largest = float(value.abs().max())
        peaks[name] = max(peaks.get(name, 0.0), largest if math.isfinite(largest) else math.inf)

    def watcher(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                record(name, output)
            if isinstance(module, Attention):
                q, k, _ = module.heads(*inputs)
                record(f"{name} (scores)", q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)

        return hook

    conditioning = ("t_embedder", "y_embedder", "layout")
    handles = [
        module.register_forward_hook(watcher(name))
        for name, module in dit.named_modules()
        if name and not name.startswith(conditioning) and "adaLN" not in name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def half_graph(dit: DiT, precision: str) -> onnx.ModelProto:
    """The backbone with weights, inputs and output in `precision`."""
    return backbone_graph(halved(dit, precision))


def halved(dit: DiT, precision: str) -> DiT:
    """A copy of `dit` in `precision`."""
    return copy.deepcopy(dit).to(DTYPES[precision])


def write_half(
    source: Opened, folder: Path, rows: Rows, precision: str = "auto"
) -> tuple[str, Peak, tuple[Band, ...]]:
    """Write the half-precision backbone into `folder`, which holds the weights; returns precision, peak and errors.

    fp16 is run in ONNX Runtime; bf16, which it cannot run on a CPU, in torch.

    Raises:
        ExportError: the graph is beyond the limit of its precision; it is then removed.
    """
    peak = probe(source.dit, rows)
    chosen = peak.precision if precision == "auto" else precision
    path = folder / filename(chosen)
    save_graph(half_graph(source.dit, chosen), path)
    bands = compare(
        *_outputs(source.dit, path, rows, chosen), rows.timestep.numpy(), source.manifest.diffusion.timesteps
    )
    try:
        check(path.name, bands, LIMITS[chosen])
    except ExportError as error:
        path.unlink()
        raise ExportError(f"{error}; the largest activation is {peak.value:.3g} in {peak.module}") from None
    return chosen, peak, bands


@torch.no_grad()
def _outputs(dit: DiT, path: Path, rows: Rows, precision: str) -> tuple[Any, Any]:
    state = dit.modulate(rows.timestep, dit.embed(rows.labels))
    reference = dit.backbone(rows.x, state).numpy()
    if precision == "bf16":
        dtype = DTYPES[precision]
        output = halved(dit, precision).backbone(rows.x.to(dtype), [tensor.to(dtype) for tensor in state])
        return reference, output.float().numpy()
    names = ("x", *(name for name, _ in dit.config.state()))
    inputs = {name: tensor.half().numpy() for name, tensor in zip(names, (rows.x, *state), strict=True)}
    return reference, run(open_session(path), inputs)["output"]


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m export.half", description="Add a half-precision backbone to a bundle."
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        source = open_source(options.bundle)
        rows = trajectories(source.dit, source.manifest, source.schedule, Walk(samples=2))
        chosen, peak, bands = write_half(source, options.bundle, rows, options.precision)
        write_manifest(options.bundle, source.manifest)
    except (ExportError, BundleError, OSError) as error:
        print(f"export.half: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.bundle / filename(chosen)}: within {worst(bands).relative_l2:.1e} of fp32 (relative L2), "
        f"largest activation {peak.value:.3g} in {peak.module}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
