"""Sample a bundle or a training run offline, to a sheet: `python -m model.sample MODEL`.

python -m model.sample model/zoo/emoji -c label=red-apple,style=noto --count 8 -o apples.png
python -m model.sample runs/emoji -c label=cat -c label=dog --combine layers
python -m model.sample my-sd3 --prompt "a red bicycle" --steps 8 -o bicycle.png
python -m model.sample model/zoo/emoji -c label=lemon,style=noto --image strawberry.png --strength 0.6
python -m model.sample model/zoo/emoji --prompts prompts.txt --columns 12 -o sheet.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from ditserve.commands import command_line
from ditserve.model.nets.autoencoder import PictureAutoencoder, autoencoder_folder, open_decoder
from ditserve.model.nets.dit import DiT
from ditserve.model.sampling.denoise import Conditions, Denoiser, Guidance, denoise
from ditserve.model.sampling.prompt import (
    PromptTerm,
    SampleError,
    combine_conditions,
    embed_terms,
    encoder_of,
    parse_condition,
    prompt_terms,
    read_prompts,
)
from ditserve.model.sampling.sheet import (
    CHUNK,
    ConditionSheet,
    Sheet,
    captioned_grid,
    check_sheet,
    class_sheet,
    picture_grid,
    prompt_sheet,
    to_pixels,
)
from ditserve.model.sampling.source import SourceFiles
from ditserve.model.sampling.windows import WindowDenoiser
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import count, finite, guarded, named_path, picture_file, positive, share
from ditserve.model.spec.grids import GRIDS, choose_grid, noise_levels
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.mixing import Combine
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.sizes import AXES, Size
from ditserve.model.spec.solvers import SOLVERS, StepTable, step_table
from ditserve.model.spec.source import SourceLatent, walked_steps
from ditserve.model.spec.windows import windows_over
from ditserve.model.train.imported_pipeline import (
    encode_texts,
    imported_pipeline,
    open_pipeline,
    open_pipeline_decoder,
)
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel

# Samples of a condition, unless the command line says how many.
COUNT = 4


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model ready to be sampled: the terms of its pictures, an embedding (E,) of each, and the one that
    guidance subtracts; None: that of nothing.
    """

    loaded: LoadedModel
    decoder: PictureAutoencoder
    terms: Sequence[PromptTerm]
    parts: Sequence[Tensor]
    negative: Tensor | None

    def conditions(self, how: Combine, rows: int) -> Conditions:
        """Return the terms combined, for `rows` samples."""
        weights = [term.weight for term in self.terms]
        return combine_conditions(self.parts, weights, how, rows, negative=self.negative)


def sample(options: argparse.Namespace) -> Sheet:
    """Return the sheet that the command line asks for: samples of conditions, or one of each class.

    Raises:
        ModelError, ValueError: the model cannot be loaded, or an option is not possible for it.
    """
    bundle = imported_pipeline(options.model)
    opened = _open_own(options) if bundle is None else _open_pipeline(bundle, options)
    moves = opened.loaded.manifest.first_axis is not None
    files = SourceFiles(options.image, options.mask, options.strength, moves)
    loaded, terms, negative = opened.loaded, opened.terms, opened.negative
    model = loaded.network
    table, guidance = _sampling(loaded, options, files.share)
    size = _size(options, model.config.image_size)
    samples, columns, sheet = options.count or COUNT, options.columns or 8, None
    if options.prompts or not terms:
        sheet = _sheet(opened, options)
        samples, columns = len(sheet.captions), sheet.columns
    columns = min(columns, samples)
    check_sheet(samples, size)
    if options.windows:
        # A size that no window fits is refused here.
        windows_over(size, model.config.image_size)
    source = files.read(opened.decoder, size, next(model.parameters()).device)
    kind = WindowDenoiser if options.windows else Denoiser
    pixels = []
    with Progress(disable=not sys.stderr.isatty() and not options.progress) as progress:
        task = progress.add_task("sampling", total=samples * len(table))
        for start in range(0, samples, CHUNK):
            part = min(CHUNK, samples - start)
            if sheet is None:
                conditions = opened.conditions(options.combine, part)
            else:
                subtracted = None if negative is None else negative.expand(part, -1)
                conditions = Conditions((sheet.embeddings[start : start + part],), negative=subtracted)
            if source is not None and not options.windows:
                conditions = _told_first_frame(conditions, model, source)
            denoiser = kind(model, loaded.schedule, conditions, guidance)
            seeds = [options.seed + start + k for k in range(part)]
            clip = loaded.manifest.diffusion.clip_x0
            estimates = denoise(
                denoiser, table, seeds, size, clip_x0=clip, source=source, strength=files.share
            )
            for step, x0 in enumerate(estimates, 1):
                progress.advance(task, part)
                if step == len(table):
                    pixels.append(to_pixels(opened.decoder.decode(x0)))
    captioned = sheet and partial(captioned_grid, columns=columns, captions=sheet.captions)
    draw = captioned or partial(picture_grid, columns=columns)
    return Sheet.of(np.concatenate(pixels), draw, loaded.manifest.fps)


