"""`python -m model.attention MODEL`: where a network looks, painted over the picture it makes.

    python -m model.attention model/zoo/emoji -c label=rocket --seed 3 -o rocket-attention.png

A column per chosen block with attention: above, how much every patch is attended to by all others; below, by the patch marked
with a frame. The forward pass never forms these weights; they are computed beside it from each block's input. In a U-Net
a patch is a position of the level that attends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ditserve.model.nets.factory import Network
from ditserve.model.nets.layers import Attention
from ditserve.model.nets.text import TextError
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import SampleError, embed_terms, parse_condition
from ditserve.model.sampling.sheet import picture_grid, to_pixels
from ditserve.model.spec.bundle import BundleError
from ditserve.model.spec.command_line import positive
from ditserve.model.spec.diffusion import grid
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel, LoadError

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Attention probabilities of one block, (N, heads, T, T) fp32, between the T = rows · columns places of its grid."""

    weights: Tensor
    rows: int
    columns: int

    def heat(self) -> npt.NDArray[np.float32]:
        """The first row's, mean over heads, (rows, columns, rows, columns): from the place that looks to the one seen."""
        mean = self.weights[0].mean(0)
        return mean.reshape(self.rows, self.columns, self.rows, self.columns).numpy()


@torch.no_grad()
def attention_maps(model: Network, x: Tensor, state: Sequence[Tensor]) -> list[AttentionMap]:
    """The attention of every block that has some, shallow to deep, on x (N, C, H, W) and its condition state.

    Where condition tokens are in the context they are left out, and what a place gives to the others sums to less than 1.
    """
    maps: list[AttentionMap] = []
    front = 2 if "in_context" in getattr(model.config, "plan", ()) else 0

    def look(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        weights = cast(Attention, module).weights(*arguments)[:, :, front:, front:]
        rows = round((weights.shape[-1] * x.shape[2] / x.shape[3]) ** 0.5)
        maps.append(AttentionMap(weights, rows, weights.shape[-1] // rows))

    hooks = [each.register_forward_pre_hook(look) for each in model.modules() if isinstance(each, Attention)]
    try:
        model.backbone(x, state)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def overlay(
    picture: Picture, heat: npt.NDArray[np.float32], zoom: int, frame: tuple[int, int] | None = None
) -> Picture:
    """`picture` (H, W, 3) enlarged, dimmed where `heat` (rows, columns) is low and reddened where it is high.

    `heat` is scaled by its largest value. `frame` marks a patch by its (row, column).
    """
    large = picture.repeat(zoom, 0).repeat(zoom, 1).astype(np.float32)
    scaled = Image.fromarray((heat / max(float(heat.max()), 1e-12)).astype(np.float32))
    warmth = np.asarray(scaled.resize((large.shape[1], large.shape[0]), Image.Resampling.BICUBIC)).clip(0, 1)[
        ..., None
    ]
    red = np.array([255.0, 40.0, 0.0], np.float32)
    out = (0.65 * (0.25 + 0.75 * warmth) * large + 0.35 * warmth * red).clip(0, 255).astype(np.uint8)
    if frame is not None:
        tall, wide = large.shape[0] // heat.shape[0], large.shape[1] // heat.shape[1]
        top, left = frame[0] * tall, frame[1] * wide
        patch = out[top : top + tall, left : left + wide]
        for edge in (patch[:1], patch[-1:], patch[:, :1], patch[:, -1:]):
            edge[:] = 255
    return out


def picture_of(opened: LoadedModel, embedding: Tensor, seed: int) -> Tensor:
    """The sample (1, C, H, W) of a condition embedding (1, D) and a seed, with the model's own defaults."""
    defaults, diffusion = opened.manifest.defaults, opened.manifest.diffusion
    steps = grid(defaults.grid, defaults.steps, diffusion.timesteps)
    table = step_table(defaults.solver, steps, opened.schedule)
    guidance = Guidance(defaults.guidance_scale, defaults.guidance_interval, diffusion.guidance_channels)
    denoiser = Denoiser(opened.network, opened.schedule, Conditions((embedding,)), guidance)
    *_, x0 = denoise(denoiser, table, [seed], clip_x0=diffusion.clip_x0)
    return x0


def run(options: argparse.Namespace) -> Image.Image:
    """Do what the command line says; see `main` for what can go wrong."""
    opened = load_model(options.model, data=options.data)
    model = opened.network
    height, width = model.config.image_size
    if opened.manifest.decoder != "identity":
        raise SampleError("attention is painted over pixels: this model works on latents")
    y, x = options.query or (height // 2, width // 2)
    if not (0 <= y < height and 0 <= x < width):
        raise SampleError(
            f"--query is a pixel in rows 0..{height - 1} and columns 0..{width - 1}, not {y} {x}"
        )
    if not 0 <= options.at <= 1:
        raise SampleError(f"--at is a fraction of the noise range in 0..1, not {options.at}")
    term = parse_condition(options.condition, opened.manifest.factors)
    embedding = embed_terms(model, [term], options.encoder)[0][None]
    x0 = picture_of(opened, embedding, options.seed)
    maps = _maps_at(opened, x0, embedding, options)
    chosen = [maps[k] for k in sorted({0, len(maps) // 2, len(maps) - 1})]
    picture = to_pixels(x0)[0]
    above = [overlay(picture, each.heat().mean((0, 1)), options.zoom) for each in chosen]
    places = [(y * each.rows // height, x * each.columns // width) for each in chosen]
    below = [
        overlay(picture, each.heat()[place], options.zoom, place)
        for each, place in zip(chosen, places, strict=True)
    ]
    plain = picture.repeat(options.zoom, 0).repeat(options.zoom, 1)
    return picture_grid(np.stack([plain, *above, plain, *below]), 1 + len(chosen))


@torch.no_grad()
def _maps_at(
    opened: LoadedModel, x0: Tensor, embedding: Tensor, options: argparse.Namespace
) -> list[AttentionMap]:
    """Of the picture (1, C, H, W) noised as far as `--at` says."""
    t = round(options.at * (opened.manifest.diffusion.timesteps - 1))
    drawn = torch.randn(x0.shape, generator=torch.Generator().manual_seed(options.seed))
    noisy = opened.schedule.alpha(t) * x0 + opened.schedule.sigma(t) * drawn
    state = opened.network.modulate(torch.tensor([float(t)]), embedding)
    return attention_maps(opened.network, noisy, state)


def main(arguments: Sequence[str]) -> int:
    """Command line; whatever is wrong is said in one sentence, with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m model.attention", description="Paint where a network looks over the picture it makes."
    )
    parser.add_argument("model", type=Path, help="a bundle, or a training run")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("attention.png"), help="the picture to write (attention.png)"
    )
    parser.add_argument(
        "-c", "--condition", default="", metavar="FACTOR=CLASS,…", help="such as label=cat,style=noto"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the picture (0)")
    parser.add_argument(
        "--query",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="a pixel whose patch looks; the middle one unless given",
    )
    parser.add_argument(
        "--at", type=float, default=0.4, help="how noisy the picture shown to the network is, 0..1 (0.4)"
    )
    parser.add_argument("--zoom", type=positive, default=4, help="pixels of the output per pixel (4)")
    parser.add_argument("--encoder", default="minilm", help="of text: a name or module:Class (minilm)")
    parser.add_argument("--data", type=Path, help="the training pictures of a run, if they moved")
    options = parser.parse_args(arguments)
    try:
        picture = run(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(options.out)
    except (SampleError, LoadError, BundleError, TextError, ValueError, OSError) as error:
        print(f"model.attention: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out} ({picture.width}×{picture.height}): the picture, then blocks shallow to deep")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
