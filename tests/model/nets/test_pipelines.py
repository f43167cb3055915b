"""Adapters of imported pipelines: rows in company are the rows alone, padding is not looked at where it is
masked, and prompts are encoded as the pipeline encodes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ditserve.model.nets.pipelines.network import PipelineNetwork, open_network
from ditserve.model.nets.pipelines.texts import PipelineTexts
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import read_pipeline
from tests.tiny_pipelines import BUILDERS, save_pipeline, tokens

PROMPTS = ("a red fox in the snow", "a cat", "the moon of a blue cat")
SIDE = 8


class Opened:
    """A pipeline, and its network and its texts opened from its folder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.pipeline = save_pipeline(family, folder)
        found = read_pipeline(folder, name="tiny", licence="x", size=(SIDE, SIDE), tokens=tokens(family))
        assert isinstance(found.manifest.config, PipelineConfig)
        self.config, self.diffusion = found.manifest.config, found.manifest.diffusion
        self.network: PipelineNetwork = open_network(folder, self.config, dtype=torch.float32)
        self.texts = PipelineTexts(folder, self.config, "")

    def encoded(self, *prompts: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.texts.encode(prompt) for prompt in prompts]))

    def ask(self, x: torch.Tensor, levels: list[float], texts: torch.Tensor) -> torch.Tensor:
        told = torch.from_numpy(self.diffusion.noise_schedule().told(levels))
        with torch.no_grad():
            embeddings = self.network.embed(torch.zeros(len(x), 0), texts)
            return self.network.backbone(x, self.network.modulate(told, embeddings))


@pytest.fixture(scope="module", params=BUILDERS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp(request.param) / "pipeline")


def test_rows_of_other_levels_and_prompts_are_as_alone(opened: Opened) -> None:
    torch.manual_seed(0)
    x, texts = torch.randn(3, 4, SIDE, SIDE), opened.encoded(*PROMPTS)
    flow = opened.diffusion.schedule == "flow"
    levels = [0.9, 0.5, 0.1] if flow else [900.0, 500.0, 100.0]
    together = opened.ask(x, levels, texts)
    assert together.shape == (3, opened.config.out_channels, SIDE, SIDE)
    for k in range(3):
        alone = opened.ask(x[k : k + 1], levels[k : k + 1], texts[k : k + 1])
        assert (alone[0] - together[k]).abs().max() <= 1e-5 * alone.abs().max()
    # A prompt and a level make a difference.
    swapped = opened.ask(x, levels[::-1], texts), opened.ask(x, levels, texts.roll(1, 0))
    assert min((other - together).abs().max() for other in swapped) > 1e-3
