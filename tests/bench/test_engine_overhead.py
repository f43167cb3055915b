"""The engine's own time stays small beside any network's."""

from __future__ import annotations

import numpy as np

from bench.engine_overhead import measure
from model.config import DiTConfig


def test_a_step_of_eight_rows_costs_little() -> None:
    config = DiTConfig(
        image_size=(32, 32), hidden_size=64, depth=4, num_heads=4, classes=(5,), learn_sigma=False
    )
    times = measure(config, rows=8, steps=100)
    assert len(times) >= 50
    assert np.median(times) < 5.0  # milliseconds; the bar is 1, this is for machines busy with something else
