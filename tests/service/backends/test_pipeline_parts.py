"""The torch backend of an imported pipeline: what is missing is told in a sentence."""

from __future__ import annotations

import sys

import pytest

from ditserve.model import convert
from ditserve.model.spec.bundle import PIPELINE, Bundle
from ditserve.service.backends import BackendUnavailable, load_backend
from tests.tiny_pipelines import save_pipeline


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("pixart")
    save_pipeline("pixart", folder / "pipeline")
    assert convert.main(["import", str(folder / "pipeline"), str(folder / "bundle"), "--tokens=12"]) == 0
    return Bundle.open(folder / "bundle")


def test_a_package_that_is_not_installed_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("ditserve.model.nets.pipelines")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BackendUnavailable, match=r"diffusers: pip install 'ditserve\[pipelines\]'"):
        load_backend("torch", bundle)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_part_that_cannot_be_read_is_named(part: str, bundle: Bundle) -> None:
    folder = bundle.path / PIPELINE / part
    hidden = folder.rename(bundle.path / "hidden")
    folder.mkdir()
    try:
        with pytest.raises(BackendUnavailable, match=rf"{PIPELINE}(/{part})? "):
            load_backend("torch", bundle)
    finally:
        folder.rmdir()
        hidden.rename(folder)
