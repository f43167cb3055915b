"""Several processes: process groups, data, sharded and tensor parallelism, precision."""
