"""The parts of a model that need no torch: bundles, noise schedules, solvers, mixing, network configurations.

`service` may import this folder and nothing else of `model`.
"""
