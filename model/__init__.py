"""Diffusion Transformers: networks, data, training, sampling, evaluation. Nothing here knows of serving."""

# `python -m model.sample` begins here, and imports libraries before other parts of `ditserve`.
import ditserve  # noqa: F401
