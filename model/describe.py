"""Print what networks cost: `python -m model.describe [NAME | CONFIG.json | BUNDLE …]`.

Without arguments it prints the models of the paper. Costs are those of one row: parameters, tokens,
multiply-adds by part and by kind of operation, FLOPs and activation memory. `model.nets.cost` defines them.
Of an imported pipeline it prints its weights, and how many of them compute modulations alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ditserve.commands import command_line
from ditserve.model.nets.cost import Cost, PartCost, cost, part_costs
from ditserve.model.spec.bundle import MANIFEST, PIPELINE, Bundle
from ditserve.model.spec.command_line import guarded, positive
from ditserve.model.spec.dit_config import BLOCK_KINDS, PATCHES, SIZES, published_config
from ditserve.model.spec.network_config import NetworkConfig, network_config, own_config
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_weights import WeightSizes, weight_sizes
from ditserve.model.spec.sizes import size_name
from ditserve.model.train.load import run_config


def paper() -> dict[str, NetworkConfig]:
    """Return the networks of arXiv:2212.09748 by name: twelve of Table 4, and the block kinds of Figure 5."""
    names = [f"DiT-{size}/{patch}" for size in SIZES for patch in PATCHES[::-1]]
    table: dict[str, NetworkConfig] = {name: published_config(name) for name in names}
    table["DiT-XL/2 512px"] = published_config("DiT-XL/2", image_size=(64, 64))
    for kind in BLOCK_KINDS[1:]:
        table[f"DiT-XL/2 {kind}"] = published_config("DiT-XL/2", blocks=kind)
    return table


def read_config(text: str) -> NetworkConfig:
    """Return the configuration that `text` names.

    `text` is a published name, the folder of a bundle, or a JSON file of a network or of a training run.

    Raises:
        ValueError: it is none of these, or the configuration cannot work.
        BundleError: the bundle cannot be opened.
        LoadError: the pictures of the training run, which fix its size and classes, are not there.
    """
    path = Path(text)
    if (path / MANIFEST).is_file():
        manifest = Bundle.open(path, verify=False).manifest
        return own_config(manifest.name, manifest.config)
    if not path.is_file():
        if path.suffix == ".json" or path.exists():
            raise ValueError(f"{path} is neither a bundle nor a JSON file")
        return published_config(text)
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return run_config(path) if "data" in fields else network_config(fields)


def format_table(costs: Mapping[str, Cost]) -> str:
    """Return a table with one line per network."""
    width = max(len("network"), *(len(name) for name in costs))
    head = (
        f"{'network':{width}}  parameters     active  tokens  conditioner G  backbone G      GMACs"
        "   linear G  attention G  convolution G    GFLOPs  inference MiB  training MiB"
    )
    lines = [
        f"{name:{width}}  {c.parameters / 1e6:8.2f} M {c.active_parameters / 1e6:8.2f} M"
        f"  {c.tokens:6}  {c.conditioner_macs / 1e9:13.4f}"
        f"  {c.backbone_macs / 1e9:10.2f}  {c.macs / 1e9:9.2f}  {c.linear_macs / 1e9:9.3f}"
        f"  {c.attention_macs / 1e9:11.3f}  {c.convolution_macs / 1e9:13.4f}  {c.flops / 1e9:8.2f}"
        f"  {c.inference_bytes / 2**20:13.1f}  {c.training_bytes / 2**20:12.1f}"
        for name, c in costs.items()
    ]
    notes = (
        "per row, fp32; active: parameters that act on one token; the paper's Gflops are these GMACs, which "
        "linear, attention and convolution add up to"
    )
    return "\n".join([head, *lines, notes])


def format_parts(name: str, parts: Sequence[PartCost]) -> str:
    """Return a table with one line per part of a network: where its multiply-adds and its memory are."""
    total = sum(part.macs for part in parts)
    lines = [f"{name:20}        MACs   share  output         MiB"]
    for part in parts:
        shape = size_name(part.shape, "×")
        lines.append(
            f"{part.name:20}  {part.macs / 1e6:8.1f} M  {part.macs / max(1, total):6.1%}"
            f"  {shape:12}  {part.output_bytes / 2**20:6.2f}"
        )
    return "\n".join(lines)


def pipeline_weights(text: str) -> WeightSizes | None:
    """Return the sizes of the weights of the imported pipeline that `text` names; None for another network.

    Raises:
        ModelError: the bundle cannot be opened.
    """
    path = Path(text)
    if not (path / MANIFEST).is_file():
        return None
    bundle = Bundle.open(path, verify=False)
    imported = isinstance(bundle.manifest.config, PipelineConfig)
    return weight_sizes(bundle.path / PIPELINE / "transformer") if imported else None


def describe_weights(name: str, sizes: WeightSizes) -> str:
    """Return one line about the weights of an imported pipeline."""
    share = sizes.modulation_bytes / max(sizes.bytes, 1)
    return (
        f"{name}: {sizes.parameters / 1e6:.2f} M parameters, {sizes.bytes / 1e6:,.1f} MB; modulations alone "
        f"{sizes.modulation_bytes / 1e6:,.1f} MB ({share:.1%}): they follow the noise level and pooled text"
    )


def run(options: argparse.Namespace) -> None:
    """Print the costs that the command line asks for, as a table or as JSON.

    Raises:
        ModelError, ValueError: a configuration cannot be read, or cannot take the size.
    """
    weights = {text: sizes for text in options.network if (sizes := pipeline_weights(text)) is not None}
    if weights and len(weights) < len(options.network):
        raise ValueError("name imported pipelines and networks of ditserve's own apart from each other")
    if weights:
        fields = {name: asdict(sizes) for name, sizes in weights.items()}
        lines = [describe_weights(name, sizes) for name, sizes in weights.items()]
        print(json.dumps(fields, indent=1) if options.json else "\n".join(lines))
        return
    configs = {text: read_config(text) for text in options.network} or paper()
    size = tuple(options.size) if options.size else None
    if options.parts:
        parts = {name: part_costs(config, size) for name, config in configs.items()}
        listed = {name: [asdict(part) for part in costs] for name, costs in parts.items()}
        tables = "\n\n".join(format_parts(name, costs) for name, costs in parts.items())
        print(json.dumps(listed, indent=1) if options.json else tables)
        return
    costs = {name: cost(config, size) for name, config in configs.items()}
    if options.json:
        derived = ("linear_macs", "macs", "flops")
        fields = {
            name: {**asdict(c), **{field: getattr(c, field) for field in derived}}
            for name, c in costs.items()
        }
        print(json.dumps(fields, indent=1))
    else:
        print(format_table(costs))


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.describe", lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("model.describe"),
        description="What networks cost per row: parameters, multiply-adds, FLOPs, activation memory.",
    )
    parser.add_argument(
        "network",
        nargs="*",
        help="a size by name such as DiT-S/2, a JSON file of a network or a training run, or a bundle; "
        "none: the paper's tables",
    )
    parser.add_argument(
        "--size",
        type=positive,
        nargs="+",
        metavar="SIDE",
        help="height and width in latent pixels, and before them the frames of a clip (the trained size)",
    )
    parser.add_argument("--parts", action="store_true", help="what each block or level costs, in a row")
    parser.add_argument("--json", action="store_true", help="print JSON, in plain numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
