"""Adapters of imported pipelines: files that diffusers wrote give what diffusers draws with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.utils.peft_utils import set_adapter_layers, set_weights_and_activate_adapters
from safetensors.torch import load_file, save_file

from ditserve.model.nets.pipelines.network import PipelineNetwork
from ditserve.model.spec.adapters import adapter_files
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.pipeline_bundle import write_pipeline_bundle
from ditserve.model.spec.pipeline_config import PipelineConfig
from ditserve.model.spec.pipeline_folder import read_pipeline
from ditserve.service.backends.torch import TorchBackend
from ditserve.service.jobs import AdapterUse
from tests.tiny_pipelines import save_pipeline, tokens

peft = pytest.importorskip("peft", reason="diffusers loads adapters by peft: pip install peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Of peft, where a second adapter is added.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
SIDE = 8
Floats = npt.NDArray[np.float32]
TARGETS = {
    "sd3": ("to_q", "to_k", "add_v_proj", "to_out.0", "ff.net.0.proj", "norm1.linear"),
    "flux": ("to_q", "to_v", "add_k_proj", "proj_mlp", "norm.linear", "context_embedder"),
    "pixart": ("to_q", "to_out.0", "ff.net.2", "caption_projection.linear_1", "adaln_single.linear"),
}
ROWS: list[dict[str, float]] = [{"one": 0.8}, {}, {"two": -0.5}, {"one": 1.0, "two": 0.6}, {"one": -0.3}]


class Adapted:
    """A tiny pipeline of a family with two adapters: in diffusers, and in the torch backend."""

    def __init__(self, family: str, root: Path) -> None:
        self.pipeline = save_pipeline(family, root / "pipeline")
        found = read_pipeline(
            root / "pipeline", name="tiny", licence="CC0-1.0", size=(SIDE, SIDE), tokens=tokens(family)
        )
        write_pipeline_bundle(found, root / "bundle")
        bundle = Bundle.open(root / "bundle")
        config = bundle.manifest.config
        assert isinstance(config, PipelineConfig)
        for name, rank, alpha in (("one", 4, 8.0), ("two", 2, 2.0)):
            self.save(family, root / "bundle" / "adapters" / name, rank=rank, alpha=alpha)
        self.load(root / "bundle" / "adapters")
        self.reference = PipelineNetwork(self.pipeline.transformer, config)
        self.backend = TorchBackend(bundle, threads=1, adapters=adapter_files(bundle.path / "adapters"))

    def save(self, family: str, folder: Path, *, rank: int, alpha: float) -> None:
        """Have diffusers, or for PixArt PEFT, write an adapter of random numbers and forget it."""
        transformer = self.pipeline.transformer
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS[family]))
        if family == "pixart":
            model = peft.get_peft_model(transformer, config)
            randomise(transformer, seed=rank)
            model.save_pretrained(folder)
            model.unload()
            return
        transformer.add_adapter(config, "made")
        randomise(transformer, seed=rank)
        transformer.save_lora_adapter(folder, adapter_name="made", weight_name="adapter_model.safetensors")
        transformer.unload_lora()

    def load(self, folder: Path) -> None:
        for name in ("one", "two"):
            file = folder / name / "adapter_model.safetensors"
            if hasattr(self.pipeline, "load_lora_weights"):
                tensors = {f"transformer.{key}": tensor for key, tensor in load_file(file).items()}
                whole = file.with_name("whole.safetensors")
                save_file(tensors, whole, metadata_of(file, prefix="transformer."))
                self.pipeline.load_lora_weights(str(whole), adapter_name=name)
            elif name == "one":
                # The pipelines of PixArt have no loader of their own.
                model = peft.PeftModel.from_pretrained(self.pipeline.transformer, folder / name, name)
            else:
                model.load_adapter(folder / name, name)

    def inputs(self, rows: int) -> tuple[Floats, Floats, Floats]:
        assert self.backend.text_encoder is not None
        x = np.random.default_rng(0).standard_normal((rows, 4, SIDE, SIDE), np.float32)
        text = np.stack([self.backend.text_encoder.encode(f"a red fox {row}") for row in range(rows)])
        flow = self.backend.manifest.diffusion.schedule == "flow"
        levels = np.linspace(0.1, 0.9, rows) if flow else np.linspace(50, 950, rows)
        told = self.backend.manifest.diffusion.noise_schedule().told(levels)
        return x, np.asarray(told, np.float32), text

    def drawn(self, uses: list[dict[str, float]]) -> Floats:
        """Return the output of the backend for rows with these adapters and scales."""
        x, told, text = self.inputs(len(uses))
        embeddings = self.backend.embed(np.zeros((len(uses), 0), np.int64), text)
        state = self.backend.modulate(told, embeddings)
        rows = [tuple(AdapterUse(name, scale, "") for name, scale in use.items()) for use in uses]
        assert self.backend.adapters is not None
        with self.backend.adapters.applied(rows):
            return self.backend.denoise(x, state)

    def expected(self, row: int, use: dict[str, float]) -> Floats:
        """Return what diffusers gives for one row, whose adapters and scales are set."""
        transformer = self.pipeline.transformer
        if use and hasattr(self.pipeline, "set_adapters"):
            self.pipeline.set_adapters(list(use), list(use.values()))
        elif use:
            set_weights_and_activate_adapters(transformer, list(use), list(use.values()))
        set_adapter_layers(transformer, enabled=bool(use))
        x, told, text = (torch.from_numpy(array[row : row + 1]) for array in self.inputs(len(ROWS)))
        with torch.inference_mode():
            state = self.reference.modulate(told, self.reference.embed(torch.zeros(1, 0), text))
            output: Floats = self.reference.backbone(x, state).numpy()
        return output


def randomise(transformer: torch.nn.Module, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def metadata_of(file: Path, *, prefix: str) -> dict[str, str]:
    """Return the metadata of a file of diffusers, in which its names have a prefix."""
    header = file.read_bytes()
    fields = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    inner = json.loads(fields["lora_adapter_metadata"])
    return {**fields, "lora_adapter_metadata": json.dumps({prefix + k: v for k, v in inner.items()})}


@pytest.fixture(scope="module", params=TARGETS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return Adapted(request.param, tmp_path_factory.mktemp(request.param))


def test_rows_are_what_diffusers_gives_with_their_adapters(adapted: Adapted) -> None:
    together = adapted.drawn(ROWS)
    for row, use in enumerate(ROWS):
        expected = adapted.expected(row, use)
        np.testing.assert_allclose(together[row : row + 1], expected, atol=1e-4)
        plain = adapted.expected(row, {})
        assert bool(use) == (np.abs(expected - plain).max() > 1e-2)


def test_flux_has_the_names_of_its_authors_too(tmp_path: Path) -> None:
    """As kohya's scripts write them: queries, keys and values are one layer there, and three here."""
    pipeline = save_pipeline("flux", tmp_path / "pipeline")
    found = read_pipeline(tmp_path / "pipeline", name="tiny", licence="x", size=(SIDE, SIDE), tokens=12)
    write_pipeline_bundle(found, tmp_path / "bundle")
    generator, key = torch.Generator().manual_seed(0), "lora_unet_double_blocks_0_img_attn_qkv"
    tensors: dict[str, Any] = {
        f"{key}.lora_down.weight": torch.randn(2, 32, generator=generator),
        f"{key}.lora_up.weight": torch.randn(96, 2, generator=generator),
        f"{key}.alpha": torch.tensor(1.0),
    }
    file = tmp_path / "bundle" / "adapters" / "theirs.safetensors"
    file.parent.mkdir()
    save_file(tensors, file)
    bundle = Bundle.open(tmp_path / "bundle")
    backend = TorchBackend(bundle, threads=1, adapters=adapter_files(file.parent))
    product = 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    attention = pipeline.transformer.transformer_blocks[0].attn
    config = bundle.manifest.config
    assert isinstance(config, PipelineConfig)
    x = np.random.default_rng(0).standard_normal((1, 4, SIDE, SIDE), np.float32)
    state = backend.modulate(np.array([0.5], np.float32), backend.embed(np.zeros((1, 0), np.int64)))
    with torch.inference_mode():
        for part, rows in zip(
            (attention.to_q, attention.to_k, attention.to_v), product.chunk(3), strict=True
        ):
            part.weight.add_(rows)
        merged = PipelineNetwork(pipeline.transformer, config)
        expected = merged.backbone(torch.from_numpy(x), list(map(torch.as_tensor, state))).numpy()
    assert backend.adapters is not None
    with backend.adapters.applied([(AdapterUse("theirs", 1.0, ""),)]):
        np.testing.assert_allclose(backend.denoise(x, state), expected, atol=1e-4)
    assert np.abs(backend.denoise(x, state) - expected).max() > 1e-3
    assert diffusers.FluxPipeline.lora_state_dict(dict(tensors)).keys() != tensors.keys()
