"""The benchmarks: measurements of the service, and of what its policies depend on."""

# `python -m bench.machine` begins here, and imports libraries before other parts of `ditserve`.
import ditserve  # noqa: F401
