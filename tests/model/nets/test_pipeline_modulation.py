"""The weights of imported transformers that compute modulations alone, by the inputs of their modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditserve.model import describe
from ditserve.model.nets.pipelines.network import PipelineNetwork, open_network
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_folder import read_pipeline
from ditserve.model.spec.pipeline_weights import weight_sizes
from tests.tiny_pipelines import BUILDERS, save_pipeline, tokens

pytestmark = [
    # ChromaTransformer2DModel has it from where it was.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
ALIKE = {"noise": 0.3, "pooled": 0.1, "guidance": 3.0, "mask": 1.0}


def inputs_of_modules(network: PipelineNetwork, seed: int) -> dict[str, list[torch.Tensor]]:
    """Return the inputs of every module with weights of its own, for latents and tokens of a seed."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
            seen.setdefault(name, []).extend(value.clone() for value in given)

        return hook

    modules = [
        (name, module)
        for name, module in network.transformer.named_modules()
        if name and any(True for _ in module.parameters(recurse=False))
    ]
    handles = [module.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, module in modules]
    generator = torch.Generator().manual_seed(seed)
    state = [
        torch.full((2, *shape), ALIKE[name]) if name in ALIKE else torch.randn(2, *shape, generator=generator)
        for name, shape in network.config.state()
    ]
    with torch.no_grad():
        network.backbone(torch.randn(2, network.config.in_channels, 8, 8, generator=generator), state)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("width", [1536, 3072])
def test_a_modulation_of_a_call_of_other_rows_differs_by_rounding_alone(width: int) -> None:
    """The widths of SD3 and FLUX.1: docs/models.md says why their modulations are not split off."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(width, 6 * width)
    rows = torch.nn.functional.silu(torch.randn(16, width, generator=generator))
    with torch.no_grad():
        whole = layer(rows)
        differences = [torch.cat([layer(part) for part in rows.split(count)]) - whole for count in (1, 3, 8)]
    assert max(float(part.abs().max()) for part in differences) < 2e-6 * float(whole.abs().max())


@pytest.mark.parametrize("family", [name for name in BUILDERS if name != "dit"])
def test_the_modulations_are_what_follows_neither_latents_nor_tokens(
    family: str, tmp_path: Path, capsys: Any
) -> None:
    save_pipeline(family, tmp_path / "pipeline")
    words = tokens(family)
    found = read_pipeline(tmp_path / "pipeline", name="tiny", licence="x", size=(8, 8), tokens=words)
    config = found.manifest.config
    network = open_network(tmp_path / "pipeline", config, dtype=torch.float32)  # type: ignore[arg-type]
    first, second = (inputs_of_modules(network, seed) for seed in (0, 1))
    alike = {
        name
        for name, given in first.items()
        if given and all(torch.equal(one, other) for one, other in zip(given, second[name], strict=True))
    }
    expected = sum(
        parameter.nbytes
        for name in alike
        for parameter in network.transformer.get_submodule(name).parameters(recurse=False)
    )
    sizes = weight_sizes(tmp_path / "pipeline" / "transformer")
    assert sizes.modulation_bytes == expected > 0
    assert sizes.bytes >= sum(parameter.nbytes for parameter in network.parameters())
    write_pipeline_bundle(found, tmp_path / "bundle")
    assert describe.main([str(tmp_path / "bundle")]) == 0
    assert f"({expected / sizes.bytes:.1%})" in capsys.readouterr().out
