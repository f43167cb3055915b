"""The layout of one forward pass: the samples that its rows belong to. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ditserve.service.backends.adapters import RowUses
from ditserve.service.engine.embedding_cache import Condition
from ditserve.service.engine.modulation_cache import ConditionerInput
from ditserve.service.engine.samples import Sample


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The rows of one sample that has several, because it is in windows or composed of conditions.

    They are the rows of its windows for each condition after the other. A latent as a whole is one window.
    """

    sample: Sample
    conditional: slice
    unconditional: slice  # a row a window; empty where guidance does not act


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The rows of one forward pass, by the samples they belong to, in this order:

        one row for each sample of `whole`, of one condition and denoised as a whole
        one unconditional row for each of them that is guided; `guided` has their indices in `whole`
        for each other sample, in `several`, its rows, and then one unconditional row a window if it is guided

    For example, three samples of which the first and the third are guided, an unguided one in four windows,
    and a guided one composed of two conditions, have guided = [0, 2], conditional = 0..3, unconditional =
    3..5, the windows in rows 5..9, the two conditions in 9..11 and what guidance subtracts in row 11: twelve
    rows.
    """

    whole: tuple[Sample, ...]
    guided: list[int]
    several: tuple[SampleRows, ...]
    rows: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> RowLayout:
        """Return the layout of a batch."""
        whole = tuple(sample for sample in samples if sample.one_row)
        guided = [index for index, sample in enumerate(whole) if sample.guided]
        several: list[SampleRows] = []
        rows = len(whole) + len(guided)
        if len(whole) < len(samples):
            for sample in samples:
                if not sample.one_row:
                    middle, end = rows + sample.composed * sample.geometry.rows, rows + sample.rows
                    several.append(SampleRows(sample, slice(rows, middle), slice(middle, end)))
                    rows = end
        return cls(whole, guided, tuple(several), rows)

    @property
    def conditional(self) -> slice:
        return slice(0, len(self.whole))

    @property
    def unconditional(self) -> slice:
        return slice(len(self.whole), len(self.whole) + len(self.guided))

    def conditioner_inputs(self) -> list[ConditionerInput]:
        """Return what each row is conditioned on."""
        inputs = [(sample.told, sample.conditioning.conditions[0]) for sample in self.whole]
        for index in self.guided:
            sample = self.whole[index]
            inputs.append((sample.told, sample.conditioning.unconditional))
        for rows in self.several:
            inputs += _inputs_of(rows.sample)
        return inputs

    def owners(self) -> list[tuple[Sample, int]]:
        """Return the sample of each row, and which of its rows it is."""
        owners = [(sample, 0) for sample in self.whole]
        owners += [(self.whole[index], 1) for index in self.guided]
        for rows in self.several:
            owners += [(rows.sample, row) for row in range(rows.sample.rows)]
        return owners

    def adapters(self) -> list[RowUses]:
        """Return the adapters of each row. What guidance subtracts is predicted with them too."""
        uses = [sample.request.adapters for sample in self.whole]
        uses += [self.whole[index].request.adapters for index in self.guided]
        for rows in self.several:
            uses += [rows.sample.request.adapters] * rows.sample.rows
        return uses


def upcoming_inputs(samples: Sequence[Sample], steps: int, *, after: int = 1) -> Iterator[ConditionerInput]:
    """Yield what samples need from the conditioner in `steps` steps from `after` on, soonest first."""
    for ahead in range(after, after + steps):
        for sample in samples:
            trajectory, step = sample.trajectory, sample.cursor + ahead
            if step < len(trajectory) and trajectory.backbones[step] == sample.backbone:
                for condition in sample.conditioning.conditions:
                    yield trajectory.told[step], condition
                if trajectory.guided[step]:
                    yield trajectory.told[step], sample.conditioning.unconditional


def _inputs_of(sample: Sample) -> list[ConditionerInput]:
    """Return the inputs of a sample of several rows, in the order of its rows."""
    conditions: tuple[Condition, ...] = sample.conditioning.conditions
    if sample.guided:
        conditions += (sample.conditioning.unconditional,)
    return [(sample.told, condition) for condition in conditions for _ in range(sample.geometry.rows)]
