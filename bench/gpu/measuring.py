"""The process of one part: `main` reads its options, measures point by point, and writes each at once."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ditserve.bench.gpu.result_files import DONE, ERROR, read_part

# An error of CUDA after which nothing works any more in this process.
LOST = ("CUDA error", "device-side assert", "cudaErrorLaunchFailure")


class Measuring:
    """The points of a part. Those that are in its file already are not measured again.

    `device` is one of torch. With `toy` networks and numbers are so small that a CPU has them in seconds.
    `bundle` is the model that is served, and `folder` that of the results.
    """

    def __init__(self, part: str, options: argparse.Namespace) -> None:
        self.toy, self.device = bool(options.toy), str(options.device)
        self.bundle, self.folder = Path(options.bundle), Path(options.out)
        self._result = read_part(self.folder, part, json.loads(options.setting))

    def finish(self) -> None:
        """Note that there is nothing more to measure: the end of a process may take its time."""
        self._result.status = DONE
        self._result.write(self.folder)

    def missing(self, *names: str) -> bool:
        """Return True if one of these points is still to be measured."""
        return any(name not in self._result.points for name in names)

    def known(self, name: str) -> dict[str, Any]:
        """Return a point that was measured; empty if it was not."""
        return self._result.points.get(name, {})

    def point(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Measure a point unless it is there, and return it. An error of it becomes its result."""
        known = self._result.points.get(name)
        if known is not None:
            return known
        print(json.dumps({"point": name}), flush=True)
        self._result.running = name
        self._result.write(self.folder)
        try:
            found = dict(measure())
        except Exception as error:
            if any(sign in str(error) for sign in LOST):
                raise
            found = {ERROR: sentence(error)}
        self._result.points[name], self._result.running = found, ""
        self._result.write(self.folder)
        return found


def sentence(error: BaseException) -> str:
    """Return the first line of an error, with its type where the text alone says little."""
    text = (str(error).strip() or "no reason given").splitlines()[0]
    plain = isinstance(error, ValueError) and " " in text
    return text if plain else f"{type(error).__name__}: {text}"


def main(part: str, measure: Callable[[Measuring], None]) -> None:
    """Run a part's `measure` with the options that `bench.gpu` gave to its process."""
    parser = argparse.ArgumentParser()
    for option in ("--out", "--device", "--bundle", "--setting"):
        parser.add_argument(option, required=True)
    parser.add_argument("--toy", action="store_true")
    # Temporary folders are removed, and servers ended, when the time is over.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measuring = Measuring(part, parser.parse_args(sys.argv[1:]))
    measure(measuring)
    measuring.finish()
