"""The queue in Redis: jobs, leases, events and results; the only room that speaks to it."""
