"""Metrics, traces, logs and GPU memory."""
