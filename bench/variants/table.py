"""The measured variants as a table and as a figure."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditserve.bench import report
from ditserve.bench.plots import Panel, draw_panels
from ditserve.bench.variants.forward import SCAN, ForwardCost

MIB = 1 << 20
# A variant is faster that takes less than this share of the time of the plain DiT.
FASTER = 0.95


@dataclass(frozen=True, slots=True)
class VariantResult:
    """A variant: the cost of a row, and its held-out losses and Fréchet distances, one for each seed.

    `beside` is the plain DiT that it is compared with.
    """

    name: str
    beside: str
    tokens: int
    parameters: int
    macs: int
    attention_macs: int
    convolution_macs: int
    steps: int
    losses: Sequence[float]
    distances: Sequence[float]
    row_ms: float
    inference_bytes: int
    training_bytes: int


def markdown(
    trained: Sequence[VariantResult], forward: Sequence[ForwardCost], options: argparse.Namespace
) -> str:
    """Return the two tables, of what was trained and of a row alone."""
    machine = (
        f"On {report.machine()['processor']}, {options.threads} of {os.cpu_count()} cores at a load average "
        f"of {os.getloadavg()[0]:.1f}. Times are the processor's."
    )
    parts = ["# Variants of the network", machine]
    if trained:
        parts += [
            f"Each network was trained with {options.flops:.3g} floating-point operations, and with "
            f"{_seeds(trained, options.seeds)}. Loss: of held-out pairs. Fréchet: of {options.pictures} "
            "pictures. The shares after the multiply-adds are those of attention and of convolutions. "
            "Memory: of a row's activations, when it is drawn and trained.",
            _trained_table(trained),
            _verdict(trained),
            "![Distance and time of a row](variants-trained.png)",
        ]
    parts += [
        "A row alone, in networks of two blocks of width 192 that are not trained: milliseconds, the growth "
        f"of resident memory, and milliseconds of training it. {SCAN.capitalize()}: a loop over the tokens, "
        "which is why it is no option of the network.",
        _forward_table(forward),
        "![Time and memory of a row by its tokens](variants.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _trained_table(trained: Sequence[VariantResult]) -> str:
    head = "variant|tokens|parameters|GMACs a row|steps|loss|Fréchet|ms a row|MiB drawn|MiB trained"
    rows = [
        "|".join(
            [
                each.name,
                f"{each.tokens:,}",
                f"{each.parameters / 1e6:.2f} M",
                f"{each.macs / 1e9:.3f} ({each.attention_macs / each.macs:.0%}, "
                f"{each.convolution_macs / each.macs:.0%})",
                f"{each.steps:,}",
                _spread(each.losses, 4),
                _spread(each.distances, 2),
                f"{each.row_ms:.2f}",
                f"{each.inference_bytes / MIB:.1f}",
                f"{each.training_bytes / MIB:.1f}",
            ]
        )
        for each in trained
    ]
    return _table(head, rows)


def _seeds(trained: Sequence[VariantResult], planned: int) -> str:
    """Return how many seeds stand behind the figures."""
    done = sorted({len(each.distances) for each in trained})
    counts = " or ".join(map(str, done))
    return f"{counts} of {planned} seeds" + (", the first rows with more" if len(done) > 1 else "")


def _verdict(trained: Sequence[VariantResult]) -> str:
    """Return a sentence on the variants that pay, and on those that do not."""
    plain = {each.name: each for each in trained}
    told = {True: list[str](), False: list[str]()}
    for each in trained:
        if each.beside != each.name and len(each.distances) > 1:
            told[_pays(each, plain[each.beside])].append(each.name)
    if not any(told.values()):
        return "One seed tells no variant from another."
    pays, not_pays = ("; ".join(names) or "none" for names in told.values())
    return (
        "A variant pays that is nearer to the training pictures than the plain DiT before it in the table, "
        f"and takes no more time a row; or that takes less than {FASTER} of its time, and is no farther. "
        "Nearer and farther are by more than two standard errors of the difference. "
        f"**Pay: {pays}. Do not: {not_pays}.**"
    )


def _pays(each: VariantResult, plain: VariantResult) -> bool:
    """Say of a variant with several seeds if it is nearer or faster than the plain DiT, and not worse."""
    errors = (
        np.var(of.distances, ddof=1) / len(of.distances) for of in (each, plain) if len(of.distances) > 1
    )
    least = 2 * sum(errors) ** 0.5
    farther, time = np.mean(each.distances) - np.mean(plain.distances), each.row_ms / plain.row_ms
    return bool((farther < -least and time <= 1.0) or (farther <= least and time < FASTER))


def _spread(values: Sequence[float], digits: int) -> str:
    """Return the mean, and the standard deviation if there are several."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _forward_table(forward: Sequence[ForwardCost]) -> str:
    tokens = sorted({each.tokens for each in forward})
    trained = sorted({each.tokens for each in forward if each.training_ms is not None})
    figures = (("ms", _milliseconds, tokens), ("MiB", _mebibytes, tokens), ("trained ms", _training, trained))
    rows = []
    for name in dict.fromkeys(each.network for each in forward):
        costs = {each.tokens: each for each in forward if each.network == name}
        cells = [name]
        for _, figure, counts in figures:
            cells += [figure(costs[count]) if count in costs else "" for count in counts]
        rows.append("|".join(cells))
    head = [f"{unit}, {count:,}" for unit, _, counts in figures for count in counts]
    return _table("|".join(["network", *head]), rows)


def _milliseconds(cost: ForwardCost) -> str:
    return f"{cost.forward_ms:.0f}"


def _mebibytes(cost: ForwardCost) -> str:
    return f"{cost.forward_bytes / MIB:.0f}"


def _training(cost: ForwardCost) -> str:
    return "" if cost.training_ms is None else f"{cost.training_ms:.0f}"


def _table(head: str, rows: Sequence[str]) -> str:
    columns = head.count("|")
    return "\n".join(f"|{line}|" for line in [head, "---" + "|---:" * columns, *rows])


def draw(trained: Sequence[VariantResult], forward: Sequence[ForwardCost], target: Path) -> None:
    """Draw time and memory of a row over its tokens, and the distance over the time of a row."""
    names = list(dict.fromkeys(each.network for each in forward))
    milliseconds = {
        name: [(float(c.tokens), c.forward_ms) for c in forward if c.network == name] for name in names
    }
    # What does not grow cannot be drawn on a logarithmic axis.
    mebibytes = {
        name: [(float(c.tokens), max(c.forward_bytes, MIB) / MIB) for c in forward if c.network == name]
        for name in names
    }
    costs = [Panel("ms a row, by tokens", milliseconds), Panel("MiB a row, by tokens", mebibytes)]
    draw_panels([costs], target, size=(11, 5), legend_columns=4, dpi=110, x="tokens", log=True)
    if trained:
        points = {each.name: [(each.row_ms, float(np.mean(each.distances)))] for each in trained}
        draw_panels(
            [[Panel("Fréchet distance, by ms a row", points)]],
            target.with_name(f"{target.stem}-trained{target.suffix}"),
            size=(8, 7), legend_columns=3, dpi=110, x="ms a row", log=True,
        )  # fmt: skip
