"""Offline sampling: a network, a solver and a timestep grid turn noise into pictures."""
