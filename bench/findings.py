"""What the headline has found so far: a file that is whole after every cell, and that a later sitting goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ditserve.bench.answers import Exchange
from ditserve.bench.cells import Cell, unpacked
from ditserve.bench.record import machine
from ditserve.bench.workload import Kind
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.errors import ModelError

SAME = ("processor", "vectors", "cores", "packages")  # of machines whose figures may stand side by side


class Mismatch(ModelError):
    """The file holds figures of other settings; the message is one sentence."""


class Findings:
    """`settings` must be those of the file; `tuned` maps arms to batch, wait and cap; `pass_s`: seconds of a pass when it began;
    `units`: images a second of a load of 1, by the arm in whose capacity it is told.

    Raises:
        Mismatch: the file is of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path, self.settings = path, dict(settings)
        self.cells: dict[str, dict[str, Any]] = {}
        self.tuned: dict[str, tuple[int, float, int]] = {}
        self.pass_s: float | None = None
        self.units: dict[str, float] = {}
        self._machine = machine()
        if fresh or not path.is_file():
            return
        stored = json.loads(path.read_text())
        other = [name for name, value in settings.items() if stored["settings"].get(name) != value]
        if other:
            raise Mismatch(
                f"{path} holds figures of another {', '.join(other)}: give --fresh or another --name"
            )
        self.cells = {key: cell for key, cell in stored["cells"].items() if not cell["void"]}
        self.pass_s = stored["pass_s"]
        self.units = stored.get("units", {})
        self._machine = stored["machine"]
        self.tuned = {name: (int(b), float(w), int(c)) for name, (b, w, c) in stored["tuned"].items()}

    def require_machine(self) -> None:
        """Raises `Mismatch` unless this is the kind of machine, with the packages, on which the figures so far were found."""
        here = machine()
        other = [name for name in SAME if self._machine.get(name) != here[name]]
        if other:
            raise Mismatch(
                f"{self._path} holds figures of a machine with another {', '.join(other)}: give --fresh or another --name"
            )

    def add(self, cell: Cell, found: dict[str, Any]) -> None:
        self.cells[cell.key] = found
        self.write()

    def write(self) -> None:
        """One line a cell: exchanges by the hundred would be a line each otherwise."""
        head = {
            "settings": self.settings,
            "machine": self._machine,
            "pass_s": self.pass_s,
            "units": self.units,
            "tuned": self.tuned,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(cell)}" for key, cell in self.cells.items()]
        text = json.dumps(head, indent=1)[:-2] + ',\n "cells": {\n' + ",\n".join(lines) + "\n }\n}\n"
        self._path.parent.mkdir(exist_ok=True)
        write_atomic(self._path, text.encode())

    def runs(self, cells: Sequence[Cell]) -> list[list[Exchange]]:
        """The exchanges of those cells that have any and are not void."""
        found = [self.cells.get(cell.key, {}) for cell in cells]
        return [
            [unpacked(line) for line in each["exchanges"]]
            for each in found
            if each.get("exchanges") and not each["void"]
        ]

    def alone(self, arm: str) -> dict[Kind, float]:
        """Seconds of each kind of request on an idle server, the median of all times it was measured."""
        times: dict[Kind, list[float]] = {}
        for cell in self._of("alone", arm):
            for steps, guided, seconds in cell.get("alone", ()):
                times.setdefault(Kind(steps, guided), []).append(seconds)
        return {kind: median(each) for kind, each in times.items()}

    def capacity(self, arm: str) -> float:
        """Images a second when saturated, the mean of all times it was measured; 0 if it was not."""
        return self.mean("saturated", arm, "images_per_s") or 0.0

    def unit(self, arm: str) -> float:
        """Images a second of a load of 1: the capacity as first asked for. Runs that saturate it later move the capacity, not the traffic."""
        if arm not in self.units and (capacity := self.capacity(arm)):
            self.units[arm] = capacity
        return self.units.get(arm, 0.0)

    def mean(self, situation: str, arm: str, figure: str) -> float | None:
        values = [cell[figure] for cell in self._of(situation, arm) if cell.get(figure) is not None]
        return sum(values) / len(values) if values else None

    def _of(self, situation: str, arm: str) -> list[dict[str, Any]]:
        return [
            cell
            for key, cell in self.cells.items()
            if key.startswith(f"{situation}, {arm}, ") and not cell["void"]
        ]
