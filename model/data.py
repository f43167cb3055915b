"""`python -m model.data COMMAND`: make data sets to train on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from model import emoji
from model.pictures import DataError


def main(arguments: Sequence[str]) -> int:
    """Command line: `emoji` builds the emoji picture set."""
    parser = argparse.ArgumentParser(prog="python -m model.data")
    commands = parser.add_subparsers(dest="command", required=True)
    emoji_parser = commands.add_parser("emoji", help="render the emoji set from npm packages of SVG drawings")
    emoji_parser.add_argument("--size", type=int, default=64, help="picture size in pixels")
    emoji_parser.add_argument(
        "--out", type=Path, default=None, help="target file (default data/emoji<size>.npz)"
    )
    emoji_parser.add_argument(
        "--tarballs", type=Path, default=Path("data/npm"), help="folder of npm tarballs, filled as needed"
    )
    options = parser.parse_args(arguments)
    target = options.out or Path(f"data/emoji{options.size}.npz")
    try:
        emoji.build(target, options.size, options.tarballs)
    except DataError as error:
        print(f"model.data: {error}", file=sys.stderr)
        return 2
    print(f"wrote {target} and {target.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
