"""Serve Diffusion Transformers: `ditserve.model`, `ditserve.export`, `ditserve.service` and `ditserve.bench`.

In a checkout they are links to the folders beside this one; in the wheel they are the folders themselves.
"""

import os

# ONNX Runtime, from its import on, and the libraries of Hugging Face would call telemetry hosts.
for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_switch, "1")
