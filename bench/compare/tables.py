"""The tables of the headline, and its goals, which were set before anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from ditserve.bench import report
from ditserve.bench.compare.results_store import Headline, PooledRuns
from ditserve.bench.compare.runs import CALM_LOAD, CAPACITY, REFERENCE, Situation
from ditserve.bench.compare.systems import SYSTEMS
from ditserve.bench.load.summary import LoadSummary
from ditserve.bench.plots import Panel

# The service that may lower quality, and the same service when every request forbids it.
OURS, OURS_UNDEGRADED = "planner", "EDF"
COLUMNS = (
    *("arm", "in time", "95 %", "goodput/s", "p50", "p95", "p99", "refused", "failed"),
    *("steps", "degraded", "distance", "real", "Fréchet", "grain", "rows/pass"),
)
# Loads, and the least share that is to be answered in time.
IN_TIME = ((1.1, 0.99), (1.4, 0.99), (2.0, 0.99), (3.0, 0.99), (5.0, 0.97), (8.0, 0.9))
PANELS = (
    ("attainment", "answered in time, of all requests"),
    ("goodput_per_s", "answered in time, a second"),
    ("frechet", "mean Fréchet distance to real pictures"),
    ("real", "mean energy score against real pictures"),
    ("distance", "mean RMS distance to the long run"),
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
    panels = []
    for field, title in PANELS:
        lines = {}
        for system, points in by_system.items():
            values = [(load, getattr(summary, field)) for load, summary in points]
            if known := [(load, value) for load, value in values if value is not None]:
                lines[shown(headline, system)] = known
        panels += [Panel(title, lines)] if lines else []
    return panels


def shown(headline: Headline, system: str) -> str:
    """Return the name that an arm is shown by: of a bundle peers run its own network, not diffusers'."""
    own = headline.results.settings.get("peers_run") == "PyTorch"
    return system.replace("diffusers", "PyTorch") if own else system


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
        by_kind = [_number(seconds.get(kind), 3) for kind in kinds]
        rows.append([shown(headline, system), *by_kind, *map(_number, means), tuning])
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
        _number(summary.real, 4),
        _number(summary.frechet),
        _number(summary.grain),
        _number(pool.rows_per_pass, 1),
    ]


def _rows(headline: Headline, situation: Situation, load: float, prefix: str = "") -> list[list[str]]:
    return [
        _row(prefix + shown(headline, system), pool)
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

    def ours(load: float) -> LoadSummary | None:
        return headline.offered(OURS, load)

    def figure(load: float, share: Callable[[LoadSummary], float]) -> float | None:
        return None if (summary := ours(load)) is None else share(summary)

    rows = [
        ("one image alone: times as fast as the reference, at least 3", _speedup_alone(headline), 3.0),
        (
            "p99 at 0.7 of each its own capacity, best peer's over ours undegraded, at least 1.5",
            _p99_ratio(headline, "own"),
            1.5,
        ),
        ("goodput at 1.1 over the best peer's, at least 4", _goodput_ratio(headline, 1.1, graphs=False), 4.0),
        (
            "goodput at 1.1 over LitServe's around our graphs, at least 2.5",
            _goodput_ratio(headline, 1.1, graphs=True),
            2.5,
        ),
        ("not degraded at 0.5, all", figure(0.5, lambda summary: 1.0 - summary.degraded), 1.0),
    ]
    for load, least in IN_TIME:
        in_time = figure(load, lambda summary: summary.attainment)
        rows.append((f"answered in time at {load:g}, at least {least:g}", in_time, least))
    for load in (3.0, 5.0):
        accepted = figure(load, lambda summary: 1.0 - summary.refused)
        rows.append((f"not refused at {load:g}, at least 0.98", accepted, 0.98))
    return rows


def _peers(headline: Headline) -> list[str]:
    """Return the systems that are neither ours nor around our graphs."""
    return [name for name in headline.systems if not SYSTEMS[name].ours and not SYSTEMS[name].graphs]


def _speedup_alone(headline: Headline) -> float | None:
    ours, theirs = headline.results.alone(CAPACITY), headline.results.alone(REFERENCE)
    return min((theirs[kind] / ours[kind] for kind in ours if kind in theirs), default=None)


def _goodput_ratio(headline: Headline, load: float, *, graphs: bool) -> float | None:
    ours = headline.offered(OURS, load)
    names = [name for name in headline.systems if not SYSTEMS[name].ours and SYSTEMS[name].graphs == graphs]
    peers = [headline.offered(name, load) for name in names]
    best = max((peer.goodput_per_s for peer in peers if peer), default=0.0)
    return ours.goodput_per_s / best if ours and best else None


def _p99_ratio(headline: Headline, situation: Situation) -> float | None:
    def p99(system: str) -> float | None:
        pool = headline.pool(situation, system, CALM_LOAD)
        return pool.summary.p99 if pool else None

    ours, peers = p99(OURS_UNDEGRADED), [peer for peer in map(p99, _peers(headline)) if peer]
    return min(peers) / ours if ours and peers else None
