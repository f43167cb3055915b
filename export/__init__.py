"""Exports of trained models: ONNX graphs, INT8 graphs and TensorRT engines, each checked against torch.

This package imports `model` and never `service`: the two meet in the bundle.
"""

# `python -m export.int8` begins here and imports ONNX Runtime first. By then `ditserve` must have set a variable
# for it.
import ditserve  # noqa: F401
