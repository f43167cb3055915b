"""Callbacks: how the senders of jobs are told that these have ended."""
