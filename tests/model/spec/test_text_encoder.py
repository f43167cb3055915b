"""The name of a model's text encoder: given, or the one of its training, but never a class by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditserve.model.spec.bundle import parse_manifest
from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.text_encoder import is_encoder_class, spell_pictographs, text_encoder_name

TINY = Path(__file__).parents[3] / "model/zoo/tiny/manifest.json"


def trained_with(text: object) -> Manifest:
    manifest = parse_manifest(TINY.read_bytes(), TINY)
    return manifest.model_copy(update={"provenance": {"training": {"data": {"text": text}}}})


@pytest.mark.parametrize(
    ("trained", "given", "name"),
    [
        (None, None, "minilm"),
        (7, "", "minilm"),
        ("transformers:/models/clip", None, "transformers:/models/clip"),
        ("transformers:clip", None, "transformers:clip"),
        ("minilm", "mine:Encoder", "mine:Encoder"),
        ("mine:Encoder", "mine:Encoder", "mine:Encoder"),
    ],
)
def test_the_encoder_is_the_one_given_or_the_one_of_the_training(
    trained: object, given: str | None, name: str
) -> None:
    assert text_encoder_name(trained_with(trained), given, "--encoder") == name


def test_a_bundle_does_not_choose_what_is_imported() -> None:
    with pytest.raises(BundleError, match=r"the class os:system, .*name it with --encoder os:system"):
        text_encoder_name(trained_with("os:system"), None, "--encoder")
    assert not is_encoder_class("C:\\models")
    assert not is_encoder_class("/models/a:b")


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("a fox,  twice", "a fox,  twice"),
        ("a 🐱 with 🕶️", "a cat face with dark sunglasses"),
        ("👩🏽‍🚀", "woman rocket"),
        ("❤️", "heart"),
        ("🖤 ⬛ ☎", "black heart black large square telephone"),
        ("5 °C, café, 睡觉的猫, ©", "5 °C, café, 睡觉的猫, ©"),
        ("\ue000 \U0001f9ff", "\ue000 nazar amulet"),
    ],
)
def test_emoji_are_read_by_their_names(text: str, spelled: str) -> None:
    assert spell_pictographs(text) == spelled
