"""Layouts of published weights, to and from ours: the official DiT's and diffusers'."""
