"""`python -m service generate "strawberry, noto" -o strawberry.png`: an image from a running service.

The service's address is --url or DITSERVE_URL, the API key DITSERVE_API_KEY.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ditserve.commands import command_line
from ditserve.model.spec.command_line import finite
from ditserve.model.spec.manifest import Factor
from ditserve.model.spec.mixing import Combine
from ditserve.model.spec.text_encoder import spell_pictographs
from ditserve.service.client.client import Client
from ditserve.service.errors import ModelNotFound, ServiceError, from_wire
from ditserve.service.formats import CONTENT_TYPES
from ditserve.service.settings import ClientSettings
from ditserve.service.vocabulary import Vocabulary

# The format of a file, by the end of its name.
FORMATS = {f".{name}": name for name in CONTENT_TYPES} | {".jpg": "jpeg"}


def run(arguments: Sequence[str]) -> int:
    """Run the command.

    Return the exit status: 0, 1 when the service refuses or the job fails, 2 after a wrong flag.
    """
    settings = ClientSettings()
    options = _parser(settings.url).parse_args(arguments)
    if wrong := _wrong_flag(options):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        with Client(options.url, api_key=key) as client:
            for path in draw(client, options):
                print(path)
    except ServiceError as error:
        suggestions = error.extra.get("suggestions")
        hint = f" Closest: {', '.join(map(str, suggestions))}." if suggestions else ""
        print(f"error: {error.detail or error.title}{hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return 0


def _wrong_flag(options: argparse.Namespace) -> str:
    """Return what is wrong with the flags, "" if nothing is."""
    if options.output is not None and options.output.suffix.lower() not in FORMATS:
        return f"-o {options.output}: end it in {', '.join(FORMATS)}"
    if options.weights and len(options.weights) != len(options.prompt):
        return (
            f"--weights: give one for each of the {len(options.prompt)} prompts, not {len(options.weights)}"
        )
    return ""


def draw(client: Client, options: argparse.Namespace) -> list[Path]:
    """Submit a job, show its steps as they are taken, write the images, and return their paths.

    Raises:
        ServiceError: the service refuses, or the job fails.
        OSError: an image cannot be written.
    """
    model = _model(client, options.model)
    output = options.output or Path(f"image.{model['formats'][0]}")
    conditions = [_condition(model, prompt) for prompt in options.prompt]
    if options.weights:
        pairs = zip(conditions, options.weights, strict=True)
        conditions = [{**condition, "weight": weight} for condition, weight in pairs]
    fields = {
        "mix": options.mix,
        "steps": options.steps,
        "seed": options.seed,
        "sampler": options.sampler,
        "noise_levels": options.noise_levels,
        "guidance_embedded" if model["guidance"] == "embedded" else "guidance_scale": options.guidance,
        "guidance_interval": options.guidance_interval,
        "guidance_decay": options.guidance_decay,
        "negative_prompt": options.negative_prompt,
        "truncate_prompt": options.truncate_prompt,
        "adapters": options.adapter,
        "image": options.image,
        "mask": options.mask,
        "strength": options.strength,
        "size": options.size,
        "frames": options.frames,
        "fps": options.fps,
        "model": options.model,
        "windows": options.windows,
    }
    body: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    condition = conditions if len(conditions) > 1 else conditions[0]
    job_id = client.submit(condition, n=options.n, format=FORMATS[output.suffix.lower()], **body)
    try:
        _follow(client, job_id)
    except KeyboardInterrupt:
        client.cancel(job_id)
        raise
    paths = []
    for k in range(options.n):
        image = client.image(job_id, k)
        path = output
        if options.n > 1:
            path = path.with_stem(f"{path.stem}-{image.seed}")
        path.write_bytes(image.data)
        paths.append(path)
    return paths


def _model(client: Client, name: str | None) -> dict[str, Any]:
    """Return the description of the model of that name, None for the first. Raises `ServiceError`."""
    models: list[dict[str, Any]] = client.models()["models"]
    found = next((model for model in models if name in (None, model["name"])), None)
    if found is None:
        served = ", ".join(model["name"] for model in models)
        raise ModelNotFound(f"There is no model {name!r}; this service runs {served}.")
    return found


def _adapter(text: str) -> dict[str, Any]:
    """Return the adapter of a flag, such as "pixel-art=0.8"."""
    name, equals, scale = text.partition("=")
    if not equals:
        return {"name": name}
    try:
        return {"name": name, "scale": float(scale)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{scale!r} is no scale: write NAME=0.8") from None


def _picture(path: str) -> bytes:
    """Return the bytes of a picture's file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read: {error.strerror}") from None


