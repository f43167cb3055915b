"""`python -m export.half BUNDLE`: add a backbone in half precision to a bundle, beside the one in fp32.

LayerNorm statistics are computed in fp32, and the conditioner stays in fp32: rounding only its timestep
frequencies would make the error of the whole model ten times as large. The precision is fp16, or bf16 if
activations on real trajectories come near the largest number of fp16.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ditserve.commands import command_line
from ditserve.export.calibrate import CalibrationRows
from ditserve.export.errors import ExportError
from ditserve.export.graph import backbone_graph
from ditserve.export.parity import (
    CHUNK,
    ExpectedOutputs,
    compare_backbone,
    compare_outputs,
    expected_outputs,
)
from ditserve.export.source import free_weights, open_source
from ditserve.export.storage import remove_graph, save_graph
from ditserve.export.verify import LIMITS, Band, check, open_session, worst
from ditserve.model.nets.factory import Network, network_of
from ditserve.model.nets.layers import Attention
from ditserve.model.spec.bundle import CALIBRATION, write_manifest
from ditserve.model.spec.command_line import guarded, named_path, thread_count
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.output_folder import revision
from ditserve.model.train.loaded_model import LoadedModel

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP16_MAX = 65504.0
# Conditions and noise that were not probed may go this many times higher.
HEADROOM = 8.0


@dataclass(frozen=True, slots=True)
class ActivationPeak:
    """The largest absolute activation, and the module it came from."""

    value: float
    module: str

    @property
    def precision(self) -> str:
        """The half precision that holds the peak with `HEADROOM`: "fp16" or "bf16"."""
        return "fp16" if self.value * HEADROOM < FP16_MAX else "bf16"


def half_file(precision: str) -> str:
    """Return the name of the graph file in a half precision."""
    return f"backbone.{precision}.onnx"


@torch.no_grad()
def probe_activations(network: Network, rows: CalibrationRows) -> ActivationPeak:
    """Return the peak over the outputs of all modules of the backbone and all attention scores on `rows`."""
    peaks: dict[str, float] = {}
    for index in torch.arange(len(rows)).split(CHUNK):
        part = rows.at(index)
        # The conditioner runs before the hooks are set: it stays in fp32, so its activations do not count.
        state = part.state(network)
        with _recorded_peaks(network, peaks):
            network.backbone(part.x, state)
    name = max(peaks, key=lambda key: peaks[key])
    return ActivationPeak(peaks[name], name)


@contextmanager
def _recorded_peaks(network: Network, peaks: dict[str, float]) -> Iterator[None]:
    """Raise `peaks`, by module name, to the largest activation of each module that runs meanwhile."""

    def record(name: str, value: Tensor) -> None:
        largest = float(value.abs().max())
        peaks[name] = max(peaks.get(name, 0.0), largest if math.isfinite(largest) else math.inf)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                record(name, output)
            if isinstance(module, Attention):
                q, k, _ = module.heads(*inputs[:2])
                record(f"{name} (scores)", q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)

        return hook

    handles = [
        module.register_forward_hook(hook_of(name)) for name, module in network.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def half_graph(network: Network, precision: str, bundle: Path | None = None) -> onnx.ModelProto:
    """Return the graph of the backbone with weights in `precision`; its inputs and output stay float32."""
    return backbone_graph(half_network(network, precision), bundle)


def half_network(network: Network, precision: str) -> Network:
    """Return a copy of `network` in `precision`."""
    weights = {name: weight.detach().to(DTYPES[precision]) for name, weight in network.named_parameters()}
    # What is left to convert are the tables that are no weights.
    return network_of(network.config, weights).to(DTYPES[precision])


@dataclass(frozen=True, slots=True)
class SavedHalf:
    """A backbone in half precision that was written, and the peak of the activations.

    `output` is that of bf16 in torch on the verification rows: ONNX Runtime cannot run bf16 on a CPU.
    """

    precision: str
    peak: ActivationPeak
    output: Tensor | None = None


def write_half(
    source: LoadedModel, folder: Path, rows: CalibrationRows, precision: str = "auto"
) -> tuple[str, ActivationPeak, tuple[Band, ...]]:
    """Write the half-precision backbone into `folder`, which holds the weights, and verify it.

    Return its precision, the peak of the activations, and its errors by band of noise. `source` cannot be
    used afterwards.

    Raises:
        ExportError: the graph is beyond the limit of its precision; it is then removed.
    """
    expected = expected_outputs(source.network, rows)
    saved = save_half(source.network, folder, rows, expected, precision)
    return saved.precision, saved.peak, verify_half(saved, source.manifest, folder, rows, expected)


def save_half(
    network: Network, folder: Path, rows: CalibrationRows, expected: ExpectedOutputs, precision: str = "auto"
) -> SavedHalf:
    """Write the half-precision backbone into `folder`, which holds the weights.

    `network` is converted in place, which a copy beside it would take half as much memory again, and its
    weights are freed in the end. `expected` has the condition state of `rows`.
    """
    peak = probe_activations(network, rows)
    chosen = peak.precision if precision == "auto" else precision
    half = network.to(DTYPES[chosen])
    save_graph(backbone_graph(half, folder), folder / half_file(chosen))
    output = backbone_outputs(half, rows, expected) if chosen == "bf16" else None
    free_weights(half)
    return SavedHalf(chosen, peak, output)


@torch.no_grad()
def backbone_outputs(network: Network, rows: CalibrationRows, expected: ExpectedOutputs) -> Tensor:
    """Return the output (N, C_out, H, W) in fp32 of a backbone in half precision on `rows`."""
    dtype = next(network.parameters()).dtype
    parts = []
    for index in torch.arange(len(rows)).split(CHUNK):
        state = [torch.from_numpy(array[index.numpy()]).to(dtype) for array in expected.state.values()]
        parts.append(network.backbone(rows.x[index].to(dtype), state).float())
    return torch.cat(parts)


def verify_half(
    saved: SavedHalf, manifest: Manifest, folder: Path, rows: CalibrationRows, expected: ExpectedOutputs
) -> tuple[Band, ...]:
    """Return the errors of a backbone that `save_half` wrote, by band of noise.

    Raises:
        ExportError: the graph is beyond the limit of its precision; it is then removed.
    """
    path, peak = folder / half_file(saved.precision), saved.peak
    if saved.output is None:
        bands = compare_backbone(open_session(path), manifest, rows, expected)
    else:
        bands = compare_outputs(manifest, rows, torch.from_numpy(expected.output), saved.output)
    try:
        check(path.name, bands, LIMITS[saved.precision])
    except ExportError as error:
        remove_graph(path)
        raise ExportError(f"{error}; the largest activation is {peak.value:.3g} in {peak.module}") from None
    return bands


def main(arguments: list[str]) -> int:
    """Run the command line; return 0 if done, 2 if refused with one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog=command_line("export.half"), description="Add a half-precision backbone to a bundle."
    )
    parser.add_argument("bundle", type=named_path)
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--threads", type=thread_count, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return guarded("export.half", lambda: _run(options.bundle, options.precision))


def _run(bundle: Path, precision: str) -> None:
    with revision(bundle) as scratch:
        source = open_source(bundle)
        rows = CalibrationRows.load(bundle / CALIBRATION).with_null(source.network.config)
        chosen, peak, bands = write_half(source, scratch, rows, precision)
        write_manifest(scratch, source.manifest)
    print(
        f"{bundle / half_file(chosen)}: within {worst(bands).relative_l2:.1e} of fp32 (relative L2), "
        f"largest activation {peak.value:.3g} in {peak.module}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
