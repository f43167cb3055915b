"""Exports of trained models: ONNX graphs, INT8 graphs and TensorRT engines, each checked against torch.

This package imports `model` and never `service`: the two meet in the bundle.
"""

# `python -m export.int8` begins here, and imports libraries before other parts of `ditserve`.
import ditserve  # noqa: F401
