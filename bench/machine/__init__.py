"""Denoising steps against the machine's matrix-multiply peak; `python -m bench.machine`."""
