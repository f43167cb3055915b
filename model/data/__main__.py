"""`python -m model.data COMMAND`: make, describe and encode data sets."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ditserve.commands import command_line
from ditserve.model.data import animated_emoji, emoji
from ditserve.model.data.extraction import EncoderSettings, extract, plan_extraction, progress_of, write_index
from ditserve.model.data.labels import select_examples
from ditserve.model.data.latents import INDEX
from ditserve.model.data.sources import check_corrupt_limit, read_source
from ditserve.model.data.summary import contact_sheet, summarise
from ditserve.model.spec.command_line import count, guarded, named_path, picture_file, positive
from ditserve.model.spec.output_folder import LATENTS, check_folder
from ditserve.model.spec.sizes import size_name


def main(arguments: Sequence[str]) -> int:
    """Run a command and return the exit status; a mistake is one sentence on stderr and status 2."""
    parser = argparse.ArgumentParser(prog=command_line("model.data"))
    commands = parser.add_subparsers(required=True)
    _emoji_arguments(
        commands.add_parser("emoji", help="render the emoji set from npm packages of SVG drawings")
    )
    _animated_emoji_arguments(
        commands.add_parser("animated-emoji", help="cut clips of animated emoji from npm packages")
    )
    _describe_arguments(commands.add_parser("describe", help="count what a data set holds; writes nothing"))
    _latents_arguments(
        commands.add_parser("latents", help="encode pictures by an autoencoder, once for all epochs")
    )
    options = parser.parse_args(arguments)
    return guarded("model.data", lambda: options.run(options))


def _emoji_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=positive, default=64, help="picture size in pixels")
    parser.add_argument("--out", type=named_path, help="target file (default data/emoji<size>.npz)")
    _tarballs_argument(parser)
    parser.set_defaults(run=_emoji)


def _animated_emoji_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=positive, default=48, help="size of a frame in pixels (48)")
    parser.add_argument("--frames", type=positive, default=8, help="frames of a clip, over all of it (8)")
    parser.add_argument(
        "--out", type=named_path, help="target file (default data/animated-emoji<frames>x<size>.npz)"
    )
    _tarballs_argument(parser)
    parser.set_defaults(run=_animated_emoji)


def _tarballs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tarballs",
        type=named_path,
        default=Path("data/npm"),
        help="folder of npm tarballs, filled if needed",
    )


def _emoji(options: argparse.Namespace) -> None:
    target = options.out or Path(f"data/emoji{options.size}.npz")
    emoji.build(target, options.size, options.tarballs)
    _tell(target)


def _animated_emoji(options: argparse.Namespace) -> None:
    target = options.out or Path(f"data/animated-emoji{options.frames}x{options.size}.npz")
    animated_emoji.build(target, options.size, options.frames, options.tarballs)
    _tell(target)


def _tell(target: Path) -> None:
    print(f"wrote {target} and its card, {target.with_suffix('.md')} and {target.with_suffix('.json')}")


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=named_path)
    parser.add_argument(
        "--sheet", type=picture_file, metavar="PNG", help="also save some of the pictures, side by side"
    )
    parser.set_defaults(run=_describe)


def _describe(options: argparse.Namespace) -> None:
    source = read_source(options.path, captions=True)
    for line in summarise(source):
        print(line)
    if options.sheet:
        contact_sheet(source, options.sheet)
    # End with the error that training would end with, if it would.
    captioned = any(source.catalogue.captions)
    examples = select_examples(source.catalogue, options.path, captioned=captioned, left_out=source.left_out)
    for line in examples.left_out:
        print(f"  {line}")


def _latents_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=named_path, help="any data set of pictures")
    parser.add_argument(
        "--autoencoder",
        type=named_path,
        required=True,
        help="folder of an AutoencoderKL of diffusers",
    )
    parser.add_argument(
        "--out", type=named_path, required=True, help="folder for the shards; finished ones in it are kept"
    )
    parser.add_argument(
        "--size", type=_size, help="crop pictures to N or HxW pixels; not needed if all have one size"
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes")
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="K/N",
        help="do the K-th of N parts, on the K-th of N machines",
    )
    parser.add_argument("--shard", type=positive, default=256, help="pictures in a shard")
    parser.add_argument("--batch", type=positive, default=16, help="pictures encoded at once")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--corrupt-limit", type=count, default=0, help="how many unreadable pictures may be left out"
    )
    parser.set_defaults(run=_latents)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return positive(height), positive(width or height)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K in 1..N")
    return int(match[1]), int(match[2])


def _latents(options: argparse.Namespace) -> None:
    check_folder(options.out, LATENTS, apart=(options.source, options.autoencoder))
    threads = max(1, (os.cpu_count() or 1) // options.workers) if options.workers > 1 else 0
    job = plan_extraction(
        options.source,
        options.autoencoder,
        options.out,
        size=options.size,
        settings=EncoderSettings(options.shard, options.batch, options.device, threads),
    )
    part, parts = options.part
    finished, missing = progress_of(job, job.shards[part - 1 :: parts])
    skipped = [message for shard in finished for message in shard.skipped]
    done = sum(shard.count for shard in finished) + len(skipped)
    columns = (
        TextColumn("encode"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = done + sum(len(job.rows(number)) for number in missing)
        task = progress.add_task("", total=total, completed=done, rate="")
        began, encoded = time.monotonic(), 0
        check_corrupt_limit(options.source, skipped, options.corrupt_limit)
        for shard in extract(job, missing, workers=options.workers):
            skipped += shard.skipped
            check_corrupt_limit(options.source, skipped, options.corrupt_limit)
            encoded += shard.count + len(shard.skipped)
            rate = f"{encoded / (time.monotonic() - began):.1f} images/s"
            progress.update(task, completed=done + encoded, rate=rate)
    index = write_index(job)
    if index is None:
        print(f"part {part} of {parts} is finished; the part that finishes last writes {options.out / INDEX}")
    else:
        count = sum(shard.count for shard in index.shards)
        print(f"{count:,} latents of {size_name((index.channels, *index.size), '×')} are in {options.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
