"""`python -m service schema FOLDER`: print what a model takes, without starting anything."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ditserve.commands import command_line
from ditserve.model.spec.bundle import MANIFEST, PIPELINE, Bundle, bundle_name
from ditserve.model.spec.command_line import named_path, printable
from ditserve.model.spec.errors import BundleError, ModelError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.network_config import graph_multiples
from ditserve.model.spec.pipeline_config import INDEX
from ditserve.model.spec.pipeline_folder import holds_pipeline, read_pipeline, stated_licence
from ditserve.model.spec.prompt_limit import PromptLimit
from ditserve.model.spec.sizes import scaled
from ditserve.service.exit_statuses import MISCONFIGURED
from ditserve.service.formats import FORMATS, kind_of
from ditserve.service.http.answer_schemas import FactorOut, ModelOut
from ditserve.service.http.description import describe
from ditserve.service.settings import Settings


def run(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status: 2 for a folder that is no model."""
    options = _parser().parse_args(arguments)
    settings = Settings.load(program=command_line("service schema"))
    try:
        described = folder_schema(options.folder, settings)
    except (ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return MISCONFIGURED
    print(described.model_dump_json(indent=1) if options.json else schema_text(described))
    return 0


def folder_schema(folder: Path, settings: Settings) -> ModelOut:
    """Return what the model in a bundle, or in the folder of a diffusers pipeline, takes.

    Raises:
        ModelError: the folder holds neither, or says what cannot be.
    """
    manifest, pipeline = _open(folder)
    steps = graph_multiples(manifest.config)
    return describe(
        manifest,
        settings,
        size_steps=steps and scaled(steps, manifest.upscale),
        formats=FORMATS[kind_of(manifest)],
        text_tokens=PromptLimit(manifest.config, pipeline).tokens,
    )


def _open(folder: Path) -> tuple[Manifest, Path]:
    """Return the manifest of a model, and the folder of its pipeline if it is one."""
    if (folder / MANIFEST).is_file() or not (folder / INDEX).is_file():
        return Bundle.open(folder, verify=False).manifest, folder / PIPELINE
    if not holds_pipeline(folder):
        raise BundleError(
            f"{folder} is a pipeline whose weights become a network of ditserve: "
            f"{command_line('model.convert')} import {folder} BUNDLE makes the bundle, which has a schema"
        )
    found = read_pipeline(folder, name=bundle_name(folder), licence=stated_licence(folder))
    return found.manifest, folder


def schema_text(model: ModelOut) -> str:
    """Return the description of a model as lines for people."""
    rows = {"model": f"{model.name} {model.version}", "": model.description, "licence": model.licence}
    rows |= {f"condition {factor.name}": _classes(factor) for factor in model.factors}
    if model.text:
        counted = f", up to {model.text_tokens} tokens" if model.text_tokens is not None else ""
        rows["condition text"] = f"any{counted}"
    other = "no other as a whole" if model.size_step is None else f"others by multiples of {model.size_step}"
    rows["size"] = f"{model.size} pixels; {other}, larger ones in windows"
    if model.frames is not None:
        further = f"; others by multiples of {model.frames_step}" if model.frames_step else ""
        rows["frames"] = f"{model.frames}{further}, shown at {model.fps:g} a second unless asked"
    rows["files"] = ", ".join(model.formats)
    defaults = model.defaults
    counts = ", ".join(map(str, model.step_counts)) or f"1 to {model.limits.steps}"
    rows["steps"] = f"{counts}; {defaults.steps} by {defaults.sampler} ({defaults.grid}) unless asked"
    rows["samplers"] = ", ".join(model.samplers)
    rows["grids"] = ", ".join(model.grids)
    rows["guidance"] = _guidance(model)
    rungs = [f"{rung.name} ({rung.rows:g} rows)" for rung in model.ladder]
    rows["quality ladder"] = ", ".join(rungs) or "none: never drawn in fewer steps than asked"
    limits = model.limits
    rows["limits"] = (
        f"{limits.n} images a request, deadlines to {limits.deadline_ms} ms, "
        f"bodies to {limits.body_bytes} bytes"
    )
    width = max(map(len, rows))
    return "\n".join(printable(f"{name:{width}}  {value}".rstrip()) for name, value in rows.items())


def _classes(factor: FactorOut) -> str:
    shown = [str(name).partition(",")[0] for name in factor.classes[:3]]
    more = ", …" if len(factor.classes) > len(shown) else ""
    default = "" if factor.default is None else f"; {factor.default} unless asked"
    return f"{len(factor.classes)} classes: {', '.join(shown)}{more}{default}"


def _guidance(model: ModelOut) -> str:
    defaults = model.defaults
    if model.guidance == "embedded":
        return f"embedded, the network is told a scale: {defaults.guidance_embedded:g} unless asked"
    if model.guidance == "none":
        return "none"
    low, high = defaults.guidance_interval
    where = "" if (low, high) == (0, 1) else f" in the noise range {low:g} to {high:g}"
    return f"classifier-free, {defaults.guidance_scale:g}{where} unless asked"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("service schema"),
        description="Print what a model takes: conditions, sizes, steps, guidance kind and limits.",
    )
    parser.add_argument("folder", type=named_path, help="a bundle, or the folder of a diffusers pipeline")
    parser.add_argument("--json", action="store_true", help="print JSON, as GET /models does")
    return parser
