"""The tables of the headline, and its goals, which were set before anything was measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ditserve.bench import report
from ditserve.bench.compare.results_store import Headline, PooledRuns
from ditserve.bench.compare.runs import CALM_LOAD, CAPACITY, REFERENCE, Situation
from ditserve.bench.compare.systems import SYSTEMS
from ditserve.bench.plots import Panel

# The service that may lower quality, and the same service when every request forbids it.
OURS, OURS_UNDEGRADED = "planner", "EDF"
COLUMNS = (
    *("arm", "in time", "95 %", "goodput/s", "p50", "p95", "p99", "refused", "failed"),
    *("steps", "degraded", "distance", "Fréchet", "rows/pass"),
)
PANELS = (
    ("attainment", "answered in time, of all requests"),
    ("goodput_per_s", "answered in time, a second"),
    ("distance", "mean RMS distance to 250 steps"),
)


def tables(headline: Headline) -> list[Table]:
    """Return the tables that have rows."""
    offered = [_offered(headline, load) for load in sorted(headline.loads)]
    made = [_unloaded(headline), *offered, _own(headline), _hard_situations(headline), _goals(headline)]
    return [table for table in made if table.row_count]


def markdown(table: Table) -> str:
    """Return a table of plain texts as GitHub's Markdown."""
    rows = zip(*([str(column.header), *map(str, column.cells)] for column in table.columns), strict=True)
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    rule = "|" + "".join("---:|" if column.justify == "right" else "---|" for column in table.columns)
    return "\n".join([f"## {table.title}", "", head, rule, *body])


def document(made: Sequence[Table], name: str) -> str:
    """Return the text of <name>.md."""
    head = [
        "# What `python -m bench.headline` found",
        f"Its docstring says what the words mean; the figures of every run are in "
        f"[{name}.json]({name}.json).",
        f"![What became of requests over the load]({name}.png)",
    ]
    return "\n\n".join([*head, *map(markdown, made)]) + "\n"


def panels(headline: Headline) -> list[Panel]:
    """Return the panels of the figure: what became of the requests over the load, by system."""
    by_system = {
        system: [(load, summary) for load in headline.loads if (summary := headline.offered(system, load))]
        for system in headline.systems
    }
    return [
        Panel(
            title,
            {
                system: [(load, getattr(summary, field)) for load, summary in points]
                for system, points in by_system.items()
                if points
            },
        )
        for field, title in PANELS
    ]


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _unloaded(headline: Headline) -> Table:
    results = headline.results
    times = {system: alone for system in headline.systems if (alone := results.alone(system))}
    kinds = sorted({kind for alone in times.values() for kind in alone}, key=lambda kind: kind.rows)
    names = [f"{kind.steps} steps{', guided' if kind.guided else ''}, s" for kind in kinds]
    rows = []
    for system, seconds in times.items():
        means = [
            results.mean("saturated", system, figure)
            for figure in ("images_per_s", "processor_s_per_image", "resident_mib")
        ]
        tuned = results.tuned.get(system)
        tuning = f"batch {tuned[0]}, wait {tuned[1]:g} s, cap {tuned[2]}" if tuned else ""
        rows.append(
            [system, *(_number(seconds.get(kind), 3) for kind in kinds), *map(_number, means), tuning]
        )
    columns = ["arm", *names, "images/s", "CPU s/image", "MiB", "tuned"]
    return report.table("one image alone; saturated", columns, rows, text={"arm"})


def _row(name: str, pool: PooledRuns) -> list[str]:
    summary = pool.summary
    shares = (summary.attainment, summary.refused, summary.failed, summary.degraded)
    in_time, refused, failed, degraded = (f"{100 * share:.1f} %" for share in shares)
    return [
        name,
        in_time,
        f"{100 * summary.attainment_low:.0f}–{100 * summary.attainment_high:.0f}",
        _number(summary.goodput_per_s),
        *map(_number, (summary.p50, summary.p95, summary.p99)),
        refused,
        failed,
        _number(summary.steps, 1),
        degraded,
        _number(summary.distance, 4),
        _number(summary.frechet),
        _number(pool.rows_per_pass, 1),
    ]


