"""The simulator: the service's own scheduler and planner against recorded step times."""
