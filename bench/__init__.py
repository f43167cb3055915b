"""The benchmarks: measurements of the service, and of what its policies depend on."""
