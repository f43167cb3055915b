"""Scaling laws: networks of several sizes trained with equal compute; `python -m model.scaling`."""
