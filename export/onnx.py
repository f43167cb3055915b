"""`python -m export.onnx SOURCE --out BUNDLE`: a training run or a bundle becomes a complete, verified bundle.

The bundle is assembled in a scratch folder beside the target and moved in only when every graph agrees with torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from pydantic import ValidationError
from torch import Tensor

from export.calibrate import Rows, Walk, trajectories
from export.errors import ExportError
from export.graph import OPSET, backbone_graph, conditioner_graph, embedder_graph
from export.half import filename, write_half
from export.session import open_session, run
from export.source import Card, open_source, parameters, rounded
from export.storage import save_graph, save_weights
from export.verify import LIMITS, Band, Limits, check, compare, report, worst
from model.bundle import (
    BACKBONE,
    CONDITIONER,
    EMBEDDER,
    WEIGHTS,
    BundleError,
    Manifest,
    write_manifest,
)
from model.dit import DiT
from model.opening import Opened, build

PARITY = "parity.json"
ROUNDING = Limits(relative_l2=3e-3, cosine=0.99999)  # what storing weights in half precision may cost
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Options:
    """`weights` on disk: "fp16", "fp32", or "auto" (fp16 if the output stays within `ROUNDING`); `half`: the precision of the extra
    half-precision backbone, "auto" (see `export.half`) or "none"; `samples` and `steps` of the trajectories to verify on."""

    weights: str = "auto"
    half: str = "auto"
    samples: int = 4
    steps: int = 20


def export_bundle(source: Opened, out: Path, options: Options = Options()) -> dict[str, Any]:
    """Write `source` as a bundle into `out`; returns the parity report, which is also written there.

    Raises:
        ExportError: a graph differs from torch beyond its limit; `out` is then untouched.
    """
    rows = trajectories(source.dit, source.manifest, source.schedule, Walk(options.samples, options.steps))
    total = source.manifest.diffusion.timesteps
    exact = forward(source.dit, rows)
    kind, cost = _storage(source.dit, rows, exact, options.weights, total)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.export")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        stored = save_weights(scratch / WEIGHTS, parameters(source.dit), DTYPES[kind])
        dit = build(source.dit.config, stored, scratch / WEIGHTS)
        write_graphs(dit, source.manifest, scratch)
        graphs = verify_graphs(dit, source.manifest, scratch, rows)
        if options.half != "none":
            precision, _, bands = write_half(Opened(dit, source.manifest), scratch, rows, options.half)
            graphs[filename(precision)] = bands
        summary = {
            "rows": len(rows),
            "rows_sha256": rows.digest(),
            "weights": {"stored": kind, "error": report(cost)},
            "graphs": {name: report(bands) for name, bands in graphs.items()},
        }
        (scratch / PARITY).write_text(json.dumps(summary, indent=1) + "\n")
        _publish(scratch, out, _manifest(source.manifest, kind, cost, graphs))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return summary


def write_graphs(dit: DiT, manifest: Manifest, folder: Path) -> None:
    """The three graphs of `dit`, referring to the weights already in `folder`."""
    graphs = {
        EMBEDDER: embedder_graph(dit, [factor.name for factor in manifest.factors]),
        CONDITIONER: conditioner_graph(dit),
        BACKBONE: backbone_graph(dit),
    }
    for name, proto in graphs.items():
        save_graph(proto, folder / name)


def verify_graphs(dit: DiT, manifest: Manifest, folder: Path, rows: Rows) -> dict[str, tuple[Band, ...]]:
    """Errors of each graph in ONNX Runtime against `dit` on the same inputs.

    Raises:
        ExportError: beyond the fp32 limit.
    """
    t, total = rows.timestep.numpy(), manifest.diffusion.timesteps
    with torch.no_grad():
        embedding = dit.embed(rows.labels)
        state = named_state(dit, dit.modulate(rows.timestep, embedding))
        output = dit.backbone(rows.x, tuple(state.values()))
    labels = {factor.name: rows.labels[:, k].numpy() for k, factor in enumerate(manifest.factors)}
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    got = {
        EMBEDDER: run(open_session(folder / EMBEDDER), labels),
        CONDITIONER: run(open_session(folder / CONDITIONER), {"timestep": t, "embedding": embedding.numpy()}),
        BACKBONE: run(open_session(folder / BACKBONE), {"x": rows.x.numpy(), **arrays}),
    }
    want = {
        EMBEDDER: {"embedding": embedding.numpy()},
        CONDITIONER: arrays,
        BACKBONE: {"output": output.numpy()},
    }
    bands = {name: compare(_flat(want[name]), _flat(got[name]), t, total) for name in want}
    for name, found in bands.items():
        check(name, found, LIMITS["fp32"])
    return bands


@torch.no_grad()
def forward(dit: DiT, rows: Rows) -> Tensor:
    """Output (N, C_out, H, W) of `dit` on `rows`."""
    parts = zip(rows.x.split(32), rows.timestep.split(32), rows.labels.split(32), strict=True)
    return torch.cat([dit(x, t, labels) for x, t, labels in parts])


def named_state(dit: DiT, state: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The condition state by name, in order."""
    return dict(zip((name for name, _ in dit.config.state()), state, strict=True))


