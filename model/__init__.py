"""Diffusion Transformers: networks, data, training, sampling, evaluation. Nothing here knows of serving."""
