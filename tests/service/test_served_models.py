"""Several served models: a bundle and a namespace for each; and the digests of bundles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ditserve.model.spec.errors import BundleError
from ditserve.service.identity import bundle_digest, vocabulary_digest
from ditserve.service.served_models import namespace_of, open_served_models
from ditserve.service.settings import Settings
from tests.service.tiny_bundle import MANIFEST

FITTING = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def write(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST.model_dump(mode="json"), **fields}))
    return folder


def made(**options: Any) -> Settings:
    return Settings(**options)


def test_a_folder_may_have_a_comma(tmp_path: Path) -> None:
    folder = write(tmp_path / "a, b", name="one")
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, tmp_path / "link"):
        (model,) = open_served_models(made(bundle=path), verify=True)
        own = model.settings(made(bundle=path))
        assert own.bundle == str(folder), "where the link leads"
        assert open_served_models(own, verify=True)[0].name == "one", "as the worker opens it"


def test_each_bundle_has_its_own_part_of_redis(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, name=name) for name in ("one", "two", "Two")]
    settings = made(bundle=",".join(map(str, folders)), namespace="fleet")
    models = open_served_models(settings, verify=True)
    assert [model.name for model in models] == ["one", "two", "Two"]
    assert [model.namespace for model in models[:2]] == ["fleet", "fleet-two"]
    assert len({model.namespace for model in models}) == 3
    own = models[1].settings(settings)
    assert (own.bundle, own.namespace) == (str(folders[1]), "fleet-two")
    assert open_served_models(own, verify=True)[0].namespace == "fleet-two", "as the worker opens it"


def test_two_bundles_of_one_name_are_refused(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    with pytest.raises(BundleError, match=f"{one} and {other} both hold tiny: models served together"):
        open_served_models(made(bundle=f"{one},{other}"), verify=True)


@pytest.mark.parametrize("name", ["a", "A", "a.b", "a-b", "a" * 100, "A" * 100, "dit_1.0"])
@pytest.mark.parametrize("first", ["dit", "d" * 32])
def test_a_namespace_is_fit_for_redis_whatever_the_name(first: str, name: str) -> None:
    assert FITTING.fullmatch(namespace_of(first, name))
    others = {
        namespace_of(first, other)
        for other in ("a", "A", "a.b", "a-b", "a" * 100, "A" * 100)
        if other != name
    }
    assert namespace_of(first, name) not in others


def test_a_bundle_is_what_its_link_led_to(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old", version="1"), write(tmp_path / "new", version="2")
    link = tmp_path / "current"
    link.symlink_to(old)
    settings = made(bundle=str(link))
    (model,) = open_served_models(settings, verify=True)
    link.unlink()
    link.symlink_to(new)
    assert model.settings(settings).bundle == str(old), "a worker that starts later serves what the others do"
    assert model.reopened(verify=True).bundle.manifest.version == "2"


def test_another_model_does_not_take_the_place_of_a_served_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle")
    (model,) = open_served_models(made(bundle=str(folder)), verify=True)
    write(folder, name="huge")
    with pytest.raises(BundleError, match="holds huge where tiny is served: restart"):
        model.reopened(verify=True)


def test_adapters_are_part_of_what_is_served(tmp_path: Path) -> None:
    """Others, or none, are another version, which workers are started anew for."""
    folder = write(tmp_path / "bundle")
    (model,) = open_served_models(made(bundle=str(folder)), verify=True)
    assert (model.adapters, model.digest) == ((), bundle_digest(MANIFEST))
    own = model.settings(made(bundle=str(folder)))
    (folder / "adapters").mkdir()
    (folder / "adapters" / "noir.safetensors").write_bytes(b"one")
    changed = model.reopened(verify=True)
    assert [adapter.name for adapter in changed.adapters] == ["noir"]
    assert changed.digest != model.digest
    assert own.adapters is None
    worker = changed.settings(made(bundle=str(folder)))
    assert open_served_models(worker, verify=True)[0].digest == changed.digest, "as the worker opens it"
    (folder / "adapters" / "noir.safetensors").write_bytes(b"two")
    assert changed.reopened(verify=True).digest not in (model.digest, changed.digest)


def test_adapters_lie_beside_each_bundle_or_in_a_folder_that_is_named(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", name="one"), write(tmp_path / "two", name="two")
    for folder in (tmp_path / "shelf", tmp_path / "shelf" / "two", one / "adapters"):
        folder.mkdir()
        (folder / f"{folder.name}-look.safetensors").write_bytes(b"any")
    (tmp_path / "shelf" / "shelf-look.safetensors").rename(tmp_path / "look.safetensors")
    both = f"{one},{two}"
    names = [
        [adapter.name for model in open_served_models(settings, verify=True) for adapter in model.adapters]
        for settings in (made(bundle=both), made(bundle=both, adapters=tmp_path / "shelf"))
    ]
    assert names == [["adapters-look"], ["two-look"]]
    (alone,) = open_served_models(made(bundle=str(two), adapters=tmp_path / "shelf" / "two"), verify=True)
    assert [adapter.name for adapter in alone.adapters] == ["two-look"]
    with pytest.raises(ValueError, match="directory"):
        made(bundle=str(two), adapters=tmp_path / "nowhere")


def test_digests_tell_bundles_and_vocabularies_apart() -> None:
    version = MANIFEST.model_copy(update={"version": "2"})
    assert bundle_digest(version) != bundle_digest(MANIFEST)
    assert vocabulary_digest(version) == vocabulary_digest(MANIFEST)
    label, style = MANIFEST.factors
    renamed = label.model_copy(update={"name": "kind"})
    turned = label.model_copy(update={"classes": label.classes[::-1]})
    others = [(style, label), (renamed, style), (turned, style), (label,)]
    digests = {vocabulary_digest(MANIFEST.model_copy(update={"factors": factors})) for factors in others}
    assert len(digests | {vocabulary_digest(MANIFEST)}) == 5
