"""The report on a family: scaling.md with the networks side by side and the fitted law, and scaling.png."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ditserve.model.scaling.figure import draw_law
from ditserve.model.scaling.law import Law, LossPoint, bootstrap, fit
from ditserve.model.scaling.record import ScalingRecord, write_record
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.train.dry_run import StageCost


def write_report(record: ScalingRecord, costs: Mapping[str, StageCost], draws: int, out: Path) -> str:
    """Write scaling.md and scaling.json, and scaling.png if there are enough DiTs for a fit. Return the text.

    `draws` is the number of resampled sets of runs for the confidence of the fit.
    """
    points = [look.point for look in record.looks if look.network == "dit"]
    family = record.family
    changes = f" with {', '.join(family.set)}" if family.set else ""
    lines = [
        "# Scaling",
        f"Every network had {family.flops:.3g} floating-point operations of training by "
        f"`{family.train}`{changes}, for each amount of pictures. Loss: that of the averaged weights on "
        f"pairs which none was trained on. On {record.machine}; images/s over a few steps, at a load average "
        f"of {os.getloadavg()[0]:.1f}.",
        network_table(record, costs),
    ]
    fitted: dict[str, tuple[float, float, float]] = {}
    try:
        law = fit(points)
    except ValueError as error:
        lines.append(f"No law was fitted: {error}.")
    else:
        laws = bootstrap(points, law, draws=draws)
        fitted["irreducible"] = interval(law.irreducible, [other.irreducible for other in laws])
        for name, term in law.terms.items():
            terms = [other.terms[name] for other in laws]
            fitted[f"{name}_exponent"] = interval(term.exponent, [drawn.exponent for drawn in terms])
            fitted[f"{name}_coefficient"] = interval(term.plain, [drawn.plain for drawn in terms])
        draw_law(points, law, laws, out / "scaling.png")
        lines += [
            _law_table(fitted),
            next_budget(points, law),
            "![Loss over parameters, pictures and compute](scaling.png)",
        ]
    write_record(record.model_copy(update={"law": fitted}), out)
    text = "\n\n".join(lines) + "\n"
    write_atomic(out / "scaling.md", text.encode())
    return text


def network_table(record: ScalingRecord, costs: Mapping[str, StageCost]) -> str:
    """Return a Markdown table of the networks: size, cost, and the last loss for each amount of pictures."""
    last = {look.run: look for look in sorted(record.looks, key=lambda look: look.step)}
    amounts = sorted({look.pictures for look in last.values()}, reverse=True)
    titles = [f"loss, {pictures} pictures" for pictures in amounts]
    lines = [
        " | ".join(["| ", "parameters", "GFLOPs a row", "training memory", "images/s", "steps", *titles])
        + " |",
        "|---" + "|---:" * (5 + len(titles)) + "|",
    ]
    for name, cost in costs.items():
        by_amount = {look.pictures: look for look in last.values() if look.model == name}
        some = next(iter(by_amount.values()))
        cells = [
            name,
            f"{some.parameters / 1e6:.2f} M",
            f"{2 * cost.macs / 1e9:.3f}",
            f"{cost.memory.total / 2**20:.0f} MiB",
            f"{cost.images_per_s:.0f}",
            f"{some.step}",
            *(f"{by_amount[pictures].loss:.4f}" for pictures in amounts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def next_budget(points: Sequence[LossPoint], law: Law) -> str:
    """Return a sentence on what the law says to train next: what doubling each variable is worth."""
    best = min(points, key=lambda point: point.loss)
    gains = sorted(law.gains(best).items(), key=lambda gain: -gain[1])
    worth = ", ".join(f"{name} {gain:.4f}" for name, gain in gains)
    return (
        f"From the best run ({best.run}, loss {best.loss:.4f}) the law takes off the loss for twice as many: "
        f"{worth}. The next budget goes to {gains[0][0]} first."
    )


def _law_table(fitted: Mapping[str, tuple[float, float, float]]) -> str:
    header = "| DiTs: L = Σ coefficient · variable^−exponent + irreducible | fit | 90 % of runs drawn again |"
    rows = [
        f"| {name.replace('_', ' ')} | {value:.4g} | {low:.4g} – {high:.4g} |"
        for name, (value, low, high) in fitted.items()
    ]
    return "\n".join([header, "|---|---:|---:|", *rows])


def interval(fitted: float, drawn: Sequence[float]) -> tuple[float, float, float]:
    """Return the fitted number, and the bounds of the middle 90 % of the drawn ones."""
    low, high = np.quantile(drawn, [0.05, 0.95])
    return fitted, float(low), float(high)