def _flat(arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> np.ndarray[Any, np.dtype[Any]]:
    return np.concatenate([arrays[name].reshape(len(arrays[name]), -1) for name in sorted(arrays)], axis=1)


def _storage(dit: DiT, rows: Rows, exact: Tensor, wanted: str, total: int) -> tuple[str, tuple[Band, ...]]:
    """The dtype to store weights in, and what that costs."""

    def cost(kind: str) -> tuple[Band, ...]:
        return compare(
            exact.numpy(), forward(rounded(dit, DTYPES[kind]), rows).numpy(), rows.timestep.numpy(), total
        )

    if wanted == "fp32":
        return wanted, cost(wanted)
    bands = cost("fp16")
    try:
        check("the model with fp16 weights", bands, ROUNDING)
    except ExportError:
        if wanted == "fp16":
            raise
        return "fp32", cost("fp32")
    return "fp16", bands


def _manifest(
    manifest: Manifest, kind: str, cost: tuple[Band, ...], graphs: Mapping[str, tuple[Band, ...]]
) -> Manifest:
    tools = {"torch": str(torch.__version__).partition("+")[0], "onnx": onnx.__version__, "opset": OPSET}
    provenance = {**manifest.provenance, "export": {**tools, "weights": kind}}
    kept = {name: value for name, value in manifest.metrics.items() if not name.startswith("int8")}
    metrics = {
        "weights_relative_l2": float(f"{worst(cost).relative_l2:.4g}"),
        "onnx_relative_l2": float(f"{worst(graphs[BACKBONE]).relative_l2:.4g}"),
    }
    return manifest.model_copy(update={"provenance": provenance, "metrics": {**kept, **metrics}, "files": {}})


def _publish(scratch: Path, out: Path, manifest: Manifest) -> None:
    """Move the new files in, remove graphs of other weights, and write the manifest last."""
    out.mkdir(exist_ok=True)
    new = {file.name for file in scratch.iterdir()}
    for stale in out.glob("*.onnx"):
        if stale.name not in new:
            stale.unlink()
    for file in sorted(scratch.iterdir()):
        file.replace(out / file.name)
    write_manifest(out, manifest)


def main(arguments: list[str]) -> int:
    """Command line; 0 done, 2 refused with one sentence on stderr."""
    options = _parse(arguments)
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    try:
        source = open_source(options.source, data=options.data)
        source = Opened(source.dit, _named(source.manifest, options))
        summary = export_bundle(
            source, options.out, Options(options.weights, options.half, options.samples, options.steps)
        )
    except (ExportError, BundleError, OSError) as error:
        print(f"export.onnx: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in options.out.iterdir() if file.is_file())
    error_of = max(band["relative_l2"] for band in summary["graphs"][BACKBONE])
    print(
        f"{options.out}: {size / 1e6:.1f} MB, weights {summary['weights']['stored']}, backbone within {error_of:.1e} of torch "
        f"(relative L2, worst of {len(summary['graphs'][BACKBONE])} noise bands), {time.monotonic() - started:.0f} s"
    )
    return 0


def _named(manifest: Manifest, options: argparse.Namespace) -> Manifest:
    told: dict[str, Any] = {}
    try:
        if options.card:
            told = Card.model_validate_json(options.card.read_bytes()).told()
        told |= Card(
            **{
                key: getattr(options, key)
                for key in ("name", "version", "description", "licence", "attribution")
            }
        ).told()
        return Manifest.model_validate({**manifest.model_dump(), **told})
    except ValidationError as error:
        first = error.errors()[0]
        raise ExportError(f"{'.'.join(map(str, first['loc'])) or options.card}: {first['msg']}") from None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.onnx", description="Write a bundle from a training run or a bundle."
    )
    parser.add_argument("source", type=Path, help="training run folder, or a bundle to export again")
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    parser.add_argument(
        "--card", type=Path, help="JSON file with name, version, description, licence, attribution, defaults"
    )
    for field in ("name", "version", "description", "licence"):
        parser.add_argument(f"--{field}")
    parser.add_argument("--attribution", action="append", help="one credit line; repeat for more")
    parser.add_argument("--data", type=Path, help="the training pictures, if not where the run says")
    parser.add_argument("--weights", choices=("auto", *DTYPES), default="auto", help="precision on disk")
    parser.add_argument(
        "--half",
        choices=("auto", "fp16", "bf16", "none"),
        default="auto",
        help="half-precision backbone, for TensorRT",
    )
    parser.add_argument("--samples", type=int, default=4, help="trajectories to verify on")
    parser.add_argument("--steps", type=int, default=20, help="steps of each trajectory")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
