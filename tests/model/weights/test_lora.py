"""Files of adapters: three layouts read to the same terms, and one sentence for whatever does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditserve.model.nets.lora import LowRank
from ditserve.model.spec.adapters import adapter_files
from ditserve.model.spec.errors import BundleError
from ditserve.model.weights.lora import BASE, AdapterError, LowRankTerms, read_adapter

LAYERS = {"blocks.0.attn.qkv": nn.Linear(6, 18), "blocks.1.mlp.fc1": nn.Linear(6, 12)}
THIS = {"name": "emoji", "sha256": "ab"}
RANK, ALPHA = 2, 4.0


def factors(seed: int = 0) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(RANK, layer.in_features, generator=generator),
            torch.randn(layer.out_features, RANK, generator=generator),
        )
        for name, layer in LAYERS.items()
    }


def peft(prefix: str = "base_model.model.") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{letter}.weight": tensor
        for name, term in factors().items()
        for letter, tensor in zip("AB", term, strict=True)
    }


def kohya(prefix: str = "lora_unet_") -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, term in factors().items():
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": term.down, f"{key}.lora_up.weight": term.up}
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def earlier_diffusers() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, term in factors().items():
        tensors |= {f"transformer.{name}.lora.down.weight": term.down}
        tensors |= {f"transformer.{name}.lora.up.weight": term.up}
    return tensors


def read(folder: Path, **options: Any) -> LowRankTerms:
    (file,) = adapter_files(folder)
    return read_adapter(file, LAYERS, base=THIS, **options)


def saved(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "it.safetensors", metadata
    )
    return folder


def in_peft_folder(folder: Path) -> Path:
    (folder / "it").mkdir()
    save_file(peft(), folder / "it" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False}
    (folder / "it" / "adapter_config.json").write_text(json.dumps(config))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "peft's folder": in_peft_folder,
    "diffusers": lambda folder: saved(
        folder,
        peft("transformer."),
        {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})},
    ),
    "kohya": lambda folder: saved(folder, kohya()),
    "kohya with a name of ours": lambda folder: saved(folder, kohya("lora_transformer_")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_terms(layout: str, tmp_path: Path) -> None:
    adapter = read(LAYOUTS[layout](tmp_path))
    assert adapter.rank == RANK
    for name, term in factors().items():
        assert torch.equal(adapter.terms[name].down, term.down)
        torch.testing.assert_close(adapter.terms[name].up, term.up * ALPHA / RANK)


def test_without_an_alpha_a_term_counts_once(tmp_path: Path) -> None:
    """That is the reading of diffusers."""
    for tensors in (peft(""), earlier_diffusers()):
        terms = read(saved(tmp_path, tensors)).terms
        assert all(torch.equal(terms[name].up, term.up) for name, term in factors().items())


def test_an_alpha_may_differ_by_layer_and_grow_with_the_root_of_the_rank(tmp_path: Path) -> None:
    config = {"lora_alpha": 8.0, "alpha_pattern": {"mlp.fc1": 2.0}, "use_rslora": True}
    folder = in_peft_folder(tmp_path)
    (folder / "it" / "adapter_config.json").write_text(json.dumps(config))
    terms = read(folder).terms
    for name, alpha in (("blocks.0.attn.qkv", 8.0), ("blocks.1.mlp.fc1", 2.0)):
        torch.testing.assert_close(terms[name].up, factors()[name].up * alpha / RANK**0.5)


def test_names_of_others_are_translated(tmp_path: Path) -> None:
    ours, theirs = "blocks.0.attn.qkv", "double_blocks.0.img_attn"
    tensors = {key.replace(ours, theirs): tensor for key, tensor in peft("").items()}

    def translate(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace(theirs, ours): tensor for key, tensor in given.items()}

    assert read(saved(tmp_path, tensors), translate=translate).terms.keys() == LAYERS.keys()

    def leave_out(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in translate(given).items() if "mlp" not in key}

    with pytest.raises(
        AdapterError, match=r"blocks\.1\.mlp\.fc1 is no layer of this network by another name"
    ):
        read(tmp_path, translate=leave_out)

    def stumble(given: dict[str, Tensor]) -> dict[str, Tensor]:
        raise KeyError("double_blocks")

    for translation in (None, stumble):
        with pytest.raises(
            AdapterError, match=r"it.safetensors: double_blocks.0.img_attn.lora_A.weight is no"
        ):
            read(tmp_path, translate=translation)


QKV = "base_model.model.blocks.0.attn.qkv.lora"
WRONG: list[tuple[dict[str, Tensor], str]] = [
    ({}, "it holds no tensors"),
    ({f"{QKV}_A.weight": torch.ones(2, 7)}, "maps 6 numbers to 18, and the matrices are (2, 7)"),
    ({f"{QKV}_B.weight": torch.ones(18, 3)}, "maps 6 numbers to 18, and the matrices are (2, 6) and (18, 3)"),
    ({f"{QKV}_A.weight": torch.ones(0, 6), f"{QKV}_B.weight": torch.ones(18, 0)}, "has rank 0"),
    ({f"{QKV}_A.weight": torch.ones(600, 6), f"{QKV}_B.weight": torch.ones(18, 600)}, "has rank 600"),
    ({f"{QKV}_A.weight": torch.tensor(1.0)}, "the matrices are () and"),
    ({f"{QKV}_A.weight": torch.full((2, 6), torch.nan)}, "down holds NaN or infinite numbers"),
    ({f"{QKV}_B.weight": torch.full((18, 2), torch.inf)}, "up holds NaN or infinite numbers"),
    ({f"{QKV}_A.weight": torch.ones(2, 6, dtype=torch.int64)}, "down is of torch.int64"),
    ({f"{QKV}_magnitude_vector": torch.ones(18)}, "is of DoRA: only plain LoRA is served"),
    ({"lora_unet_blocks_0_attn_qkv.dora_scale": torch.ones(18, 1)}, "is of DoRA: only plain LoRA is served"),
    ({"lora_unet_blocks_0_attn_qkv.hada_w1_a": torch.ones(18, 2)}, "is no term of a layer of this network"),
    ({f"{QKV}_B.bias": torch.ones(18)}, "is no term of a layer of this network"),
    ({"blocks.9.attn.qkv.lora_A.weight": torch.ones(2, 6)}, "or not of one that can be adapted"),
    ({"text_encoder.layers.0.lora_A.weight": torch.ones(2, 6)}, "changes a text encoder"),
    ({"lora_te1_layers_0.lora_down.weight": torch.ones(2, 6)}, "changes a text encoder"),
    ({"blocks.0.attn.qkv.alpha": torch.ones(2)}, "alpha is (2,), and must be one number"),
    ({"transformer.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 6)}, "is there in two layouts"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG)
def test_what_does_not_fit_is_one_sentence(change: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    saved(tmp_path, {**peft(), **change} if change else {})
    with pytest.raises(AdapterError) as refused:
        read(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'it.safetensors'}: ")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    tensors = peft()
    del tensors[f"{QKV}_B.weight"]
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv has no up matrix"):
        read(saved(tmp_path, tensors))
    for content in (b"", b"\x80\x04pickle", b"\xff" * 64, (tmp_path / "it.safetensors").read_bytes()[:-1]):
        (tmp_path / "it.safetensors").write_bytes(content)
        with pytest.raises(AdapterError, match="cannot be read as safetensors"):
            read(tmp_path)


def test_the_adapter_of_other_weights_is_refused(tmp_path: Path) -> None:
    assert read(saved(tmp_path, peft(), {BASE: json.dumps(THIS)})).rank == RANK
    saved(tmp_path, peft(), {BASE: json.dumps({"name": "fruits", "sha256": "cd"})})
    with pytest.raises(AdapterError, match="it was trained on other weights, those of fruits"):
        read(tmp_path)
    with pytest.raises(AdapterError, match=r"is no term .* it is an adapter of another one"):
        read(saved(tmp_path, {"layers.0.lora_A.weight": torch.ones(2, 6)}))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "its use_dora is True: only plain LoRA is served"),
        ({"bias": "all"}, "its bias is 'all'"),
        ({"modules_to_save": ["head"]}, "its modules_to_save is"),
        ({"lora_alpha": "8"}, "its lora_alpha is '8', which is no number"),
        ({"lora_alpha": float("nan")}, "its lora_alpha is nan"),
        ({"alpha_pattern": {"(": 8}}, "its alpha_pattern '(' is no pattern"),
        ([], "its configuration must be a JSON object"),
    ],
)
def test_a_configuration_that_asks_for_more_is_refused(config: Any, sentence: str, tmp_path: Path) -> None:
    folder = in_peft_folder(tmp_path)
    (folder / "it" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError) as refused:
        read(folder)
    assert sentence in str(refused.value)


def test_a_folder_holds_adapters_by_name(tmp_path: Path) -> None:
    assert adapter_files(tmp_path / "none") == ()
    saved(tmp_path, peft())
    for name in ("README.md", ".hidden.safetensors", "notes.json"):
        (tmp_path / name).write_text("no adapter")
    (file,) = adapter_files(tmp_path)
    assert file.name == "it"
    before = file.version
    saved(tmp_path, peft("transformer."))
    (file,) = adapter_files(tmp_path)
    assert file.version != before
    (tmp_path / "it.safetensors").write_bytes(b"changed")
    with pytest.raises(BundleError, match="was changed while the service started"):
        file.read()


def test_a_folder_with_what_cannot_be_named_or_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    with pytest.raises(BundleError, match="it holds no adapter: it has neither"):
        adapter_files(tmp_path)
    save_file(peft(), tmp_path / "it" / "adapter_model.safetensors")
    save_file(peft(), tmp_path / "it.safetensors")
    with pytest.raises(BundleError, match="are both the adapter it: remove one"):
        adapter_files(tmp_path)
    (tmp_path / "it.safetensors").rename(tmp_path / "ö b.safetensors")
    with pytest.raises(BundleError, match="names an adapter 'ö b': take letters"):
        adapter_files(tmp_path)
    (tmp_path / "ö b.safetensors").unlink()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is no file that can be read: remove it"):
        adapter_files(tmp_path)
