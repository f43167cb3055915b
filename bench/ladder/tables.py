"""The tables of a measured ladder: every candidate, and what a stretch costs and saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from rich.table import Table

from ditserve.bench import report
from ditserve.bench.ladder.training_pictures import PictureFigures
from ditserve.model.evaluation.ladder import MeasuredLadder
from ditserve.model.spec.manifest import RungSpec

COLUMNS = ("", "rung", "grid", "rows", "to its long run", "to real pictures", "Fréchet", "grain")
STRETCH_COLUMNS = ("stretch", "rungs", "rows", "to the long run", "to real pictures")


def ladder_table(measured: MeasuredLadder, figures: Mapping[str, PictureFigures]) -> Table:
    rows = []
    for rung in sorted(measured.measured, key=lambda spec: (-spec.rows, spec.quality)):
        distances = [f"{value:.4f}" if value is not None else "" for value in (rung.own, rung.real)]
        seen = figures.get(rung.name)
        fidelity = [f"{seen.frechet:.3f}", f"{seen.grain:.2f}"] if seen else ["", ""]
        mark = "●" if rung in measured.ladder else ""
        rows.append((mark, rung.name, rung.grid, f"{rung.rows:g}", *distances, *fidelity))
    title = f"rungs, dearest first; the ladder is marked, and ordered by the distance {_order(measured)}"
    return report.table(title, COLUMNS, rows, text={"", "rung", "grid"})


def _order(measured: MeasuredLadder) -> str:
    return "to real pictures" if measured.order == "real" else "to the model's own long run"


def stretch_table(measured: MeasuredLadder) -> Table:
    """Return a line for each way to share the noise range: what it costs, and what it changes.

    Every rung is compared with that of the own network alone, of the same solver, steps and grid. Rows are a
    share of that one's rows, and distances are differences to its distances.
    """
    own = {_walk(rung): rung for rung in measured.measured if not rung.stretches}
    pairs: dict[str, list[tuple[RungSpec, RungSpec]]] = defaultdict(list)
    for rung in measured.measured:
        if rung.stretches and (alone := own.get(_walk(rung))):
            pairs[_stretches(rung)].append((rung, alone))
    rows = []
    for name, compared in pairs.items():
        share = fmean(rung.rows / alone.rows for rung, alone in compared)
        changes = [_change(compared, distance) for distance in ("own", "real")]
        rows.append((name, str(len(compared)), f"{share:.2f}", *changes))
    return report.table("stretches, beside the own network alone", STRETCH_COLUMNS, rows, text={"stretch"})


def _change(compared: Sequence[tuple[RungSpec, RungSpec]], distance: str) -> str:
    """Return the mean change of a distance, empty where it was not measured."""
    pairs = [(getattr(rung, distance), getattr(alone, distance)) for rung, alone in compared]
    changes = [after - before for after, before in pairs if None not in (after, before)]
    return f"{fmean(changes):+.4f}" if changes else ""


def _walk(rung: RungSpec) -> tuple[object, ...]:
    return rung.solver, rung.steps, rung.grid, rung.guidance_interval


def _stretches(rung: RungSpec) -> str:
    """Return the stretches in words, from noise to picture: "light above 0.5, own"."""
    words = [
        (part.backbone or "own") + (f" above {part.above:g}" if part.above else "") for part in rung.stretches
    ]
    return ", ".join(words if rung.stretches[-1].above == 0 else [*words, "own"])
