"""Imported diffusers pipelines: their unmodified modules, as what a bundle needs of a model.

`network` holds the transformer, `adapters` asks it, one function a family; `texts` encodes prompts with the
pipeline's own code, `decoder` holds the autoencoder.
"""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
