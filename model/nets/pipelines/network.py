"""The transformer of an imported pipeline, with the methods of this project's networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from ditserve.model.nets.pipelines.adapters import ADAPTERS, Rows
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.pipeline_config import FAMILIES, PipelineConfig


class PipelineError(ModelError):
    """A part of an imported pipeline that cannot be opened; the message is one sentence that names it."""


class PipelineNetwork(nn.Module):
    """An unmodified transformer of diffusers that is asked by the adapter of its family.

    The condition state is the text itself and what the network is told of the noise: these transformers
    compute their modulations themselves. Inputs and outputs are fp32, whatever the module computes in.
    `guidance` is the scale that conditions have which are told none.
    """

    def __init__(self, transformer: nn.Module, config: PipelineConfig) -> None:
        super().__init__()
        self.transformer, self.config = transformer, config
        self.guidance = 0.0
        self._names = [name for name, _ in config.state()]
        self._ask = ADAPTERS[config.family]

    def embed(self, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the conditions (N, E) of encoded texts (N, text_width), and of the guidance scale."""
        config = self.config
        if text is None:
            text = torch.zeros(len(labels), config.text_width, device=labels.device)
        return nn.functional.pad(text, (0, config.embedding_size - config.text_width), value=self.guidance)

    def modulate(self, timesteps: Tensor, embeddings: Tensor) -> list[Tensor]:
        """Return the condition state of noise levels (N,) as the network is told them, and conditions."""
        shapes = [shape for _, shape in self.config.state()[1:]]
        parts = embeddings.split([torch.Size(shape).numel() for shape in shapes], dim=1)
        return [timesteps, *(part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True))]

    def backbone(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Return the output (N, C_out, H, W) for latents (N, C, H, W) and their condition state."""
        named = dict(zip(self._names, state, strict=True))
        dtype = next(self.transformer.parameters()).dtype
        mask, pooled = named.get("mask"), named.get("pooled")
        rows = Rows(
            x=x.to(dtype),
            noise=named["noise"],
            text=named["text"].to(dtype),
            mask=mask,
            pooled=None if pooled is None else pooled.to(dtype),
            guidance=named.get("guidance"),
            factor=self.config.factor,
        )
        return self._ask(self.transformer, rows).float()

    def compile_blocks(self) -> None:
        """Compile the blocks, which the transformers of all families hold in lists.

        Blocks of a kind share their code. Between them some transformers count the tokens of each row in
        Python, which compiled as a whole would be compiled again for every combination of lengths.
        """
        for part in self.transformer.children():
            for block in part if isinstance(part, nn.ModuleList) else ():
                block.compile(dynamic=True)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the output for latents, noise levels and encoded texts, without guidance."""
        return self.backbone(x, self.modulate(timesteps, self.embed(labels, text)))


def open_network(
    folder: Path, config: PipelineConfig, *, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> PipelineNetwork:
    """Open the transformer in the folder of a pipeline.

    Its files are mapped into memory and read tensor by tensor, so that the weights are never held twice.

    Raises:
        PipelineError: it cannot be read, or is not what the configuration says.
    """
    module_type = getattr(diffusers, FAMILIES[config.family].transformer)
    module = open_module(module_type, folder / "transformer", dtype=dtype)
    return PipelineNetwork(module.to(device), config)


def quiet() -> None:
    """Keep bars and warnings of diffusers and transformers, which hold prompts, out of a service's log."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def open_module(module_type: Any, folder: Path, **options: Any) -> nn.Module:
    """Open a module of diffusers from its folder, in evaluation mode; nothing is downloaded or unpickled.

    Raises:
        PipelineError: it cannot be read.
    """
    known: Mapping[str, Any] = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": True}
    dtype = options.pop("dtype", torch.float32)
    quiet()
    try:
        module = module_type.from_pretrained(str(folder), torch_dtype=dtype, **known, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise PipelineError(f"{folder} cannot be opened: {' '.join(str(error).split())}") from error
    network: nn.Module = module
    # What the files do not hold stays without memory.
    missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if missing:
        raise PipelineError(f"{folder} lacks the weights of {len(missing)} tensors, such as {missing[0]}")
    return network.eval().requires_grad_(False)