def _condition(model: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Return the condition that a prompt names; a model that reads text is given it where it says more.

    Raises:
        UnknownCondition: the prompt names no class of the model's first factor.
    """
    # Fields of a later release are left alone.
    factors = [
        Factor(**{name: factor.get(name) for name in Factor.model_fields}) for factor in model["factors"]
    ]
    vocabulary = Vocabulary(factors)
    term = vocabulary.told(spell_pictographs(prompt)) if model["text"] else vocabulary.match(prompt)
    named = zip(factors, term.labels, strict=True)
    condition = {factor.name: label for factor, label in named if label is not None}
    return condition | ({"text": prompt} if term.text else {})


def _follow(client: Client, job_id: str) -> None:
    """Show the progress of a job until it is done. Raises the error of a job that fails or is cancelled."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("queued", total=None, note="")
        for event in client.events(job_id):
            data = event.data
            if event.kind in ("failed", "cancelled"):
                raise from_wire(data)
            if event.kind == "degraded":
                progress.update(task, description=f"busy: continuing on {data.get('rung')}")
            elif event.kind == "done":
                progress.update(task, description="done", completed=1, total=1, note="")
            elif "step" in data:
                note = f"step {data['step']} of {data['steps']}"
                progress.update(
                    task, description="drawing", completed=data["step"], total=data["steps"], note=note
                )


def _parser(url: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_line("service generate"), description="Ask a running service for images."
    )
    parser.add_argument(
        "prompt",
        nargs="+",
        help="what to draw: a class of each factor it should follow, or a text where the model reads text; "
        "several are combined",
    )
    parser.add_argument(
        "--mix",
        choices=get_args(Combine),
        help="how several prompts are combined: mixed (linear unless given), composed, or in layers",
    )
    parser.add_argument(
        "--weights", type=finite, nargs="+", metavar="W", help="of several prompts; negative in a composition"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file to write, image.png unless given, of a clip image.webp; several get their seed",
    )
    parser.add_argument("--model", help="a model that GET /models lists; the first there if not given")
    parser.add_argument("-n", type=int, default=1, help="number of images")
    _add_drawing_flags(parser)
    parser.add_argument("--url", default=url, help="address of the service")
    return parser


def _add_drawing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how the service draws, each a field of POST /generate."""
    parser.add_argument("--steps", type=int, help="denoising steps; the model's default if not given")
    parser.add_argument("--seed", type=int, help="image k is drawn from seed + k")
    parser.add_argument("--sampler", help="a sampler that GET /models lists")
    parser.add_argument(
        "--noise-levels",
        type=finite,
        nargs="+",
        metavar="LEVEL",
        help="the noise level of each step in place of --steps, such as 999 700 400 150",
    )
    parser.add_argument(
        "--guidance", type=finite, help="strength of guidance, of the kind that the model has"
    )
    parser.add_argument(
        "--guidance-interval",
        type=finite,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the part of the noise range, 0 to 1, in which guidance acts",
    )
    parser.add_argument(
        "--guidance-decay", type=finite, help="how fast guidance falls with noise, exp(-DECAY · t / T)"
    )
    parser.add_argument(
        "--negative-prompt", help="a text that guidance subtracts, where the model reads text"
    )
    parser.add_argument(
        "--adapter",
        type=_adapter,
        action="append",
        metavar="NAME[=SCALE]",
        help="a low-rank adapter of the model to draw with; may be given several times",
    )
    parser.add_argument("--image", type=_picture, metavar="FILE", help="a picture to start from")
    parser.add_argument(
        "--mask", type=_picture, metavar="FILE", help="what of it is drawn anew: white, or transparent"
    )
    parser.add_argument("--strength", type=finite, help="how far from the picture, above 0 up to 1")
    parser.add_argument(
        "--truncate-prompt",
        action="store_true",
        default=None,
        help="cut off what a text has beyond the model's last token",
    )
    parser.add_argument("--size", help="width x height in pixels, where the model has a choice")
    parser.add_argument("--frames", type=int, help="frames of a clip, where the model has a choice")
    parser.add_argument("--fps", type=finite, help="frames a second at which a clip plays")
    parser.add_argument(
        "--windows", action="store_true", default=None, help="denoise a larger --size in overlapping windows"
    )
