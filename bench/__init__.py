"""Measurements: what the service is worth, and the numbers its policies stand on."""
