"""The report of a measurement as Markdown, from the points of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ditserve.bench.gpu.result_files import ERROR, PartResult

Point = Mapping[str, Any]
GOALS = (
    "Goals: a step of DiT-XL/2 at 55 % of the measured peak with 16 to 32 rows, and 1,800 rows a second; the "
    "shape of SD3-medium at 50 %; 500 images of 20 steps a second in time on one H200."
)
# Part → its columns, in the order of their keys in a point: heading, key, format.
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "correctness": (
        ("error", "error_of", "{:.1e}"),
        ("allowed", "allowed", "{:.0e}"),
        ("passed", "passed", "{}"),
    ),
    "steps": (
        ("ms", "pass_ms", "{:.3f}"),
        ("ms on the device", "device_ms", "{:.3f}"),
        ("host µs", "host_us", "{:.0f}"),
        ("rows/s", "rows_per_s", "{:.0f}"),
        ("of the peak", "share", "{:.1%}"),
        ("captured = uncaptured", "equal_to_uncaptured", "{}"),
    ),
    "host": (
        ("µs a step", "step_us", "{:.0f}"),
        ("of the host's processor", "host_us", "{:.0f}"),
        ("steps a turn", "steps_a_turn", "{:.1f}"),
    ),
    "service": (
        ("requests/s", "rate", "{:.0f}"),
        ("in time", "in_time", "{:.1%}"),
        ("refused", "refused", "{:.1%}"),
        ("images/s in time", "images_per_s", "{:.0f}"),
        ("promise s", "promise_s", "{:.3f}"),
        ("client's load", "client_load", "{:.0%}"),
    ),
    "training": (("images/s", "images_per_s", "{:.0f}"), ("loss", "loss", "{:.4f}")),
    "graphs": (
        ("ms", "pass_ms", "{:.3f}"),
        ("ms on the device", "device_ms", "{:.3f}"),
        ("rows/s", "rows_per_s", "{:.0f}"),
        ("of the peak", "share", "{:.1%}"),
        ("captured = uncaptured", "passed", "{}"),
    ),
}


def report(results: Sequence[PartResult], identity: Mapping[str, str]) -> str:
    """Return the report; a part that is not done says why."""
    lines = [f"# {identity['device']}, measured by `python -m bench.gpu`", "", GOALS]
    for result in results:
        state = "" if result.done else f" — {result.status or 'not run'}"
        lines += ["", f"## {result.part}{state}", ""]
        measured = {name: point for name, point in result.points.items() if ERROR not in point}
        lines += _table(result.part, measured) if result.part in COLUMNS else _list(measured)
        if result.errors:
            lines += ["", "Not measured:", ""]
            lines += [f"- {name}: {reason}" for name, reason in result.errors.items()]
    return "\n".join(lines) + "\n"


def _table(part: str, points: Mapping[str, Point]) -> list[str]:
    if not points:
        return ["Nothing was measured."]
    # A point that other figures are made of has none of the columns.
    shown = {name: point for name, point in points.items() if _cells(part, point, strict=True)}
    head = ["", *(heading for heading, _, _ in COLUMNS[part])]
    rows = [[name, *_cells(part, point)] for name, point in shown.items()]
    return [_line(head), _line(["---", *["---:"] * (len(head) - 1)]), *map(_line, rows)]


def _cells(part: str, point: Point, *, strict: bool = False) -> list[str]:
    """Return the cells of a point; with `strict` none where it has no figure of the table."""
    cells = []
    for _, key, form in COLUMNS[part]:
        value = point.get(key)
        cells.append("" if value is None else _format(form, value))
    return [] if strict and not any(cells) else cells


def _format(form: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return form.format(value) if isinstance(value, int | float) else str(value)


def _list(points: Mapping[str, Point]) -> list[str]:
    """Return points of other kinds as a list, one a line."""
    if not points:
        return ["Nothing was measured."]
    return [f"- {name}: {', '.join(_pairs(point))}" for name, point in points.items()]


def _pairs(point: Point) -> Iterable[str]:
    for key, value in point.items():
        if isinstance(value, float):
            yield f"{key} {value:.4g}"
        elif isinstance(value, dict):
            yield f"{key} {' '.join(f'{name} {each}' for name, each in value.items())}"
        elif isinstance(value, list):
            yield f"{key} {', '.join(map(str, value)) or 'none'}"
        else:
            yield f"{key} {value}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
