"""Import published or diffusers weights as a bundle, or export a bundle's weights: `python -m model.convert`.

    python -m model.convert import DiT-XL-2-256x256.pt models/dit-xl-2-256 --licence CC-BY-NC-4.0
    python -m model.convert import facebook-dit/ models/dit-xl-2-256 --licence CC-BY-NC-4.0
    python -m model.convert import stable-diffusion-3.5-medium/ models/sd3.5
    python -m model.convert export models/dit-xl-2-256 dit.pt --to official

Of a pipeline with texts the whole folder is taken, and its own modules are run. Any other imported bundle has
weights and a manifest; `python -m export.onnx` adds the graphs. Code that is pickled
in a file of weights is never run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console
from rich.table import Table

from ditserve.commands import command_line
from ditserve.model.spec.bundle import MANIFEST, WEIGHTS, Bundle, bundle_name
from ditserve.model.spec.command_line import guarded, named_path, positive
from ditserve.model.spec.output_folder import BUNDLE, check_folder
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_folder import holds_pipeline, read_pipeline, stated_licence
from ditserve.model.weights.files import export_weights, write_bundle
from ditserve.model.weights.imported import ImportFunction, ImportOptions
from ditserve.model.weights.imports import read_weights
from ditserve.model.weights.official import WeightsError


def run(options: argparse.Namespace) -> None:
    """Import or export as the command line says.

    Raises:
        ModelError, OSError: the source cannot be read or does not fit, or the target cannot be written.
    """
    if options.command == "export":
        export_weights(Bundle.open(options.bundle), options.target, options.to)
        print(f"wrote {options.target}")
    else:
        _import(options)


def _import(options: argparse.Namespace) -> None:
    check_folder(options.bundle, BUNDLE, apart=(options.source,))
    if not options.source.exists():
        raise WeightsError(
            f"{options.source} does not exist: pass a .pt or .safetensors file, or a diffusers folder"
        )
    if holds_pipeline(options.source):
        _import_pipeline(options)
        return
    if options.licence is None:
        raise WeightsError(f"{options.source} states no licence: give --licence (published: CC-BY-NC-4.0)")
    if options.tokens:
        raise WeightsError(f"{options.source} takes no texts: leave out --tokens")
    names = _class_names(options.classes) if options.classes else ()
    if names and options.num_classes not in (None, len(names)):
        raise WeightsError(
            f"{options.classes} has {len(names)} names, and --num-classes is {options.num_classes}"
        )
    wanted = ImportOptions(
        num_heads=options.heads,
        image_size=cast("tuple[int, int] | None", tuple(options.size) if options.size else None),
        function=options.function,
        num_classes=options.num_classes or len(names) or None,
        predicts_noise=options.predicts_noise,
    )
    found = read_weights(options.source, wanted)
    write_bundle(options.bundle, found, licence=options.licence, classes=names)
    parameters = sum(tensor.numel() for tensor in found.weights.values())
    for note in found.notes:
        print(note)
    print(f"wrote {options.bundle / MANIFEST} and {WEIGHTS}: {parameters / 1e6:.2f} M parameters")


def _import_pipeline(options: argparse.Namespace) -> None:
    """Bring in a whole pipeline, whose own modules are the network, and tell what was found."""
    ours = ("heads", "num_classes", "function", "classes", "predicts_noise")
    given = next((name for name in ours if getattr(options, name)), None)
    if given is not None:
        raise WeightsError(
            f"{options.source} is a pipeline, which says that itself: leave out --{given.replace('_', '-')}"
        )
    size = cast("tuple[int, int] | None", tuple(options.size) if options.size else None)
    found = read_pipeline(
        options.source,
        name=bundle_name(options.bundle),
        licence=options.licence or stated_licence(options.source),
        size=size,
        tokens=options.tokens,
    )
    table = Table(show_header=False, box=None)
    for part, what in found.notes:
        table.add_row(part, what)
    Console().print(table)
    manifest = write_pipeline_bundle(found, options.bundle)
    total = sum(entry.bytes for entry in manifest.files.values())
    print(f"wrote {options.bundle / MANIFEST} and {len(manifest.files)} files, {total / 1e6:,.0f} MB")


def _class_names(file: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError:
        raise WeightsError(f"{file} is no text in UTF-8: write one class name a line") from None


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.convert", lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("model.convert"),
        description="Bring published or diffusers weights in as a bundle, or take a bundle's weights out.",
    )
    commands: Any = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="published or diffusers weights → a bundle")
    bring.add_argument("source", type=named_path, help="a .pt or .safetensors file, or a folder of diffusers")
    bring.add_argument("bundle", type=named_path, help="the folder to write")
    bring.add_argument(
        "--licence",
        help="of the weights; the service shows it (published: CC-BY-NC-4.0). Of a pipeline its README's",
    )
    bring.add_argument("--tokens", type=positive, help="the most tokens of a prompt for a pipeline")
    bring.add_argument(
        "--function",
        choices=get_args(ImportFunction),
        help="what weights were trained as: of diffusers with its k/127 frequencies and epsilon, or as "
        "published; in the official layout a flow as SiT, REPA or LightningDiT trains it",
    )
    bring.add_argument("--heads", type=positive, help="number of heads, for a width that is not published")
    bring.add_argument(
        "--num-classes", type=positive, help="classes without the null class, if the file does not tell"
    )
    bring.add_argument(
        "--predicts-noise",
        action="store_true",
        help="import weights that do not look as if they predicted the noise, such as hardly trained ones",
    )
    bring.add_argument(
        "--size", type=positive, nargs=2, metavar=("H", "W"), help="latent size, if the file has no positions"
    )
    bring.add_argument("--classes", type=named_path, help="a text file of class names, one a line")
    out = commands.add_parser("export", help="a bundle's weights → a published or diffusers file")
    out.add_argument("bundle", type=named_path, help="the folder to read")
    out.add_argument("target", type=named_path, help="a .pt file (official) or a folder (diffusers)")
    out.add_argument("--to", choices=("official", "diffusers"), required=True, help="the layout to write")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
