"""A neighbour on the machine: it burns processor time in bursts whose lengths are heavy-tailed.

    python -m ditserve.bench.load.neighbour SEED

It burns and rests by turns, half of the time each on average, until it is killed or its parent is gone.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence

TAIL = 1.5  # exponent of the Pareto law of the lengths: their variance is infinite
SHORTEST_S, LONGEST_S = 0.1, 6.0


def main(arguments: Sequence[str]) -> None:
    draw, parent = random.Random(int(arguments[0])), os.getppid()
    while os.getppid() == parent:
        burnt = time.monotonic() + _length_s(draw)
        while time.monotonic() < burnt:
            pass
        time.sleep(_length_s(draw))


def _length_s(draw: random.Random) -> float:
    return min(LONGEST_S, SHORTEST_S * draw.paretovariate(TAIL))


if __name__ == "__main__":
    main(sys.argv[1:])
