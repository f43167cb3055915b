"""Show where a network attends, painted over the picture it makes: `python -m model.attention MODEL`.

    python -m model.attention model/zoo/emoji -c label=rocket --seed 3 -o rocket-attention.png

The sheet has the picture, then a column for each of three blocks: the first, the middle and the last that
attend. The upper row shows how much all patches together attend to each patch, the lower row how much one
patch, marked with a frame, does. The forward pass never forms these weights; they are computed beside it from
the input of each block. In a U-Net, a patch is a position of the level that attends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ditserve.commands import command_line
from ditserve.model.nets.attention_weights import observed_attention
from ditserve.model.nets.factory import Network
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import SampleError, embed_terms, encoder_of, parse_condition
from ditserve.model.sampling.sheet import check_sheet, picture_grid, to_pixels
from ditserve.model.spec.command_line import count, guarded, named_path, picture_file, positive, share
from ditserve.model.spec.diffusion import add_noise
from ditserve.model.spec.grids import noise_levels
from ditserve.model.spec.solvers import step_table
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """The attention probabilities of one block, (N, heads, T, T) fp32, where T = rows · columns patches."""

    weights: Tensor
    rows: int
    columns: int

    def heat(self) -> npt.NDArray[np.float32]:
        """Return the mean over the heads of the first sample, (rows, columns, rows, columns).

        The first two axes are the patch that attends, the last two the patch that is attended to.
        """
        mean = self.weights[0].mean(0)
        return mean.reshape(self.rows, self.columns, self.rows, self.columns).numpy()


@torch.no_grad()
def attention_maps(model: Network, x: Tensor, state: Sequence[Tensor]) -> list[AttentionMap]:
    """Return the attention of every block that has some, shallow to deep, on x (N, C, H, W) and its state.

    In-context condition tokens are left out, so the probabilities of a patch then sum to less than 1.
    """
    maps: list[AttentionMap] = []
    front = 2 if "in_context" in getattr(model.config, "plan", ()) else 0

    def record(_: int, whole: Tensor) -> None:
        weights = whole[:, :, front:, front:]
        rows = round((weights.shape[-1] * x.shape[2] / x.shape[3]) ** 0.5)
        maps.append(AttentionMap(weights, rows, weights.shape[-1] // rows))

    with observed_attention(model, record):
        model.backbone(x, state)
    return maps


def overlay(
    picture: Picture, heat: npt.NDArray[np.float32], zoom: int, frame: tuple[int, int] | None = None
) -> Picture:
    """Return `picture` (H, W, 3) enlarged `zoom` times, dim where `heat` is low and red where it is high.

    `heat` (rows, columns) is divided by its largest value. `frame` is the (row, column) of a patch to frame.
    """
    large = picture.repeat(zoom, 0).repeat(zoom, 1).astype(np.float32)
    scaled = Image.fromarray((heat / max(float(heat.max()), 1e-12)).astype(np.float32))
    resized = scaled.resize((large.shape[1], large.shape[0]), Image.Resampling.BICUBIC)
    warmth = np.asarray(resized).clip(0, 1)[..., None]
    red = np.array([255.0, 40.0, 0.0], np.float32)
    out = (0.65 * (0.25 + 0.75 * warmth) * large + 0.35 * warmth * red).clip(0, 255).astype(np.uint8)
    if frame is not None:
        tall, wide = large.shape[0] // heat.shape[0], large.shape[1] // heat.shape[1]
        top, left = frame[0] * tall, frame[1] * wide
        patch = out[top : top + tall, left : left + wide]
        for edge in (patch[:1], patch[-1:], patch[:, :1], patch[:, -1:]):
            edge[:] = 255
    return out


def draw_sample(loaded: LoadedModel, embedding: Tensor, seed: int) -> Tensor:
    """Return the sample (1, C, H, W) of an embedding (1, D) and a seed, with the model's defaults."""
    defaults, diffusion = loaded.manifest.defaults, loaded.manifest.diffusion
    levels = noise_levels(defaults.grid, defaults.steps, loaded.schedule)
    table = step_table(defaults.solver, levels, loaded.schedule)
    guidance = Guidance(defaults.guidance_scale, defaults.guidance_interval, diffusion.guidance_channels)
    denoiser = Denoiser(loaded.network, loaded.schedule, Conditions((embedding,)), guidance)
    *_, x0 = denoise(denoiser, table, [seed], clip_x0=diffusion.clip_x0)
    return x0