def _told_first_frame(conditions: Conditions, model: nn.Module, source: SourceLatent[Tensor]) -> Conditions:
    """Return the conditions with the first frame that a source is, where the network can be told it."""
    if source.mask is None or not isinstance(model, DiT):
        return conditions
    frame = source.latent[:, 0]
    return conditions.begun(model, frame) if tuple(frame.shape) == model.config.frame_shape else conditions


def _size(options: argparse.Namespace, own: Size) -> Size:
    """Return the size that the command line asks for, or the model's `own`. Raises `SampleError`."""
    if options.size and len(options.size) != len(own):
        raise SampleError(f"--size takes {AXES[len(own)]} of this model, which are {len(own)} numbers")
    return tuple(options.size or own)


def _open_own(options: argparse.Namespace) -> _Opened:
    """Open a model of this project's networks."""
    loaded = load_model(options.model, data=options.data)
    device = _device(options.device)
    loaded.network.to(device)
    decoder = open_decoder(loaded.manifest, autoencoder_folder(options.model, options.vae), device)
    terms = _terms(loaded.manifest, options)
    return _Opened(loaded, decoder, terms, *_embeddings(loaded, terms, options))


def _open_pipeline(bundle: Bundle, options: argparse.Namespace) -> _Opened:
    """Open an imported pipeline. Its texts are encoded first, so that their encoders are gone by then.

    Raises:
        SampleError: there is no prompt, or an option is not for this pipeline.
    """
    manifest, config = bundle.manifest, bundle.manifest.config
    assert isinstance(config, PipelineConfig)
    for option in ("vae", "encoder", "data"):
        if getattr(options, option) is not None:
            raise SampleError(
                f"--{option} is not for an imported pipeline, which brings its own: leave it out"
            )
    terms = _terms(manifest, options)
    if not terms:
        raise SampleError(f"{manifest.name} draws from texts: say what with --prompt")
    mixes = options.combine != "layers" and not config.text_mask
    if len(terms) > 1 and options.combine != "compose" and not mixes:
        raise SampleError("the conditions of this model can only be composed: choose --combine compose")
    guided = manifest.guidance == "classifier-free"
    if options.negative_prompt and not guided:
        raise SampleError("this model has no guidance that could subtract it: leave --negative-prompt out")
    # The network has places for its sizes alone.
    replace(config, image_size=tuple(options.size or config.image_size))
    device = _device(options.device)
    texts, negative = encode_texts(bundle, [term.text or "" for term in terms], options.negative_prompt)
    loaded = open_pipeline(bundle, device)
    told = options.scale if options.scale is not None else manifest.guidance_embedded or 0.0

    def embed(text: Tensor) -> Tensor:
        embedding = loaded.network.embed(torch.zeros(len(text), 0, dtype=torch.int64), text).to(device)
        if config.embedded_guidance:
            embedding[:, -1] = told
        return embedding

    subtracted = embed(negative)[0] if guided else None
    return _Opened(loaded, open_pipeline_decoder(bundle, device), terms, list(embed(texts)), subtracted)


def _terms(manifest: Manifest, options: argparse.Namespace) -> list[PromptTerm]:
    """Return the conditions of the command line, or those of `--prompts`."""
    if options.prompts and (options.condition or options.prompt):
        raise SampleError("--prompts is a sheet of its own: leave --condition and --prompt out")
    terms = [parse_condition(text, manifest.factors) for text in options.condition]
    prompts = read_prompts(options.prompts) if options.prompts else options.prompt
    return [*terms, *prompt_terms(prompts, manifest.factors)]


@torch.no_grad()
def _sheet(opened: _Opened, options: argparse.Namespace) -> ConditionSheet:
    """Return the sheet of `--prompts`, or else that of the model's classes.

    Raises:
        ValueError: `--count` is given where it would change nothing.
    """
    network, factors = opened.loaded.network, opened.loaded.manifest.factors
    if options.prompts:
        captions = read_prompts(options.prompts)
        return prompt_sheet(captions, opened.parts, options.count or 1, options.columns)
    if options.count and factors:
        raise ValueError("--count is of a condition: name one with -c, or leave it out for one of each class")
    columns = options.columns or (10 if factors else 8)
    return class_sheet(network, factors, options.count or COUNT, columns)


def _embeddings(
    loaded: LoadedModel, terms: Sequence[PromptTerm], options: argparse.Namespace
) -> tuple[list[Tensor], Tensor | None]:
    """Return the embedding (E,) of each term, and that of the negative prompt; None: there is none."""
    nothing = (None,) * len(loaded.manifest.factors)
    negatives = [PromptTerm(nothing, options.negative_prompt)] if options.negative_prompt else []
    wanted = [*terms, *negatives]
    if not wanted:
        return [], None
    encoder = encoder_of(loaded.manifest, wanted, options.encoder)
    embeddings = embed_terms(loaded.network, wanted, encoder)
    return embeddings[: len(terms)], embeddings[-1] if negatives else None


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    # torch raises AssertionError where it was built without the kind of device.
    except (RuntimeError, AssertionError):
        raise SampleError(f"there is no device {name!r} here: leave --device out to use the CPU") from None


