"""Process supervision: the private Valkey, worker processes, and engines built before a worker starts."""
