"""Several processes: process groups, and data, sharded and tensor parallelism."""
