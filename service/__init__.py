"""Serving of Diffusion Transformers: HTTP → Redis → step-level engine → image."""
