"""Sample sheets: decoded pictures side by side in one image, or clips and volumes in a moving one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ditserve.model.nets.autoencoder import PictureDecoder
from ditserve.model.nets.factory import Network
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import label_tensor
from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.grids import even_grid, noise_levels
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.sizes import Size, size_name
from ditserve.model.spec.solvers import step_table

LARGEST = 1 << 30  # bytes of one picture
STRIP = 14  # pixels of a caption's line
WIDEST = 120
LINES = 2  # of a caption, at most
CHUNK = 32  # samples denoised together
SLICES = 8.0  # of a volume, shown in a second
MOVING = (".png", ".webp")  # the formats of files that hold a moving sheet
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Sheet:
    """An image of samples side by side, or one image a frame of clips, `fps` in a second."""

    frames: tuple[Image.Image, ...]
    fps: float = SLICES

    @classmethod
    def of(
        cls,
        pixels: npt.NDArray[np.uint8],
        draw: Callable[[npt.NDArray[np.uint8]], Image.Image],
        fps: float | None = None,
    ) -> Sheet:
        """Return the sheet of pictures uint8 (N, H, W, 3), or clips (N, F, H, W, 3), that `draw` arranges."""
        moments = (pixels,) if pixels.ndim == 4 else pixels.swapaxes(0, 1)
        return cls(tuple(draw(moment) for moment in moments), fps or SLICES)

    def save(self, file: Path) -> None:
        """Write the sheet; its frames follow one another and begin again.

        Raises:
            ValueError: the format of a moving sheet has no frames.
        """
        first, *others = self.frames
        if not others:
            first.save(file)
            return
        if file.suffix.lower() not in MOVING:
            raise ValueError(f"clips are written to {' or '.join(MOVING)} files, not {file.name}")
        first.save(file, save_all=True, append_images=others, duration=1000 / self.fps, loop=0, lossless=True)


def to_pixels(x: Tensor) -> npt.NDArray[np.uint8]:
    """Return pictures (N, 3, H, W) in [−1, 1] as uint8 (N, H, W, 3), and clips as (N, F, H, W, 3)."""
    pixels = (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(1, -1).cpu().numpy()


def picture_grid(pixels: npt.NDArray[np.uint8], columns: int) -> Image.Image:
    """Return pictures uint8 (N, H, W, 3) row by row in one image; a short last row is padded with white."""
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    padded = np.full((rows * columns, height, width, 3), 255, np.uint8)
    padded[:n] = pixels
    tiled = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return Image.fromarray(tiled.reshape(rows * height, columns * width, 3))


def check_sheet(count: int, size: Size) -> None:
    """Refuse pictures that take more than `LARGEST` bytes side by side.

    Raises:
        ValueError: there are too many, or they are too large.
    """
    if count * math.prod(size) * 3 > LARGEST:
        raise ValueError(
            f"{count} pictures of {size_name(size)} take more than {LARGEST >> 20} MiB in one: ask for less"
        )


def captioned_grid(pixels: npt.NDArray[np.uint8], columns: int, captions: Sequence[str]) -> Image.Image:
    """Return pictures row by row as `picture_grid` does, each above its caption.

    A picture narrower than a caption stands in a wider cell, up to `WIDEST` pixels. A caption that is wider
    still takes two lines, and is cut off there.
    """
    n, height, width, _ = pixels.shape
    font = ImageFont.load_default()
    cell = max(width, min(WIDEST, math.ceil(max((font.getlength(text) for text in captions), default=0)) + 4))
    broken = [_lines(text, cell, font) for text in captions]
    rows, tall = -(-n // columns), height + STRIP * max(map(len, broken), default=1)
    sheet = Image.new("RGB", (columns * cell, rows * tall), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, lines) in enumerate(zip(pixels, broken, strict=True)):
        left, top = k % columns * cell, k // columns * tall
        sheet.paste(Image.fromarray(picture), (left + (cell - width) // 2, top))
        for line, text in enumerate(lines):
            place = left + (cell - font.getlength(text)) / 2, top + height + line * STRIP
            draw.text(place, text, "black", font)
    return sheet


def _lines(text: str, width: int, font: Font) -> list[str]:
    """Break a caption between words into at most `LINES` lines of so many pixels; the last may be cut off."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width and len(lines) < LINES:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_cut(line, width, font) for line in lines]