def _sampling(loaded: LoadedModel, options: argparse.Namespace, walked: float) -> tuple[StepTable, Guidance]:
    """Return the steps and the guidance: as the command line says, or else the defaults of the model.

    Of the steps it is the last ones, the share `walked`.
    """
    own = loaded.network.config.image_size
    # A window has the model's own size, whatever the picture's.
    size = own if options.windows else options.size or own
    area = math.prod(size) / math.prod(own)
    defaults, schedule = loaded.manifest.defaults, loaded.schedule.for_area(area)
    told = loaded.manifest.guidance == "embedded"
    if options.scale not in (None, 1.0) and loaded.manifest.guidance == "none":
        raise SampleError(
            "no unconditional prediction of this model was trained, so it has no guidance: leave --scale out"
        )
    solver, steps = options.solver or defaults.solver, options.steps or defaults.steps
    kind = choose_grid(options.grid, stated=defaults.grid, solver=solver, steps=steps, schedule=schedule)
    levels = noise_levels(kind, steps, schedule)[-walked_steps(steps, walked) :]
    table = step_table(solver, levels, schedule, eta=options.eta)
    guidance = Guidance(
        scale=loaded.manifest.guidance_weight(None if told else options.scale),
        interval=tuple(options.interval or defaults.guidance_interval),
        channels=loaded.manifest.diffusion.guidance_channels,
        decay=options.decay,
        norm=loaded.manifest.diffusion.guidance_norm,
    )
    return table, guidance


def run(options: argparse.Namespace) -> None:
    """Write the picture to `--out` and say so."""
    sheet = sample(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    frames = f", {len(sheet.frames)} frames" if len(sheet.frames) > 1 else ""
    print(f"wrote {options.out} ({sheet.frames[0].width}×{sheet.frames[0].height}{frames})")


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; an error is one sentence on stderr and status 2."""
    options = _parser().parse_args(arguments)
    return guarded("model.sample", lambda: run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("model.sample"),
        description="Sample a model to one picture. What is not said is as the model's bundle has it.",
    )
    add = parser.add_argument
    add("model", type=named_path, help="a bundle, or a training run")
    add("-o", "--out", type=picture_file, default=Path("sample.png"), help="picture to write (sample.png)")
    add(
        "-c",
        "--condition",
        action="append",
        default=[],
        metavar="FACTOR=CLASS,…",
        help="such as label=cat,style=noto or text=…, with weight=W; several are combined; none: a sheet",
    )
    add(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a condition in words, read as the service reads it; -c text=TEXT is the text alone",
    )
    add(
        "--prompts",
        type=named_path,
        metavar="FILE",
        help="a sheet of a prompt a line, --count of each (1)",
    )
    add(
        "--combine",
        choices=get_args(Combine),
        default="linear",
        help="how several conditions meet: mixed on a line or an arc (linear, spherical), as a weighted sum "
        "of what each would do (compose), or from shallow blocks to deep ones (layers); linear unless given",
    )
    add("--count", type=positive, help=f"samples of the condition, or of a model without ({COUNT})")
    add("--seed", type=count, default=0, help="of the first sample; the others count up (0)")
    _add_sampling_flags(parser)
    add("--columns", type=positive, help="pictures side by side")
    add("--encoder", help="of text: a name or module:Class (the one it was trained with)")
    add("--vae", type=named_path, help="its autoencoder's folder, if the bundle has none")
    add("--data", type=named_path, help="the training pictures of a run, if they moved")
    add("--device", default="cpu", help="where it runs: cpu, cuda, cuda:1 (cpu)")
    add("--progress", action="store_true", help="show progress also where there is no terminal")
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the way from noise to picture."""
    add = parser.add_argument
    add("--steps", type=positive, help="steps from noise to picture")
    add("--solver", help=f"what takes the steps: {', '.join(SOLVERS)}")
    add("--grid", help=f"where the steps are: {', '.join(GRIDS)}, or timesteps such as 999,500,100")
    add("--eta", type=share, default=0.0, help="share of fresh noise in each step, 0..1 (0)")
    add("--scale", type=finite, help="guidance scale, or what the network is told of it; 1 is none")
    add(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="a text that guidance subtracts, instead of none",
    )
    add("--interval", type=share, nargs=2, metavar=("LOW", "HIGH"), help="where guidance acts, in 0..1")
    add("--decay", type=finite, default=0.0, help="how fast guidance falls with noise, exp(-DECAY·t/T) (0)")
    add(
        "--size",
        type=positive,
        nargs="+",
        metavar="SIDE",
        help="height and width in pixels or latent pixels, and before them the frames of a clip",
    )
    add(
        "--image",
        type=named_path,
        help="picture to start from, cut and scaled to the size; of clips, the first frame or a clip",
    )
    add("--mask", type=named_path, help="what is repainted of it, white in a picture of the same shape")
    add("--strength", type=share, help="share of the steps that are walked from it, the last ones (0.8)")
    add("--windows", action="store_true", help="draw --size in overlapping windows of the model's own size")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
