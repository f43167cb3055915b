"""What the headline shows: its findings as tables, and beside the goals that were set before anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from ditserve.bench.answers import Summary
from ditserve.bench.cells import CALM, CAPACITY, REFERENCE, Cell
from ditserve.bench.findings import Findings
from ditserve.bench.servers import ARMS

Summarise = Callable[[Sequence[Cell]], Summary | None]
OURS, EQUAL = "planner", "EDF"  # with quality spent, and with quality kept


@dataclass(frozen=True, slots=True)
class View:
    """Findings of these arms, loads and seeds."""

    findings: Findings
    summarise: Summarise
    arms: Sequence[str]
    loads: Sequence[float]
    seeds: Sequence[int]

    def offered(self, arm: str, load: float) -> Summary | None:
        return self.summarise([Cell("offered", arm, load, seed) for seed in self.seeds])

    def peers(self) -> list[str]:
        return [name for name in self.arms if not ARMS[name].ours and not ARMS[name].graphs]


def tables(view: View) -> list[Table]:
    """Alone and saturated; under load; where we should lose; the goals."""
    found = [_unloaded(view), *_offered(view), _own(view), _losing(view), _goals(view)]
    return [table for table in found if table.row_count]


def markdown(table: Table) -> str:
    """A table of plain texts, as GitHub shows them."""
    rows = zip(*([str(column.header), *map(str, column.cells)] for column in table.columns), strict=True)
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|" + "".join("---:|" if column.justify == "right" else "---|" for column in table.columns)
    return "\n".join([f"## {table.title}", "", head, rule, *body])


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _unloaded(view: View) -> Table:
    times = {arm: found for arm in view.arms if (found := view.findings.alone(arm))}
    kinds = sorted({kind for found in times.values() for kind in found}, key=lambda kind: kind.rows)
    names = [f"{kind.steps} steps{', guided' if kind.guided else ''}, s" for kind in kinds]
    table = _table("one image alone; saturated", ["arm", *names, "images/s", "CPU s/image", "MiB", "tuned"])
    for arm, alone in times.items():
        figures = [_number(alone.get(kind), 3) for kind in kinds]
        means = [
            view.findings.mean("saturated", arm, figure)
            for figure in ("images_per_s", "processor_s_per_image", "resident_mib")
        ]
        tuned = view.findings.tuned.get(arm)
        choice = f"batch {tuned[0]}, wait {tuned[1]:g} s, cap {tuned[2]}" if tuned else ""
        table.add_row(arm, *figures, *(map(_number, means)), choice)
    return table


COLUMNS = (
    *("arm", "in time", "95 %", "goodput/s", "p50", "p95", "p99", "refused", "failed"),
    *("steps", "degraded", "distance", "Fréchet", "rows/pass"),
)


def _row(view: View, arm: str, cells: Sequence[Cell], summary: Summary) -> list[str]:
    rows = [
        cell["rows_per_pass"]
        for each in cells
        if (cell := view.findings.cells.get(each.key)) and cell.get("rows_per_pass")
    ]
    shares = (summary.attainment, summary.refused, summary.failed, summary.degraded)
    kept, refused, failed, degraded = (f"{100 * each:.1f} %" for each in shares)
    return [
        arm,
        kept,
        f"{100 * summary.attainment_low:.0f}–{100 * summary.attainment_high:.0f}",
        _number(summary.goodput_per_s),
        *map(_number, (summary.p50, summary.p95, summary.p99)),
        refused,
        failed,
        _number(summary.steps, 1),
        degraded,
        _number(summary.distance, 4),
        _number(summary.frechet),
        _number(sum(rows) / len(rows), 1) if rows else "–",
    ]


def _offered(view: View) -> list[Table]:
    found = []
    for load in sorted(view.loads):
        rate = load * view.findings.unit(CAPACITY)
        table = _table(f"load {load:g}: {rate:.2f} requests/s offered to everyone", COLUMNS)
        for arm in view.arms:
            cells = [Cell("offered", arm, load, seed) for seed in view.seeds]
            if summary := view.summarise(cells):
                table.add_row(*_row(view, arm, cells, summary))
        found.append(table)
    return found


def _own(view: View) -> Table:
    table = _table(f"every arm at {CALM:g} of its own capacity", COLUMNS)
    for arm in view.arms:
        cells = _own_cells(view, arm)
        if summary := view.summarise(cells):
            table.add_row(*_row(view, arm, cells, summary))
    return table


def _own_cells(view: View, arm: str) -> list[Cell]:
    return [Cell("own", arm, CALM, seed) for seed in view.seeds]


def _losing(view: View) -> Table:
    table = _table("where batching by steps has least to offer", COLUMNS)
    for title, situation, load in (("alike", "alike", CALM), ("at once", "at once", 0.0)):
        for arm in view.arms:
            cells = [Cell(situation, arm, load, seed) for seed in view.seeds]  # type: ignore[arg-type]
            if summary := view.summarise(cells):
                table.add_row(*_row(view, f"{title}: {arm}", cells, summary))
    return table


def _goals(view: View) -> Table:
    table = _table("goals", ["goal", "found", "met"])
    for goal, found, least in goals(view):
        met = "–" if found is None else "yes" if found >= least else "no"
        table.add_row(goal, _number(found, 3), met)
    return table


def goals(view: View) -> list[tuple[str, float | None, float]]:
    """What was to be reached, what was found (None: not measured yet), and the least that will do."""
    find = view.findings
    ours, theirs = find.alone(CAPACITY), find.alone(REFERENCE)
    faster = min((theirs[kind] / ours[kind] for kind in ours if kind in theirs), default=None)
    best = _best(view, 1.1)
    return [
        ("one image alone: times faster than diffusers, at least 1.5", faster, 1.5),
        ("p99 at 0.7 of one traffic, best peer's over ours undegraded, at least 1.5", _sooner(view), 1.5),
        ("p99 at 0.7 of each its own capacity, the same, at least 1.5", _sooner(view, own=True), 1.5),
        ("goodput at 1.1 over the best peer's, at least 3", best, 3.0),
        ("answered in time at 1.1, at least 0.95", _kept(view, 1.1), 0.95),
        ("answered in time at 1.4, at least 0.90", _kept(view, 1.4), 0.90),
        ("not refused at 1.1, at least 0.98", _taken(view, 1.1), 0.98),
        ("not refused at 1.4, at least 0.98", _taken(view, 1.4), 0.98),
        ("not degraded at 0.5, all", _whole(view), 1.0),
    ]


def curves(view: View) -> dict[str, list[tuple[float, Summary]]]:
    """By arm, what was found at each load, the lightest first."""
    found = {
        arm: [(load, each) for load in sorted(view.loads) if (each := view.offered(arm, load))]
        for arm in view.arms
    }
    return {arm: points for arm, points in found.items() if points}


def _best(view: View, load: float) -> float | None:
    ours = view.offered(OURS, load)
    others = [each.goodput_per_s for name in view.peers() if (each := view.offered(name, load))]
    return ours.goodput_per_s / max(others) if ours and others and max(others) else None


def _sooner(view: View, *, own: bool = False) -> float | None:
    def p99(arm: str) -> float | None:
        found = view.summarise(_own_cells(view, arm)) if own else view.offered(arm, CALM)
        return found.p99 if found else None

    ours, others = p99(EQUAL), [each for each in map(p99, view.peers()) if each]
    return min(others) / ours if ours and others else None


def _kept(view: View, load: float) -> float | None:
    found = view.offered(OURS, load)
    return found.attainment if found else None


def _taken(view: View, load: float) -> float | None:
    found = view.offered(OURS, load)
    return 1.0 - found.refused if found else None


def _whole(view: View) -> float | None:
    found = view.offered(OURS, 0.5)
    return 1.0 - found.degraded if found else None
