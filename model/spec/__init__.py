"""What a model is, without torch: bundles, noise processes, solvers, mixing, network configurations. All that
`service` may import.
"""
