"""The cost model: how long a step takes, learned while serving.

A machine's step time is close to a line in its rows, t = fixed + per_row · rows. But the batch size from
which more rows no longer pay, where the machine saturates, is misplaced by the line alone (padding, waves of
GPU blocks). So each batch size that was run is remembered by itself, and the line through them (least
squares, clamped) serves the sizes never run.

Beside its pass a step takes time of the host (solvers, reports, a contended interpreter), which does not grow
with the rows. Charged to the pass it would make large batches seem as dear by the row as small ones. Where
the pass runs on a device that the host does not wait for, a step takes the longer of the two.

Beside neighbours a pass of many rows is always interrupted, one of few rows seldom. So the time in which the
thread waited for a processor is no part of what a size takes; it slows the pace.

All sizes share one pace that follows the machine (neighbours, clocks, heat). It is the work done in a second
of wall time, so a stall counts for as long as it lasts, where a mean over passes would hardly see it. Two
windows are kept, and the slower one counts: a neighbour that comes is believed within seconds, one that goes
only when it stays away.

Recursive least squares over single steps, with forgetting, was tried and is not used: on batches that
alternate between 7 and 8 rows it forgets the slope, and the best batch it derives wanders between 1 and 12.

Pure: observations come in as arguments.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from ditserve.service.fleet import SlowSpell
from ditserve.service.planning.pace import PaceRecord, PaceWindow

SATURATION = 0.95  # share of the best rows per second at which a batch counts as worthwhile
FOLLOW = 0.05  # share of a surprise that goes to the typical speed of all sizes
LEARN = 0.01  # share of a surprise that goes to the one batch size
HOST_SMOOTHING = 0.02
FIRST_PASSES = 5  # of a batch size: the fastest of them is remembered, because the others may be stalls
DECODE_SMOOTHING = 0.1

_MAX_SURPRISE = 4.0  # a step slower or faster than typical by more than this counts as this much
_LONGEST_STALL_S = (
    1.0  # a longer pass than this counts as this much, or as `_MAX_SURPRISE` of what it should be
)
_SLOWED = 0.9  # the pace below which an idle machine should be looked at again
_LEAST_S = 1e-9  # no step and no row takes less


@dataclass(frozen=True, slots=True)
class Waits:
    """The seconds of a step for which its thread, ready to run, waited for a processor.

    `pass_s` of them were in its forward pass, `host_s` beside it.
    """

    pass_s: float = 0.0
    host_s: float = 0.0


NO_WAITS = Waits()


class CostModel:
    """The seconds of one step by its rows, and the seconds of one decode.

    The line of the first guess keeps its shape until batches of two sizes have been observed.
    """

    def __init__(self, *, fixed_s: float = 0.005, per_row_s: float = 0.02, decode_s: float = 0.0) -> None:
        if fixed_s < 0 or per_row_s <= 0 or decode_s < 0:
            raise ValueError("a step cannot take negative time, and a row cannot be free")
        self._guess = fixed_s, per_row_s
        self._line = fixed_s, per_row_s  # at speed 1
        self._typical = 1.0  # how many times as long as at speed 1 most passes take now
        self._windows = PaceWindow(2.0, passes=10), PaceWindow(20.0, passes=40)
        self._record = PaceRecord()
        self._sizes: list[int] = []  # observed, ascending
        self._seconds: dict[int, float] = {}  # by observed size, at speed 1
        self._passes: dict[int, int] = {}  # by observed size, up to `FIRST_PASSES`
        self._host_s = 0.0  # of a step beside its pass, at speed 1
        self._host_steps = 0  # up to `FIRST_PASSES`
        self._overlaps = False  # the host works while the device does
        self._decode_s = decode_s
        self._decodes = 0
        self._image_rows = 0.0  # of all its steps; 0: not known

    @property
    def fixed_s(self) -> float:
        return self._whole(self._line[0]) / self._pace

    @property
    def per_row_s(self) -> float:
        return self._line[1] / self._pace

    def line(self, rows: int) -> tuple[float, float]:
        """Return (fixed, per row) of the line through the steps of one row and of `rows` rows.

        Where batches have that many rows it is exact, while `fixed_s` and `per_row_s` look at all sizes.
        Example: steps of 1, 10 and 64 rows take 2, 5 and 50 ms. Through those of 1 and 10 rows a row costs
        (5 - 2) / 9 = 0.33 ms, and the rest of 1.67 ms is fixed.

        Images are decoded and encoded one after the other, beside the steps. Where that takes longer, it is
        what the rows cost. Example: images have 30 rows and take 24 ms, so 10 rows cost 8 ms, not 5.
        """
        one, all_rows = self.predict(1), self.predict(rows)
        if self._image_rows:
            all_rows = max(all_rows, rows * self._decode_s / self._image_rows)
        per_row = min(max(_LEAST_S, (all_rows - one) / (rows - 1)), all_rows / rows) if rows > 1 else one
        return max(0.0, all_rows - rows * per_row), per_row

    @property
    def decode_s(self) -> float:
        return self._decode_s

    def predict(self, rows: int) -> float:
        """Return the seconds of a step of `rows` rows."""
        pass_s = self._at_speed_one(rows)
        # Asked many times a step: `_whole`, written out.
        whole_s = max(pass_s, self._host_s) if self._overlaps else pass_s + self._host_s
        return whole_s / self._pace

    @property
    def slowed(self) -> bool:
        """Return whether the machine is, or may be, clearly slower than its steps at speed 1."""
        return min(self._pace, self._record.slowest) < _SLOWED

    def slow_spells(self) -> tuple[SlowSpell, ...]:
        """Return how many times as long as predicted passes may take, over short and over long times."""
        pace = self._pace
        return tuple(SlowSpell(over_s, max(1.0, pace / slow)) for over_s, slow in self._record.slow())

    def saturation_rows(self, max_rows: int) -> int:
        """Return B*: the smallest batch within 5 % of the best rows per second of any up to `max_rows`.

        Example: passes of 1, 2, 4 and 8 rows take 1.0, 1.1, 1.3 and 2.5 s, which is 1.0, 1.8, 3.1 and 3.2
        rows a second. 95 % of 3.2 is 3.04, so 4 rows saturate the machine.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, not {max_rows}")
        passes_s = [self._at_speed_one(rows) for rows in range(1, max_rows + 1)]
        host_s, overlaps = self._host_s, self._overlaps
        rates = [
            rows / (max(pass_s, host_s) if overlaps else pass_s + host_s)
            for rows, pass_s in enumerate(passes_s, start=1)
        ]
        enough = SATURATION * max(rates)
        return next(rows for rows, rate in enumerate(rates, start=1) if rate >= enough)

    def scaled(self, factor: float) -> CostModel:
        """Return a cost model whose first guess is this one, for rows of `factor` times as much work."""
        return CostModel(fixed_s=self.fixed_s, per_row_s=self.per_row_s * factor, decode_s=self.decode_s)

    def observe(
        self,
        rows: int,
        seconds: float,
        host_s: float = 0.0,
        *,
        waits: Waits = NO_WAITS,
        device_s: float | None = None,
    ) -> None:
        """Learn from a step of `rows` rows, of which `host_s` seconds were spent beside its forward pass.

        `device_s` are those of a pass that ran on a device beside the work of the host, as all do from then
        on: a step takes the longer of the two.

        Example: a step of 8 rows takes 30 ms, 8 of them beside its pass. In its pass it waited 16 ms for a
        processor, and 6 beside. A pass of 8 rows takes 6 ms and the host 2 ms; the pace is 8 / 30.
        """
        if rows < 1 or seconds <= 0:
            return
        whole_s = max(seconds, host_s + _LEAST_S)
        if device_s is not None:
            self._overlaps = True
        beside_s = seconds - host_s - waits.pass_s if device_s is None else device_s
        pass_s = max(beside_s, _LEAST_S)
        host_s = max(host_s - waits.host_s, 0.0)
        passes = self._passes[rows] = min(FIRST_PASSES, self._passes.get(rows, 0)) + 1
        if passes == 1:
            insort(self._sizes, rows)
            self._seconds[rows] = self._between_neighbours(rows, pass_s / self._typical)
        else:
            surprise = pass_s / (self._typical * self._seconds[rows])
            surprise = min(_MAX_SURPRISE, max(1 / _MAX_SURPRISE, surprise))
            if passes <= FIRST_PASSES:
                faster_s = self._seconds[rows] * min(1.0, surprise)
                self._seconds[rows] = self._between_neighbours(rows, faster_s)
            else:
                self._seconds[rows] *= surprise**LEARN
            self._typical *= surprise**FOLLOW
        if host_s > 0:
            self._observe_host(host_s / self._typical)
        self._line = self._fit()
        seconds = min(whole_s, max(_LONGEST_STALL_S, _MAX_SURPRISE * self.predict(rows)))
        work_s = self._whole(self._seconds[rows])
        for window in self._windows:
            window.observe(work_s, seconds)
        self._record.observe(work_s, whole_s)

    def begin_at(self, pace: float) -> None:
        """Take the pace of the warm-up for that of the machine, before the windows have been filled."""
        for window in self._windows:
            window.pace = pace

    def observe_idle(self, rows: int, seconds: float, idle_s: float) -> None:
        """Learn the pace from one pass of `rows` rows after `idle_s` seconds in which none ran.

        Without it a machine once found too slow for any promise would never be found fast again.
        """
        if rows in self._seconds and seconds > 0:
            work_s = self._seconds[rows]
            for window in self._windows:
                window.observe(work_s, seconds, idle_s=idle_s)
            # The time without passes is taken to have been like this one.
            passed_s = seconds + idle_s
            self._record.observe(work_s / seconds * passed_s, passed_s)

    def observe_decode(self, seconds: float) -> None:
        """Learn from the decoding and encoding of one image."""
        self._decodes += 1
        self._decode_s += max(DECODE_SMOOTHING, 1.0 / self._decodes) * (seconds - self._decode_s)

    def observe_image(self, rows: float) -> None:
        """Learn from the rows of all steps of an image that is done."""
        self._image_rows += (DECODE_SMOOTHING if self._image_rows else 1.0) * (rows - self._image_rows)

    def _between_neighbours(self, rows: int, seconds: float) -> float:
        """Return the seconds of a new size, not outside those of the next smaller and larger sizes.

        They were measured more often, and more rows never take less time.
        """
        at = self._sizes.index(rows)
        if not 0 < at < len(self._sizes) - 1:
            return seconds
        low, high = (self._seconds[self._sizes[beside]] for beside in (at - 1, at + 1))
        return max(low, min(seconds, max(low, high)))

    def _observe_host(self, host_s: float) -> None:
        self._host_steps = min(FIRST_PASSES, self._host_steps) + 1
        if self._host_steps == 1:
            self._host_s = host_s
        elif self._host_steps <= FIRST_PASSES:
            self._host_s = min(self._host_s, host_s)
        else:
            self._host_s += HOST_SMOOTHING * (min(host_s, _MAX_SURPRISE * self._host_s) - self._host_s)

    def _whole(self, pass_s: float) -> float:
        """Return the seconds of a step at speed 1 whose pass takes `pass_s`."""
        return max(pass_s, self._host_s) if self._overlaps else pass_s + self._host_s

    @property
    def _pace(self) -> float:
        return min(window.pace for window in self._windows)

    def _at_speed_one(self, rows: int) -> float:
        """Return the seconds of a pass at speed 1.

        They are remembered, or linear between two remembered sizes, or beyond them in proportion to the line.
        """
        known = self._seconds.get(rows)
        if known is not None:
            return known
        fixed, per_row = self._line
        if not self._sizes:
            return fixed + per_row * rows
        after = bisect_left(self._sizes, rows)
        if 0 < after < len(self._sizes):
            less, more = self._sizes[after - 1], self._sizes[after]
            low, high = self._seconds[less], self._seconds[more]
            return low + (high - low) * (rows - less) / (more - less)
        nearest = self._sizes[0] if after == 0 else self._sizes[-1]
        return self._seconds[nearest] * (fixed + per_row * rows) / (fixed + per_row * nearest)

    def _fit(self) -> tuple[float, float]:
        """Return (fixed, per row) of the least-squares line through the remembered sizes.

        Neither is negative, and a row takes at least `_LEAST_S`.
        """
        n = len(self._sizes)
        if n < 2:
            fixed, per_row = self._guess
            rows = self._sizes[0]
            scale = self._seconds[rows] / (fixed + per_row * rows)
            return fixed * scale, per_row * scale
        mean_rows = sum(self._sizes) / n
        mean_s = sum(self._seconds.values()) / n
        spread = sum((rows - mean_rows) ** 2 for rows in self._sizes)
        slope = (
            sum((rows - mean_rows) * (seconds - mean_s) for rows, seconds in self._seconds.items()) / spread
        )
        slope = min(max(_LEAST_S, slope), mean_s / mean_rows)
        return max(0.0, mean_s - slope * mean_rows), slope
