"""Pruning of heads and MLP channels by importance; `python -m model.prune`."""
