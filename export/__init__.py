"""From trained weights to what a machine runs: ONNX graphs, INT8 graphs, TensorRT engines, each checked against torch.

Imports `model`; never `service`: the two meet in the bundle.
"""
