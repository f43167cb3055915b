"""The layout of one forward pass: the samples that its rows belong to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditserve.model.spec.windows import Windows
from ditserve.service.engine.conditions import Condition, ConditionerInput
from ditserve.service.engine.samples import Sample


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The rows of one sample in windows: one a window, and as many unconditional ones if it is guided."""

    sample: Sample
    windows: Windows
    conditional: slice
    unconditional: slice  # empty where guidance does not act


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of one forward pass, by the samples they belong to, in this order:

        one row for each sample of `whole`, denoised as a whole
        one unconditional row for each of them that is guided; `guided` has their indices in `whole`
        for each sample of `windowed` the rows of its windows, then as many unconditional ones if it is guided

    For example, three samples of which the first and the third are guided, and an unguided one in four
    windows, have guided = [0, 2], conditional = 0..3, unconditional = 3..5 and the windows in rows 5..9: nine
    rows.
    """

    whole: tuple[Sample, ...]
    guided: list[int]
    windowed: tuple[WindowRows, ...]
    rows: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> RowLayout:
        """Return the layout of a batch."""
        whole = tuple(sample for sample in samples if sample.geometry.windows is None)
        guided = [index for index, sample in enumerate(whole) if sample.guided]
        windowed: list[WindowRows] = []
        rows = len(whole) + len(guided)
        for sample in samples:
            windows = sample.geometry.windows
            if windows is not None:
                middle, end = rows + len(windows), rows + sample.rows
                windowed.append(WindowRows(sample, windows, slice(rows, middle), slice(middle, end)))
                rows = end
        return cls(whole, guided, tuple(windowed), rows)

    @property
    def conditional(self) -> slice:
        return slice(0, len(self.whole))

    @property
    def unconditional(self) -> slice:
        return slice(len(self.whole), len(self.whole) + len(self.guided))

    def conditioner_inputs(self, null: Condition) -> list[ConditionerInput]:
        """Return what each row is conditioned on; unconditional rows have the condition `null`."""
        inputs = [(sample.told, sample.condition) for sample in self.whole]
        inputs += [(self.whole[index].told, null) for index in self.guided]
        for rows in self.windowed:
            told, n = rows.sample.told, len(rows.windows)
            inputs += n * [(told, rows.sample.condition)]
            if rows.sample.guided:
                inputs += n * [(told, null)]
        return inputs