def _cut(text: str, width: int, font: Font) -> str:
    while font.getlength(text) > width:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text


def sheet_captions(rows: Sequence[Sequence[int | None]], factors: Sequence[Factor]) -> list[str]:
    """Return the class names of each row of labels, in one line."""
    return [
        ", ".join(factor.classes[k] for factor, k in zip(factors, row, strict=True) if k is not None)
        for row in rows
    ]


def sheet_labels(classes: Sequence[int], columns: int = 20) -> tuple[list[tuple[int | None, ...]], int]:
    """Return the labels of a sheet's pictures, row by row, and the number of its columns.

    `classes` is the number of classes of each factor. A column is a class of the first factor (at most
    `columns`, evenly spread), a row a class of the second. Further factors get no label.
    """
    if not classes:
        return [()] * columns, columns
    count = classes[0]
    chosen = [k * count // columns for k in range(columns)] if count > columns else list(range(count))
    seconds: list[list[int]] = [[second] for second in range(classes[1])] if len(classes) > 1 else [[]]
    rest = [None] * (len(classes) - 2)
    return [(first, *second, *rest) for second in seconds for first in chosen], len(chosen)


@dataclass(frozen=True, slots=True)
class ConditionSheet:
    """Samples of different conditions: the embedding (E,) and the caption of each, and the columns."""

    embeddings: Tensor
    captions: Sequence[str]
    columns: int


def prompt_sheet(
    prompts: Sequence[str], embeddings: Sequence[Tensor], count: int, columns: int | None
) -> ConditionSheet:
    """Return a sheet with `count` samples of each prompt, side by side, of the prompts' embeddings (E,)."""
    each = torch.stack(list(embeddings)).repeat_interleave(count, dim=0)
    captions = [prompt for prompt in prompts for _ in range(count)]
    return ConditionSheet(each, captions, columns or (count if count > 1 else 8))


def class_sheet(model: Network, factors: Sequence[Factor], count: int, columns: int) -> ConditionSheet:
    """Return a sheet as `sheet_labels` has it, or one of `count` samples of a model without classes."""
    classes = model.config.classes
    rows, width = sheet_labels(classes, columns) if classes else ([()] * count, columns)
    labels = label_tensor(rows, classes).to(next(model.parameters()).device)
    return ConditionSheet(model.embed(labels), sheet_captions(rows, factors), width)


@torch.no_grad()
def sheet_samples(
    model: Network,
    schedule: Schedule,
    *,
    steps: int = 20,
    guidance_scale: float = 2.0,
    seed: int = 0,
    clip_x0: bool = True,
) -> Tensor:
    """Return the samples (N, C, H, W) of a sheet: one for each row of `sheet_labels`.

    Sample k has the seed `seed` + k; the solver is DDIM.
    """
    rows, _ = sheet_labels(model.config.classes)
    table = step_table("ddim", noise_levels(even_grid(schedule), steps, schedule), schedule)
    device = next(model.parameters()).device
    samples = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        embedding = model.embed(label_tensor(chunk, model.config.classes).to(device))
        denoiser = Denoiser(model, schedule, Conditions((embedding,)), Guidance(guidance_scale))
        seeds = [seed + start + k for k in range(len(chunk))]
        *_, x0 = denoise(denoiser, table, seeds, clip_x0=clip_x0)
        samples.append(x0)
    return torch.cat(samples)


@torch.no_grad()
def draw_sheet(
    samples: Tensor, decoder: PictureDecoder, factors: Sequence[Factor], fps: float | None = None
) -> Sheet:
    """Draw `sheet_samples`: classes of the first factor side by side, of the second below each other.

    `factors` name the classes, which stand below the pictures; `fps` is the pace of clips.
    """
    rows, width = sheet_labels([len(factor.classes) for factor in factors])
    pictures = [to_pixels(decoder.decode(chunk)) for chunk in samples.split(CHUNK)]
    captions = sheet_captions(rows, factors)
    return Sheet.of(np.concatenate(pictures), lambda pixels: captioned_grid(pixels, width, captions), fps)