def paint(options: argparse.Namespace) -> Image.Image:
    """Return the sheet that the command line asks for.

    Raises:
        ModelError: the model cannot be loaded or works on latents, or an option is not possible for it.
    """
    loaded = load_model(options.model, data=options.data)
    model = loaded.network
    if loaded.manifest.first_axis is not None:
        raise SampleError("attention is painted over one picture: this model draws clips or volumes")
    height, width = model.config.image_size
    if loaded.manifest.decoder != "identity":
        raise SampleError("attention is painted over pixels: this model works on latents")
    if getattr(model.config, "merge_tokens", 0.0):
        raise SampleError("merged tokens have no place in a picture: paint the model without merge_tokens")
    y, x = options.query or (height // 2, width // 2)
    check_sheet(1, (height * options.zoom, width * options.zoom))
    if not (0 <= y < height and 0 <= x < width):
        raise SampleError(
            f"--query is a pixel in rows 0..{height - 1} and columns 0..{width - 1}, not {y} {x}"
        )
    term = parse_condition(options.condition, loaded.manifest.factors)
    embedding = embed_terms(model, [term], encoder_of(loaded.manifest, [term], options.encoder))[0][None]
    x0 = draw_sample(loaded, embedding, options.seed)
    maps = _maps_of_noised(loaded, x0, embedding, options)
    if not maps:
        raise SampleError(
            "no block of this network has tokens that attend to tokens: there is nothing to paint"
        )
    chosen = [maps[k] for k in sorted({0, len(maps) // 2, len(maps) - 1})]
    picture = to_pixels(x0)[0]
    above, below = [], []
    for attention in chosen:
        heat = attention.heat()
        patch = y * attention.rows // height, x * attention.columns // width
        above.append(overlay(picture, heat.mean((0, 1)), options.zoom))
        below.append(overlay(picture, heat[patch], options.zoom, patch))
    plain = picture.repeat(options.zoom, 0).repeat(options.zoom, 1)
    return picture_grid(np.stack([plain, *above, plain, *below]), 1 + len(chosen))


@torch.no_grad()
def _maps_of_noised(
    loaded: LoadedModel, x0: Tensor, embedding: Tensor, options: argparse.Namespace
) -> list[AttentionMap]:
    """Return the attention maps of the picture `x0` (1, C, H, W), noised as far as `--at` says."""
    schedule = loaded.schedule
    level = float(schedule.process.trained_levels(options.at))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(options.seed))
    noisy = add_noise(float(schedule.alpha(level)), float(schedule.sigma(level)), x0, noise)
    state = loaded.network.modulate(torch.from_numpy(schedule.told([level])), embedding)
    return attention_maps(loaded.network, noisy, state)


def run(options: argparse.Namespace) -> None:
    """Write the sheet to `--out` and say so."""
    picture = paint(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.out)
    print(f"wrote {options.out} ({picture.width}×{picture.height}): the picture, then blocks shallow to deep")


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.attention", lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("model.attention"),
        description="Paint where a network looks over the picture it makes.",
    )
    add = parser.add_argument
    add("model", type=named_path, help="a bundle, or a training run")
    add(
        "-o",
        "--out",
        type=picture_file,
        default=Path("attention.png"),
        help="the picture to write",
    )
    add("-c", "--condition", default="", metavar="FACTOR=CLASS,…", help="such as label=cat,style=noto")
    add("--seed", type=count, default=0, help="of the picture (0)")
    add(
        "--query",
        type=count,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="a pixel whose patch looks; the middle one unless given",
    )
    add("--at", type=share, default=0.4, help="how noisy the picture shown to the network is, 0..1 (0.4)")
    add("--zoom", type=positive, default=4, help="pixels of the output per pixel (4)")
    add("--encoder", help="of text: a name or module:Class (the one it was trained with)")
    add("--data", type=named_path, help="the training pictures of a run, if they moved")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
