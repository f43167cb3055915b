"""Serving of Diffusion Transformers: HTTP → Redis → step-level engine → image."""

# `python -m service` begins here, and imports libraries before other parts of `ditserve`.
import ditserve  # noqa: F401
