"""`python -m model.sample MODEL`: sample a bundle or a training run offline, to one picture.

python -m model.sample model/zoo/emoji -c label=red-apple,style=noto --count 8 -o apples.png
python -m model.sample runs/emoji -c label=cat -c label=dog --combine layers
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from model.autoencoder import Autoencoder, AutoencoderError, open_autoencoder
from model.bundle import BundleError, Factor
from model.denoise import Conditions, Denoiser, Guidance, denoise
from model.diffusion import GRIDS, Schedule, grid
from model.mixing import mixed
from model.network import Network
from model.opening import Opened, OpenError, open_model
from model.solvers import SOLVERS, StepTable, step_table
from model.text import TextError, open_encoder

Combine = Literal["linear", "spherical", "compose", "layers"]
CHUNK = 32  # samples denoised together


class SampleError(Exception):
    """A wish that cannot be met; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Term:
    """One condition of a picture: a class or None per factor, a sentence or none, and its weight among others."""

    labels: tuple[int | None, ...]
    text: str | None = None
    weight: float = 1.0


def to_pixels(x: Tensor) -> npt.NDArray[np.uint8]:
    """(N, 3, H, W) in [−1, 1] → uint8 (N, H, W, 3)."""
    pixels = (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(pixels: npt.NDArray[np.uint8], columns: int) -> Image.Image:
    """Pictures uint8 (N, H, W, 3) row by row in one picture, short last row padded with white."""
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    padded = np.full((rows * columns, height, width, 3), 255, np.uint8)
    padded[:n] = pixels
    tiled = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return Image.fromarray(tiled.reshape(rows * height, columns * width, 3))


def class_sheet(classes: Sequence[int], columns: int = 20) -> tuple[list[tuple[int | None, ...]], int]:
    """Labels of a sheet and its width: a column per class of the first factor, evenly spread, a row per class of the second."""
    if not classes:
        return [()] * columns, columns
    count = classes[0]
    chosen = [k * count // columns for k in range(columns)] if count > columns else list(range(count))
    others: list[list[int]] = [[other] for other in range(classes[1])] if len(classes) > 1 else [[]]
    rest = [None] * (len(classes) - 2)
    return [(one, *other, *rest) for other in others for one in chosen], len(chosen)


def sample_sheet(
    model: Network,
    schedule: Schedule,
    decoder: Autoencoder,
    *,
    steps: int = 20,
    guidance_scale: float = 2.0,
    seed: int = 0,
    columns: int = 20,
    clip_x0: bool = True,
) -> Image.Image:
    """A sheet of samples: classes of the first factor side by side, of the second below."""
    rows, width = class_sheet(model.config.classes, columns)
    table = step_table("ddim", grid("trailing", steps, schedule.timesteps), schedule)
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        embedding = model.embed(_labels(chunk, model.config.classes).to(device))
        denoiser = Denoiser(model, schedule, Conditions((embedding,)), Guidance(guidance_scale))
        seeds = [seed + start + k for k in range(len(chunk))]
        *_, x0 = denoise(denoiser, table, seeds, clip_x0=clip_x0)
        parts.append(to_pixels(decoder.decode(x0)))
    return picture_grid(np.concatenate(parts), width)


def parse_condition(text: str, factors: Sequence[Factor]) -> Term:
    """`label=cat,style=noto`, `text=a red fox`, each with an optional `weight=0.5`; what is left out is not given.

    Raises:
        SampleError: an unknown factor or class, or a weight that is no number.
    """
    given = dict(part.partition("=")[::2] for part in re.split(r",(?=\w+=)", text) if part)
    try:
        weight = float(given.pop("weight", "1"))
    except ValueError:
        raise SampleError(f"the weight in {text!r} is not a number") from None
    sentence = given.pop("text", None)
    names = [factor.name for factor in factors]
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise SampleError(f"the model has no factor {unknown[0]!r}; it has {', '.join(names) or 'none'}")
    return Term(tuple(_class(factor, given.get(factor.name)) for factor in factors), sentence, weight)


def _class(factor: Factor, name: str | None) -> int | None:
    if name is None:
        return None
    if name in factor.classes:
        return factor.classes.index(name)
    near = difflib.get_close_matches(name, factor.classes, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"for example {', '.join(factor.classes[:3])}"
    raise SampleError(f"{factor.name} has no class {name!r}; {hint}")


def _labels(rows: Sequence[Sequence[int | None]], classes: Sequence[int]) -> Tensor:
    filled = [[n if k is None else k for k, n in zip(row, classes, strict=True)] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), len(classes))


def embeddings(model: Network, terms: Sequence[Term], encoder: str) -> list[Tensor]:
    """One embedding (D,) per term; sentences are read by the named encoder.

    Raises:
        SampleError: a sentence for a model that takes none, or an encoder of another width.
        TextError: an encoder that is not installed.
    """
    text = None
    if any(term.text for term in terms):
        if not model.config.text_size:
            raise SampleError("this model takes no text: it was trained on labels alone")
        reader = open_encoder(encoder)
        if reader.size != model.config.text_size:
            raise SampleError(
                f"encoder {encoder} gives {reader.size} numbers, the model takes {model.config.text_size}"
            )
        text = torch.from_numpy(reader.encode([term.text or "" for term in terms]))
        text[[not term.text for term in terms]] = 0
    device = next(model.parameters()).device
    labels = _labels([term.labels for term in terms], model.config.classes)
    return list(model.embed(labels.to(device), None if text is None else text.to(device)))


def combine(parts: Sequence[Tensor], weights: Sequence[float], how: Combine, rows: int) -> Conditions:
    """Embeddings (D,) with weights as the conditions of `rows` samples."""
    if how == "linear" or how == "spherical":
        return Conditions((mixed(parts, weights, how).expand(rows, -1),))
    return Conditions(tuple(part.expand(rows, -1) for part in parts), tuple(weights), how)


def run(options: argparse.Namespace) -> Image.Image:
    """Do what the command line says; see `main` for what can go wrong."""
    opened = open_model(options.model, data=options.data)
    device = _device(options.device)
    model = opened.network.to(device)
    decoder = open_autoencoder(opened.manifest.decoder, options.vae, opened.manifest.latents, device)
    table, guidance = _plan(opened, options)
    size = tuple(options.size) if options.size else model.config.image_size
    terms = [parse_condition(text, opened.manifest.factors) for text in options.condition]
    if terms:
        parts = embeddings(model, terms, options.encoder)
        rows, columns = options.count, options.columns or min(options.count, 8)
    else:
        sheet, columns = class_sheet(model.config.classes, options.columns or 10)
        every = model.embed(_labels(sheet, model.config.classes).to(device))
        rows = len(sheet)
    pixels = []
    with Progress(disable=not sys.stderr.isatty() and not options.progress) as progress:
        task = progress.add_task("sampling", total=rows * len(table))
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            conditions = (
                combine(parts, [term.weight for term in terms], options.combine, count)
                if terms
                else Conditions((every[start : start + count],))
            )
            denoiser = Denoiser(model, opened.schedule, conditions, guidance)
            seeds = [options.seed + start + k for k in range(count)]
            estimates = denoise(denoiser, table, seeds, size, clip_x0=opened.manifest.diffusion.clip_x0)
            for step, x0 in enumerate(estimates, 1):
                progress.advance(task, count)
                if step == len(table):
                    pixels.append(to_pixels(decoder.decode(x0)))
    return picture_grid(np.concatenate(pixels), columns)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # the latter where torch was built without it
        raise SampleError(f"there is no device {name!r} here: leave --device out to use the CPU") from None


def _plan(opened: Opened, options: argparse.Namespace) -> tuple[StepTable, Guidance]:
    wanted = opened.manifest.defaults
    steps, kind = options.steps or wanted.steps, options.grid or wanted.grid
    places = grid(kind, steps, opened.manifest.diffusion.timesteps)
    table = step_table(options.solver or wanted.solver, places, opened.schedule, eta=options.eta)
    guidance = Guidance(
        scale=wanted.guidance_scale if options.scale is None else options.scale,
        interval=tuple(options.interval or wanted.guidance_interval),
        channels=opened.manifest.diffusion.guidance_channels,
        decay=options.decay,
    )
    return table, guidance


def main(arguments: list[str]) -> int:
    """Command line; whatever is wrong is said in one sentence, with status 2."""
    options = _parser().parse_args(arguments)
    try:
        picture = run(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(options.out)
    except (SampleError, OpenError, BundleError, TextError, AutoencoderError, ValueError, OSError) as error:
        print(f"model.sample: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out} ({picture.width}×{picture.height})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.sample",
        description="Sample a model to one picture. What is not said is as the model's bundle has it.",
    )
    add = parser.add_argument
    add("model", type=Path, help="a bundle, or a training run")
    add("-o", "--out", type=Path, default=Path("sample.png"), help="the picture to write (sample.png)")
    add(
        "-c",
        "--condition",
        action="append",
        default=[],
        metavar="FACTOR=CLASS,…",
        help="such as label=cat,style=noto or text=…, with weight=W; several are combined; none: a sheet",
    )
    add(
        "--combine",
        choices=get_args(Combine),
        default="linear",
        help="how several conditions meet: mixed on a line or an arc (linear, spherical), as a weighted sum of what each would do "
        "(compose), or from shallow blocks to deep ones (layers); linear unless given",
    )
    add("--count", type=positive, default=4, help="samples of the condition (4)")
    add("--seed", type=int, default=0, help="of the first sample; the others count up (0)")
    add("--steps", type=positive, help="steps from noise to picture")
    add("--solver", help=f"what takes the steps: {', '.join(SOLVERS)}")
    add("--grid", help=f"where the steps are: {', '.join(GRIDS)}, or timesteps such as 999,500,100")
    add("--eta", type=float, default=0.0, help="share of fresh noise in each step, 0..1 (0)")
    add("--scale", type=float, help="guidance scale; 1 is none")
    add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="where guidance acts, in 0..1")
    add("--decay", type=float, default=0.0, help="how fast guidance falls with noise, exp(-DECAY·t/T) (0)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels, of a latent model in latent pixels")
    add("--columns", type=positive, help="pictures side by side")
    add("--encoder", default="minilm", help="of text: a name or module:Class (minilm)")
    add("--vae", type=Path, help="diffusers AutoencoderKL folder, for latent models")
    add("--data", type=Path, help="the training pictures of a run, if they moved")
    add("--device", default="cpu", help="where it runs: cpu, cuda, cuda:1 (cpu)")
    add("--progress", action="store_true", help="show progress also where there is no terminal")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on, of a command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
