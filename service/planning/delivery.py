"""Delivery: how long an image is under way from its last step to the answer that holds it.

It is decoded and encoded, which workers reckon with (`CostModel.decode_s`), and also stored, announced, read
by the API and written. Beside neighbours every one of these waits for a processor, so a job that is denoised
at its deadline is late. Pure: times are arguments.
"""

from __future__ import annotations

LEARN = 0.05  # the weight of one delivery
DEVIATIONS = 4.0  # that are left as room beyond the mean
LONGEST_S = 1.0  # a longer one, as after an outage of Redis, counts as this much
MOST = 0.25  # share of a request's own time that is left at most


class Delivery:
    """The recent deliveries of one process, without decoding: their mean and their mean deviation from it.

    The room for them is reckoned as TCP reckons its retransmission timer (Jacobson 1988).

    Example: deliveries take 20 and 40 ms by turns. Their mean is 30 ms and their deviation 10 ms, so the
    images of a request that is due in 4 s are to be denoised 30 + 4 · 10 = 70 ms before. Those of one that is
    due in 0.2 s are to be denoised 0.25 · 0.2 s = 50 ms before.
    """

    def __init__(self) -> None:
        self._mean_s = self._deviation_s = 0.0

    def room_s(self, within_s: float) -> float:
        """Return the seconds to leave of those that a request has in all."""
        return min(self._mean_s + DEVIATIONS * self._deviation_s, MOST * max(0.0, within_s))

    def observe(self, seconds: float) -> None:
        """Learn from one delivery."""
        seconds = min(max(0.0, seconds), LONGEST_S)
        self._deviation_s += LEARN * (abs(seconds - self._mean_s) - self._deviation_s)
        self._mean_s += LEARN * (seconds - self._mean_s)
