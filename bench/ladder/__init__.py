"""Measurement of a bundle's quality ladder; `python -m bench.ladder`."""
