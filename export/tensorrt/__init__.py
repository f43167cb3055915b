"""TensorRT engines: their build, trial and storage. A user of ONNX never opens this folder."""