def _rows(headline: Headline, situation: Situation, load: float, prefix: str = "") -> list[list[str]]:
    return [
        _row(prefix + system, pool)
        for system in headline.systems
        if (pool := headline.pool(situation, system, load))
    ]


def _offered(headline: Headline, load: float) -> Table:
    rate = load * headline.results.unit(CAPACITY)
    title = f"load {load:g}: {rate:.2f} requests/s offered to everyone"
    return report.table(title, COLUMNS, _rows(headline, "offered", load), text={"arm"})


def _own(headline: Headline) -> Table:
    title = f"every arm at {CALM_LOAD:g} of its own capacity"
    return report.table(title, COLUMNS, _rows(headline, "own", CALM_LOAD), text={"arm"})


def _hard_situations(headline: Headline) -> Table:
    rows = [*_rows(headline, "alike", CALM_LOAD, "alike: "), *_rows(headline, "at once", 0.0, "at once: ")]
    return report.table("where batching by steps has least to offer", COLUMNS, rows, text={"arm"})


def _goals(headline: Headline) -> Table:
    rows = []
    for goal, value, least in goals(headline):
        met = "–" if value is None else "yes" if value >= least else "no"
        rows.append([goal, _number(value, 3), met])
    return report.table("goals", ["goal", "found", "met"], rows, text={"goal"})


def goals(headline: Headline) -> list[tuple[str, float | None, float]]:
    """Return each goal with what was found (None: not measured yet) and the least that meets it."""
    ours = {load: headline.offered(OURS, load) for load in (0.5, 1.1, 1.4)}
    in_time = {load: summary.attainment if summary else None for load, summary in ours.items()}
    accepted = {load: 1.0 - summary.refused if summary else None for load, summary in ours.items()}
    undegraded = 1.0 - ours[0.5].degraded if ours[0.5] else None
    return [
        ("one image alone: times faster than diffusers, at least 1.5", _speedup_alone(headline), 1.5),
        (
            "p99 at 0.7 of one traffic, best peer's over ours undegraded, at least 1.5",
            _p99_ratio(headline, "offered"),
            1.5,
        ),
        ("p99 at 0.7 of each its own capacity, the same, at least 1.5", _p99_ratio(headline, "own"), 1.5),
        ("goodput at 1.1 over the best peer's, at least 3", _goodput_ratio(headline, 1.1), 3.0),
        ("answered in time at 1.1, at least 0.95", in_time[1.1], 0.95),
        ("answered in time at 1.4, at least 0.90", in_time[1.4], 0.90),
        ("not refused at 1.1, at least 0.98", accepted[1.1], 0.98),
        ("not refused at 1.4, at least 0.98", accepted[1.4], 0.98),
        ("not degraded at 0.5, all", undegraded, 1.0),
    ]


def _peers(headline: Headline) -> list[str]:
    """Return the systems that are neither ours nor around our graphs."""
    return [name for name in headline.systems if not SYSTEMS[name].ours and not SYSTEMS[name].graphs]


def _speedup_alone(headline: Headline) -> float | None:
    ours, theirs = headline.results.alone(CAPACITY), headline.results.alone(REFERENCE)
    return min((theirs[kind] / ours[kind] for kind in ours if kind in theirs), default=None)


def _goodput_ratio(headline: Headline, load: float) -> float | None:
    ours = headline.offered(OURS, load)
    peers = [headline.offered(name, load) for name in _peers(headline)]
    best = max((peer.goodput_per_s for peer in peers if peer), default=0.0)
    return ours.goodput_per_s / best if ours and best else None


def _p99_ratio(headline: Headline, situation: Situation) -> float | None:
    def p99(system: str) -> float | None:
        pool = headline.pool(situation, system, CALM_LOAD)
        return pool.summary.p99 if pool else None

    ours, peers = p99(OURS_UNDEGRADED), [peer for peer in map(p99, _peers(headline)) if peer]
    return min(peers) / ours if ours and peers else None
