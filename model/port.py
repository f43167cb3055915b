"""`python -m model.port`: bring published or diffusers weights in as a bundle, and take a bundle's weights out.

    python -m model.port import DiT-XL-2-256x256.pt models/dit-xl-2-256 --licence CC-BY-NC-4.0
    python -m model.port import facebook-dit/ models/dit-xl-2-256 --licence CC-BY-NC-4.0 --function published
    python -m model.port export models/dit-xl-2-256 dit.pt --to official

An imported bundle has weights and a manifest; `python -m export.onnx` gives it graphs. Files of others are read without
unpickling code.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.bundle import (
    MANIFEST,
    WEIGHTS,
    Bundle,
    BundleError,
    Defaults,
    DiffusionSpec,
    Factor,
    Manifest,
    StateTensor,
    write_atomic,
    write_manifest,
)
from model.config import DiTConfig
from model.weights import Weights, WeightsError, from_official, to_official
from model.weights_diffusers import Function, from_diffusers, to_diffusers

DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Guidance and sampler of the published 256 px results are 250 steps of DDPM at 1.5; 50 of DDIM are as good (FID 2.26).
DEFAULTS = Defaults(steps=50, solver="ddim", grid="leading", guidance_scale=1.5, guidance_interval=(0.0, 1.0))


@dataclass(frozen=True, slots=True)
class Import:
    """What the file cannot say: heads and size of unpublished shapes, and for diffusers which function is meant."""

    num_heads: int | None = None
    image_size: tuple[int, int] | None = None
    function: Function = "published"


def read_state(path: Path) -> Weights:
    """The tensors of a .safetensors, .pt, .pth or .bin file; of a training checkpoint, the averaged weights ("ema").

    Raises:
        WeightsError: unreadable, not plain tensors, or pickled code, which is never run.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # the published trainer pickles its arguments
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights: {reason}") from None
    for part in ("ema", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(part), dict):
            stored = stored[part]
            break
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise WeightsError(f"{path} holds no state dict: it must map names to tensors")
    return cast(Weights, stored)


def read_weights(path: Path, options: Import) -> tuple[Weights, DiTConfig]:
    """Weights and configuration from a published file, or a diffusers folder, pipeline folder or weights file.

    Raises:
        WeightsError: there is nothing to read, or it does not fit.
    """
    folder = next(
        (place for place in (path / "transformer", path) if (place / "config.json").is_file()), None
    )
    if path.is_file() and path.name in DIFFUSERS_WEIGHTS:
        folder = path.parent
    if folder is None:
        return from_official(read_state(path), num_heads=options.num_heads, image_size=options.image_size)
    file = next((folder / name for name in DIFFUSERS_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} holds neither {' nor '.join(DIFFUSERS_WEIGHTS)}")
    try:
        fields = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'} cannot be read: {error}") from None
    return from_diffusers(read_state(file), fields, function=options.function)


def write_bundle(
    target: Path,
    weights: Mapping[str, Tensor],
    config: DiTConfig,
    *,
    licence: str,
    classes: Sequence[str] = (),
) -> Manifest:
    """A bundle of weights alone, for a latent model trained as published: linear schedule, noise prediction.

    Raises:
        WeightsError: `classes` are not as many as the model's, or the folder's name cannot be a bundle's.
    """
    names = tuple(classes) or tuple(str(k) for k in range(config.classes[0]))
    if len(names) != config.classes[0]:
        raise WeightsError(f"{len(names)} class names for a model of {config.classes[0]} classes")
    try:
        manifest = Manifest(
            name=re.sub(r"[^A-Za-z0-9._-]", "-", target.name),
            version="1",
            description=f"Diffusion Transformer over {config.image_size[0]}×{config.image_size[1]} latents, imported",
            config=config,
            diffusion=DiffusionSpec(
                schedule="linear",
                prediction="epsilon",
                learn_sigma=config.learn_sigma,
                clip_x0=False,
                guidance_channels=3 if config.in_channels > 3 else None,
            ),
            factors=(Factor(name="label", classes=names),),
            decoder="sd-vae" if config.in_channels == 4 else "identity",
            embedding_size=config.hidden_size,
            state=tuple(StateTensor(name=name, shape=shape) for name, shape in config.state()),
            defaults=DEFAULTS,
            licence=licence,
        )
    except ValidationError as error:
        raise WeightsError(f"{target} cannot be a bundle: {error.errors()[0]['msg']}") from None
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / WEIGHTS)
    write_manifest(target, manifest)
    return manifest


def take_out(bundle: Bundle, target: Path, layout: str) -> None:
    """Write a bundle's weights as a published .pt file ("official") or as a diffusers folder ("diffusers").

    Raises:
        WeightsError: the model is none the layout can hold.
        BundleError: the bundle has no weights.
    """
    weights, config = load_file(bundle.file(WEIGHTS)), bundle.manifest.config
    if not isinstance(config, DiTConfig):
        raise WeightsError(f"{bundle.path} holds a U-Net: the layouts are those of a DiT")
    if layout == "official":
        state = to_official(weights, config)
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, target)
        return
    state, fields = to_diffusers(weights, config)
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / DIFFUSERS_WEIGHTS[0])
    write_atomic(target / "config.json", (json.dumps(fields, indent=2) + "\n").encode())


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
        print(f"model.port: {error}", file=sys.stderr)
        return 2
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"wrote {options.bundle / MANIFEST} and {WEIGHTS}: {parameters / 1e6:.2f} M parameters")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.port",
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
