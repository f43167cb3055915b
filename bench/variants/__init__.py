"""The variants of the DiT side by side at equal training compute; `python -m bench.variants`."""
