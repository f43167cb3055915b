"""Delivery: how much of a request's time is left for the way of its images to the client."""

from __future__ import annotations

import pytest

from ditserve.service.planning.delivery import LONGEST_S, MOST, Delivery


def test_the_room_is_as_in_the_worked_example() -> None:
    delivery = Delivery()
    assert delivery.room_s(4.0) == 0.0
    for _ in range(200):
        delivery.observe(0.02)
        delivery.observe(0.04)
    assert delivery.room_s(4.0) == pytest.approx(0.07, abs=0.005)
    assert delivery.room_s(0.2) == pytest.approx(0.05)
    assert delivery.room_s(-1.0) == 0.0


def test_an_outage_is_forgotten() -> None:
    delivery = Delivery()
    for _ in range(50):
        delivery.observe(100.0)
    assert delivery.room_s(100.0) <= 5 * LONGEST_S
    assert delivery.room_s(1.0) == MOST
    for _ in range(200):
        delivery.observe(-0.001)
    assert delivery.room_s(100.0) < 0.01
