"""TensorRT engines: built, verified and listed. A user of ONNX never opens this folder."""
