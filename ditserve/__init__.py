"""Serve Diffusion Transformers: `ditserve.model`, `ditserve.export`, `ditserve.service` and `ditserve.bench`.

In a checkout they are links to the folders beside this one; in the wheel they are the folders themselves.
"""

import os

# ONNX Runtime writes to the user's cache and calls a telemetry host from its import on, unless this says no.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
