"""Denoising offline: a network, a solver and a grid turn noise into pictures."""
