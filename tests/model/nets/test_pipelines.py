"""Adapters of imported pipelines: rows in company are the rows alone, padding is not looked at where it is
masked, and prompts are encoded as the pipeline encodes them.
"""

from __future__ import annotations

import inspect
from inspect import signature
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from ditserve.model.nets.pipelines.decoder import PipelineDecoder
from ditserve.model.nets.pipelines.network import PipelineNetwork, open_network
from ditserve.model.nets.pipelines.texts import PipelineTexts
from ditserve.model.spec.pipeline_config import FAMILIES, NEGATIVE, PipelineConfig
from ditserve.model.spec.pipeline_folder import read_pipeline
from tests.tiny_pipelines import expected_pictures, save_pipeline, tokens

pytestmark = [
    # DPMSolverMultistepScheduler makes an array of a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # ChromaTransformer2DModel has it from where it was.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
PROMPTS = ("a red fox in the snow", "a cat", "the moon of a blue cat")
SIDE = 8


class Opened:
    """A pipeline, and its network and its texts opened from its folder."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.pipeline = FAMILIES[family], save_pipeline(family, folder)
        found = read_pipeline(folder, name="tiny", licence="x", size=(SIDE, SIDE), tokens=tokens(family))
        assert isinstance(found.manifest.config, PipelineConfig)
        self.config, self.diffusion = found.manifest.config, found.manifest.diffusion
        self.network: PipelineNetwork = open_network(folder, self.config, dtype=torch.float32)
        self.texts = PipelineTexts(folder, self.config, "")
        assert found.manifest.latents is not None
        self.decoder = PipelineDecoder(folder / "vae", found.manifest.latents)

    def encoded(self, *prompts: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.texts.encode(prompt) for prompt in prompts]))

    def ask(self, x: torch.Tensor, levels: list[float], texts: torch.Tensor) -> torch.Tensor:
        told = torch.from_numpy(self.diffusion.noise_schedule().told(levels))
        with torch.no_grad():
            embeddings = self.network.embed(torch.zeros(len(x), 0), texts)
            return self.network.backbone(x, self.network.modulate(told, embeddings))


@pytest.fixture(scope="module", params=FAMILIES)
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


def test_padding_is_part_of_a_text_only_where_nothing_masks_it(opened: Opened) -> None:
    config, texts = opened.config, opened.encoded("a cat")
    end = config.text_tokens * config.text_size
    changed = texts.clone()
    changed[:, end - config.text_size : end] += 3.0
    x, level = torch.ones(1, 4, SIDE, SIDE), 0.5 if opened.diffusion.schedule == "flow" else 500.0
    difference = (opened.ask(x, [level], texts) - opened.ask(x, [level], changed)).abs().max()
    assert (difference <= 1e-6) == config.text_mask


def test_negative_prompts_are_encoded_as_the_pipeline_does(opened: Opened) -> None:
    same = torch.equal(opened.encoded("a cat"), opened.encoded(f"{NEGATIVE}a cat"))
    assert same != opened.family.plain_negatives


def test_the_facts_are_those_of_the_pipeline(opened: Opened) -> None:
    family, pipeline = opened.family, opened.pipeline
    call = {name: value.default for name, value in signature(pipeline.__call__).parameters.items()}
    assert type(pipeline).__name__ in family.pipelines
    assert type(pipeline.transformer).__name__ == family.transformer
    assert family.steps == call["num_inference_steps"]
    name = type(pipeline).__name__
    scale = "true_cfg_scale" if name == "QwenImagePipeline" else "guidance_scale"
    assert family.guidance_scale == call[scale]
    assert family.pipelines[name] + (name == "SanaPipeline") == call["max_sequence_length"]


def test_the_pipelines_own_words_are_those_that_count() -> None:
    families = {name: family for name, family in FAMILIES.items() if family.head or family.tail}
    assert families.keys() == {"lumina2", "qwen_image", "z_image"}
    # They are set where the pipeline is made.
    lumina2 = inspect.getsource(diffusers.Lumina2Pipeline)
    assert f'"{families["lumina2"].head.removesuffix(" <Prompt Start> ")}"' in lumina2
    assert '" <Prompt Start> "' in lumina2
    template = "{}" + families["qwen_image"].tail
    assert repr(template)[1:-1] in inspect.getsource(diffusers.QwenImagePipeline)


def test_pictures_are_those_of_the_pipeline(opened: Opened) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 4, SIDE, SIDE)
    wanted = expected_pictures(opened.pipeline, latents)
    pictures = opened.decoder.decode(latents)
    assert (pictures - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_picture_does_not_depend_on_those_decoded_before(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.ones(1, 4, SIDE, SIDE)
    before = opened.decoder.decode(latents)
    monkeypatch.setattr(opened.decoder, "tile", SIDE)
    opened.decoder.decode(torch.ones(1, 4, SIDE + 4, SIDE))
    assert torch.equal(opened.decoder.decode(latents), before)
