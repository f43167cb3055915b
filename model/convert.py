"""`python -m model.convert`: bring published or diffusers weights in as a bundle, and take a bundle's weights out.

    python -m model.convert import DiT-XL-2-256x256.pt models/dit-xl-2-256 --licence CC-BY-NC-4.0
    python -m model.convert import facebook-dit/ models/dit-xl-2-256 --licence CC-BY-NC-4.0 --function published
    python -m model.convert export models/dit-xl-2-256 dit.pt --to official

An imported bundle has weights and a manifest; `python -m export.onnx` gives it graphs. Files of others are read without
unpickling code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from ditserve.model.spec.bundle import (
    MANIFEST,
    WEIGHTS,
    Bundle,
    BundleError,
)
from ditserve.model.weights.files import (
    Import,
    read_weights,
    take_out,
    write_bundle,
)
from ditserve.model.weights.official import WeightsError


def main(arguments: list[str]) -> int:
    """Command line: `import SOURCE BUNDLE --licence L` and `export BUNDLE TARGET --to official|diffusers`."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "export":
            take_out(Bundle.open(options.bundle), options.target, options.to)
            print(f"wrote {options.target}")
            return 0
        size = tuple(options.size) if options.size else None
        wanted = Import(options.heads, cast("tuple[int, int] | None", size), options.function)
        if not options.source.exists():
            raise WeightsError(
                f"{options.source} does not exist: pass a .pt or .safetensors file, or a diffusers folder"
            )
        weights, config = read_weights(options.source, wanted)
        classes = options.classes.read_text().split("\n")[: config.classes[0]] if options.classes else ()
        write_bundle(options.bundle, weights, config, licence=options.licence, classes=classes)
    except (WeightsError, BundleError, OSError) as error:
        print(f"model.convert: {error}", file=sys.stderr)
        return 2
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"wrote {options.bundle / MANIFEST} and {WEIGHTS}: {parameters / 1e6:.2f} M parameters")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.convert",
        description="Bring published or diffusers weights in as a bundle, or take a bundle's weights out.",
    )
    commands: Any = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="published or diffusers weights → a bundle")
    bring.add_argument("source", type=Path, help="a .pt or .safetensors file, or a diffusers folder")
    bring.add_argument("bundle", type=Path, help="the folder to write")
    bring.add_argument(
        "--licence", required=True, help="of the weights; the service shows it (published: CC-BY-NC-4.0)"
    )
    bring.add_argument(
        "--function",
        choices=("published", "diffusers"),
        default="published",
        help="what diffusers weights were trained as: its k/127 frequencies and epsilon, or the published",
    )
    bring.add_argument("--heads", type=int, help="number of heads, for a width that is not published")
    bring.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="latent size, if the file has no positions"
    )
    bring.add_argument("--classes", type=Path, help="a text file of class names, one a line")
    out = commands.add_parser("export", help="a bundle's weights → a published or diffusers file")
    out.add_argument("bundle", type=Path, help="the folder to read")
    out.add_argument("target", type=Path, help="a .pt file (official) or a folder (diffusers)")
    out.add_argument("--to", choices=("official", "diffusers"), required=True, help="the layout to write")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
