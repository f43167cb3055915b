"""As much of PromQL as the rules of `deploy/` on load need, evaluated on what was scraped of /metrics.

Selectors with equal labels, `rate` over a window, sums and maxima by labels, quotients, and `>` as a filter.
Anything else is refused. `rate` is the increase between the first and the last sample of the window over the
time between them: that of Prometheus but for its extrapolation to the ends of the window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]


class Scrapes:
    """The samples of all targets, by series and time."""

    def __init__(self) -> None:
        self._series: dict[Labels, list[tuple[float, float]]] = defaultdict(list)

    def add(self, text: str, at: float, target: Mapping[str, str]) -> None:
        """Keep what a target showed; its own labels are added to those of each series."""
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = {**sample.labels, **target, "__name__": sample.name}
                self._series[frozenset(labels.items())].append((at, sample.value))

    def query(self, text: str, at: float) -> Vector:
        return self._evaluate(promql.parse(text), at)

    def value(self, text: str, at: float) -> float:
        """Return the value of a query that has one series, as KEDA reads it; 0 for none."""
        values = [*self.query(text, at).values()]
        assert len(values) <= 1, f"{text} has {len(values)} series"
        return values[0] if values else 0.0

    def _evaluate(self, node: Any, at: float) -> Vector:
        if isinstance(node, promql.VectorSelector):
            return {
                labels: [value for time, value in samples if time <= at][-1]
                for labels, samples in self._matching(node).items()
                if samples[0][0] <= at
            }
        if isinstance(node, promql.Call):
            assert node.func.name == "rate"
            return self._rate(node.args[0], at)
        if isinstance(node, promql.AggregateExpr):
            kept = set(node.modifier.labels) if node.modifier else set()
            groups: dict[Labels, list[float]] = defaultdict(list)
            for labels, value in self._evaluate(node.expr, at).items():
                groups[frozenset(label for label in labels if label[0] in kept)].append(value)
            assert str(node.op) in ("sum", "max"), f"not known here: {node}"
            total = str(node.op) == "sum"
            return {labels: sum(values) if total else max(values) for labels, values in groups.items()}
        if isinstance(node, promql.BinaryExpr):
            return self._compare_or_divide(node, at)
        raise AssertionError(f"not known here: {node}")

    def _compare_or_divide(self, node: Any, at: float) -> Vector:
        left = self._evaluate(node.lhs, at)
        if str(node.op) == ">":
            return {labels: value for labels, value in left.items() if value > node.rhs.val}
        assert str(node.op) == "/", f"not known here: {node}"
        right = self._evaluate(node.rhs, at)
        return {labels: left[labels] / right[labels] for labels in left.keys() & right.keys()}

    def _matching(self, selector: Any) -> dict[Labels, list[tuple[float, float]]]:
        wanted = {("__name__", selector.name)}
        for matcher in selector.matchers.matchers:
            assert matcher.op == promql.MatchOp.Equal, f"not known here: {selector}"
            wanted.add((matcher.name, matcher.value))
        return {
            frozenset(label for label in labels if label[0] != "__name__"): samples
            for labels, samples in self._series.items()
            if wanted <= labels
        }

    def _rate(self, selector: Any, at: float) -> Vector:
        window_s, rates = selector.range.total_seconds(), {}
        for labels, samples in self._matching(selector.vector_selector).items():
            inside = [sample for sample in samples if at - window_s <= sample[0] <= at]
            if len(inside) >= 2:
                # A counter that falls began anew at 0.
                growth = sum(new - old if new >= old else new for (_, old), (_, new) in pairwise(inside))
                rates[labels] = growth / (inside[-1][0] - inside[0][0])
        return rates
