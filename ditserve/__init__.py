"""Serve Diffusion Transformers: `ditserve.model`, `ditserve.export`, `ditserve.service` and `ditserve.bench`.

In a checkout they are links to the folders beside this one; in the wheel they are the folders themselves.
"""
