"""The worker process: claims jobs, drives the engine, stores results."""
