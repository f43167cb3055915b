"""TensorRT engines: how one is built, tried out and stored. A user of ONNX never opens this folder."""
