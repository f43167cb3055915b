"""The results of the headline: a raw file that sessions continue, and a summary for tables and figure.

The raw file, bench/results/raw/<name>.json, holds every exchange of every run and is complete after each run.
It is not kept in the repository. The summary, bench/results/<name>.json, holds the same runs without their
exchanges, and their pooled figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ditserve.bench import report
from ditserve.bench.compare.runs import CALM_LOAD, Run, Situation, Tuning, unpacked
from ditserve.bench.load.summary import Exchange, LoadSummary, Promise, RungQualities
from ditserve.bench.load.workload import RequestKind
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.errors import ModelError

# Machines that agree in these may have their figures side by side.
COMPARABLE = ("processor", "vectors", "cores", "packages")


class ResultsMismatch(ModelError):
    """Raised when a file holds results of other settings or another machine, with one sentence."""


class Results:
    """Runs by key, as JSON objects.

    Attributes:
        settings: those that all runs share.
        tuned: batch, wait and cap by peer.
        pass_s: seconds of the reference pass when the first session began.
        units: images a second of a load of 1, by the system whose capacity is the unit.
    """

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.settings: dict[str, Any] = dict(stored["settings"])
        self.machine: dict[str, Any] = stored["machine"]
        self.pass_s: float | None = stored["pass_s"]
        self.units: dict[str, float] = dict(stored.get("units", {}))
        self.tuned: dict[str, Tuning] = {
            name: (int(batch), float(wait_s), int(cap))
            for name, (batch, wait_s, cap) in stored["tuned"].items()
        }
        self.runs: dict[str, dict[str, Any]] = {
            key: run for key, run in stored["cells"].items() if not run["void"]
        }

    def head(self) -> dict[str, Any]:
        """Return all but the runs, as JSON."""
        return {
            "settings": self.settings,
            "machine": self.machine,
            "pass_s": self.pass_s,
            "units": self.units,
            "tuned": self.tuned,
        }

    def alone(self, system: str) -> dict[RequestKind, float]:
        """Return the median seconds of each kind of request on an idle server."""
        times: dict[RequestKind, list[float]] = {}
        for run in self._of("alone", system):
            for steps, guided, seconds in run.get("alone", ()):
                times.setdefault(RequestKind(steps, guided), []).append(seconds)
        return {kind: median(seconds) for kind, seconds in times.items()}

    def capacity(self, system: str) -> float:
        """Return the images a second when saturated, the mean of all runs; 0 if there is none."""
        return self.mean("saturated", system, "images_per_s") or 0.0

    def unit(self, system: str) -> float:
        """Return the images a second of a load of 1: the capacity when it was first asked for.

        Runs that saturate the system later change its capacity, but not the traffic.
        """
        if system not in self.units and (capacity := self.capacity(system)):
            self.units[system] = capacity
        return self.units.get(system, 0.0)

    def mean(self, situation: str, system: str, figure: str) -> float | None:
        """Return the mean of a figure over the runs that have it."""
        return _mean([run.get(figure) for run in self._of(situation, system)])

    def _of(self, situation: str, system: str) -> list[dict[str, Any]]:
        prefix = f"{situation}, {system}, "
        return [run for key, run in self.runs.items() if key.startswith(prefix) and not run["void"]]


@dataclass(frozen=True, slots=True)
class PooledRuns:
    """Runs that differ in their seed only, summed up together."""

    summary: LoadSummary
    rows_per_pass: float | None


@dataclass(frozen=True, slots=True)
class Headline:
    """The results, and the pooled runs of some systems and loads: all that tables and figure show."""

    results: Results
    pools: Mapping[str, PooledRuns]
    systems: Sequence[str]
    loads: Sequence[float]

    def pool(self, situation: Situation, system: str, load: float = 0.0) -> PooledRuns | None:
        return self.pools.get(Run(situation, system, load).pool_key)

    def offered(self, system: str, load: float) -> LoadSummary | None:
        pool = self.pool("offered", system, load)
        return pool.summary if pool else None

    def write(self, path: Path) -> None:
        """Write the summary file."""
        pools = {
            key: _rounded({**asdict(pool.summary), "rows_per_pass": pool.rows_per_pass})
            for key, pool in self.pools.items()
        }
        runs = {
            key: _rounded({name: value for name, value in run.items() if name != "exchanges"})
            for key, run in self.results.runs.items()
        }
        head = {**self.results.head(), "systems": list(self.systems), "loads": list(self.loads)}
        _write_lines(path, head, {"pools": pools, "cells": runs})

    @classmethod
    def read(cls, path: Path) -> Headline:
        """Read a summary file."""
        stored = json.loads(path.read_text())
        pools = {
            key: PooledRuns(LoadSummary(**{k: v for k, v in pool.items() if k != "rows_per_pass"}), rows)
            for key, pool in stored["pools"].items()
            for rows in [pool["rows_per_pass"]]
        }
        return cls(Results(stored), pools, stored["systems"], stored["loads"])


class ResultsStore(Results):
    """The results in a raw file, with the exchanges of their runs.

    Raises:
        ResultsMismatch: the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._path = path
        stored = {"settings": settings, "machine": report.machine(), "pass_s": None, "tuned": {}, "cells": {}}
        if path.is_file() and not fresh:
            stored = json.loads(path.read_text())
            other = [name for name, value in settings.items() if stored["settings"].get(name) != value]
            if other:
                raise ResultsMismatch(
                    f"{path} holds figures of another {', '.join(other)}: give --fresh or another --name"
                )
        super().__init__(stored)
        self.settings = dict(settings)

    def require_machine(self) -> None:
        """Raise `ResultsMismatch` unless this machine and its packages are those of the results."""
        here = report.machine()
        other = [name for name in COMPARABLE if self.machine.get(name) != here[name]]
        if other:
            raise ResultsMismatch(
                f"{self._path} holds figures of a machine with another {', '.join(other)}: "
                "give --fresh or another --name"
            )

    def add(self, run: Run, figures: dict[str, Any]) -> None:
        self.runs[run.key] = figures
        self.write()

    def write(self) -> None:
        _write_lines(self._path, self.head(), {"cells": self.runs})

    def promise(self) -> Promise:
        return Promise(self.alone(self.settings["promise_of"]), self.settings["slo"])

    def exchanges(self, runs: Sequence[Run]) -> list[list[Exchange]]:
        """Return the exchanges of those runs that have any and are not void."""
        stored = [self.runs.get(run.key, {}) for run in runs]
        return [
            [unpacked(line) for line in run["exchanges"]]
            for run in stored
            if run.get("exchanges") and not run["void"]
        ]

    def pool(self, runs: Sequence[Run], qualities: RungQualities) -> PooledRuns | None:
        """Pool the runs, as far as they have been made; return None if none has."""
        exchanges = self.exchanges(runs)
        if not exchanges:
            return None
        rows = [self.runs[run.key].get("rows_per_pass") for run in runs if run.key in self.runs]
        summary = LoadSummary.of(exchanges, self.promise(), qualities)
        return PooledRuns(summary, _mean([value for value in rows if value]))

    def headline(
        self, systems: Sequence[str], loads: Sequence[float], seeds: Sequence[int], qualities: RungQualities
    ) -> Headline:
        """Pool the runs of these systems, loads and seeds."""
        situations: list[tuple[Situation, float]] = [("offered", load) for load in sorted(loads)]
        situations += [("own", CALM_LOAD), ("alike", CALM_LOAD), ("at once", 0.0)]
        pools = {}
        for situation, load in situations:
            for system in systems:
                runs = [Run(situation, system, load, seed) for seed in seeds]
                if pool := self.pool(runs, qualities):
                    pools[runs[0].pool_key] = pool
        return Headline(self, pools, systems, sorted(loads))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures with eight significant digits; the infinite rate of a crowd becomes null."""
    return {
        name: _eight_digits(value) if isinstance(value, float) else value for name, value in figures.items()
    }


def _eight_digits(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _write_lines(path: Path, head: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a JSON object with one line for each entry of `parts`, so that differences can be read."""
    text = json.dumps(head, indent=1)[:-2]
    for name, entries in parts.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        text += f',\n "{name}": {{\n{lines}\n }}'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (text + "\n}\n").encode())
