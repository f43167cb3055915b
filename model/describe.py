"""`python -m model.describe [NAME | CONFIG.json | BUNDLE]`: what a network costs; without arguments the paper's tables.

Parameters include the position table, as the paper's do. Multiply-adds (MACs) are counted from the operations one row
runs, FLOPs are twice that; what the paper calls Gflops are multiply-adds. Activation memory is for one fp32 row: the most
that is alive at once in inference, and what a training step keeps for the backward pass. Nothing is computed: the
network runs on torch's meta device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ditserve.model.nets.cost import Cost, cost
from ditserve.model.spec.bundle import MANIFEST, Bundle, BundleError
from ditserve.model.spec.dit_config import BLOCK_KINDS, PATCHES, SIZES, named
from ditserve.model.spec.network_config import NetworkConfig, network_config
from ditserve.model.train.load import run_config
from ditserve.model.train.loaded_model import LoadError


def paper() -> dict[str, NetworkConfig]:
    """The twelve models of the paper's Table 4, and the four block kinds of its Figure 5."""
    table: dict[str, NetworkConfig] = {
        name: named(name) for size in SIZES for patch in PATCHES[::-1] for name in [f"DiT-{size}/{patch}"]
    }
    table["DiT-XL/2 512px"] = named("DiT-XL/2", image_size=(64, 64))
    return table | {f"DiT-XL/2 {kind}": named("DiT-XL/2", blocks=kind) for kind in BLOCK_KINDS[1:]}


def read_config(text: str) -> NetworkConfig:
    """A configuration from a published name, a bundle's folder, or a JSON file of a network or of a training run.

    Raises:
        ValueError: none of these, or a configuration that cannot work.
        BundleError: a bundle that cannot be opened.
        LoadError: a training run whose pictures, which settle its size and classes, are not there.
    """
    path = Path(text)
    if (path / MANIFEST).is_file():
        return Bundle.open(path, verify=False).manifest.config
    if not path.is_file():
        if path.suffix == ".json" or path.exists():
            raise ValueError(f"{path} is neither a bundle nor a JSON file")
        return named(text)
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return run_config(path) if "data" in fields else network_config(fields)


def show(costs: dict[str, Cost]) -> str:
    """A table, one line per network."""
    width = max(len("network"), *(len(name) for name in costs))
    head = f"{'network':{width}}  parameters  conditioner G  backbone G      GMACs    GFLOPs  inference MiB  training MiB"
    lines = [
        f"{name:{width}}  {c.parameters / 1e6:8.2f} M  {c.conditioner_macs / 1e9:13.4f}  {c.backbone_macs / 1e9:10.2f}"
        f"  {c.macs / 1e9:9.2f} {c.flops / 1e9:9.2f}  {c.inference_bytes / 2**20:13.1f}  {c.training_bytes / 2**20:12.1f}"
        for name, c in costs.items()
    ]
    return "\n".join([head, *lines, "per row, fp32; the paper's Gflops are these GMACs"])


def main(arguments: Sequence[str]) -> int:
    """Command line: `[NETWORK …] [--size H W] [--json]`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.describe",
        description="What networks cost per row: parameters, multiply-adds, FLOPs, activation memory.",
    )
    parser.add_argument(
        "network",
        nargs="*",
        help="a size by name such as DiT-S/2, a JSON file of a network or a training run, or a bundle; none: the paper's tables",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="in latent pixels; the trained one unless given"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in plain numbers")
    options = parser.parse_args(arguments)
    try:
        configs = {text: read_config(text) for text in options.network} or paper()
        size = (options.size[0], options.size[1]) if options.size else None
        costs = {name: cost(config, size) for name, config in configs.items()}
    except (ValueError, BundleError, LoadError, OSError) as error:
        print(f"model.describe: {error}", file=sys.stderr)
        return 2
    told = {name: {**asdict(each), "macs": each.macs, "flops": each.flops} for name, each in costs.items()}
    print(json.dumps(told, indent=1) if options.json else show(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
