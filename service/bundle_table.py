"""`python -m service models [FOLDER …]`: list bundles with their state and size."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ditserve.commands import command_line
from ditserve.model.spec.bundle import BACKBONE, CONDITIONER, EMBEDDER, MANIFEST, Bundle
from ditserve.model.spec.command_line import named_path, printable
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import is_pipeline
from ditserve.model.spec.zoo import ZOO
from ditserve.service.exit_statuses import MISCONFIGURED


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """A model on disk. `state` begins with ready, weights only, pipeline or damaged."""

    folder: str
    name: str
    bytes: int
    state: str


def run(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status: 2 where a folder that was named holds no model."""
    options = _parser().parse_args(arguments)
    entries: dict[Path, BundleEntry] = {}
    try:
        for folder in options.folders or (ZOO, Path()):
            found = model_folders(folder)
            if options.folders and not found:
                raise BundleError(f"{folder} holds no bundle: it has no {MANIFEST}, nor a folder with one")
            entries = {path.resolve(): bundle_entry(path, verify=options.verify) for path in found} | entries
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISCONFIGURED
    rows = list(entries.values())
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else bundle_table(rows))
    return 0


def model_folders(folder: Path) -> list[Path]:
    """Return `folder` if it is a bundle or a pipeline, else such folders in it.

    Raises:
        BundleError: there is no such folder, or it cannot be read.
    """
    try:
        return [folder] if _is_model(folder) else sorted(filter(_is_model, folder.iterdir()))
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror}") from None


def _is_model(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or is_pipeline(folder)


def bundle_entry(folder: Path, *, verify: bool) -> BundleEntry:
    """Return what there is to tell of a bundle or a pipeline in `folder`."""
    if not (folder / MANIFEST).is_file():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        state = f"pipeline: served as it is, or {command_line('model.convert')} import {folder} BUNDLE"
        return BundleEntry(str(folder), folder.resolve().name, size, state)
    try:
        manifest = Bundle.open(folder, verify=verify).manifest
    except (BundleError, OSError) as error:
        return BundleEntry(str(folder), folder.resolve().name, 0, f"damaged: {error}")
    size = sum(entry.bytes for entry in manifest.files.values())
    return BundleEntry(str(folder), f"{manifest.name} {manifest.version}", size, _state(folder, manifest))


def _state(folder: Path, manifest: Manifest) -> str:
    graphs = {name.removesuffix(".onnx") for name in manifest.files if name.endswith(".onnx")}
    backbones = sorted(graph for graph in graphs if graph.startswith("backbone"))
    if BACKBONE in manifest.files and {EMBEDDER, CONDITIONER} <= manifest.files.keys():
        kinds = [graph.removeprefix("backbone").removeprefix(".") or "fp32" for graph in backbones]
        return f"ready: {', '.join(kinds)}"
    if isinstance(manifest.config, PipelineConfig):
        return "ready: torch"
    return f"weights only: {command_line('export.onnx')} {folder} --out {folder} makes its graphs"


def bundle_table(entries: Sequence[BundleEntry]) -> str:
    """Return a line for each model: its folder, name, megabytes and state."""
    if not entries:
        return "no bundles"
    cells = [(entry.folder, entry.name, f"{entry.bytes / 1e6:.1f} MB", entry.state) for entry in entries]
    widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:3]]
    return "\n".join(
        printable(f"{folder:{widths[0]}}  {name:{widths[1]}}  {size:>{widths[2]}}  {state}")
        for folder, name, size, state in cells
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("service models"), description="List bundles with their state and size."
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=named_path,
        metavar="FOLDER",
        help="a bundle or a pipeline, or a folder of such; none: those that ship, and of the current folder",
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not check files against their hashes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
