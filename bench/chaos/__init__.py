"""Faults under load, and clients that check every answer; `python -m bench.chaos`."""
