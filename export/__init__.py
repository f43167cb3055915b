"""Exports of trained models: ONNX graphs, INT8 graphs and TensorRT engines, each checked against torch.

This package imports `model` and never `service`: the two meet in the bundle.
"""
