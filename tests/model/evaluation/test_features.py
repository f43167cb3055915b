"""Feature networks from files: a classifier's features, and Inception's calling convention on a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditserve.model.evaluation.classifier_network import Classifier, ClassifierCard
from ditserve.model.evaluation.features import FeatureError, classifier_features, inception_features
from ditserve.model.spec.bundle import digest
from ditserve.model.spec.manifest import Factor

# PyTorch wants nobody to write TorchScript any more; the file of the standard network is TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class StandIn(nn.Module):
    """A stand-in with the arguments of NVIDIA's file; its features are means and extremes of the bytes."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        if img.dtype != torch.uint8:
            raise RuntimeError("bytes are wanted")
        pixels = img.float().flatten(1)
        if return_features:
            return torch.stack([pixels.mean(1), pixels.amin(1), pixels.amax(1)], 1)
        return torch.softmax(pixels[:, :4] * (0.0 if no_output_bias else 1.0), 1)


@pytest.fixture
def scripted(tmp_path: Path) -> Path:
    file = tmp_path / "inception.pt"
    torch.jit.script(StandIn()).save(str(file))
    return file


def test_inception_is_given_bytes_and_asked_for_features_and_probabilities(scripted: Path) -> None:
    network = inception_features(scripted, digest(scripted))
    images = torch.tensor([-1.0, 0.2, 1.5]).repeat_interleave(70).view(-1, 1, 1, 1).expand(210, 3, 4, 4)
    features = network.features(images)
    assert features.detail is None
    assert features.pooled[[0, 70, 140]].tolist() == [[0, 0, 0], [153, 153, 153], [255, 255, 255]]
    assert features.probabilities.shape == (210, 4)
    assert torch.equal(features.probabilities, torch.full((210, 4), 0.25))
    assert "comparable with published ones" in network.note


def test_only_the_file_with_the_known_hash_is_opened_as_inception(scripted: Path) -> None:
    with pytest.raises(FeatureError, match=r"inception\.pt is not NVIDIA's .*: its sha256 differs"):
        inception_features(scripted)
    with pytest.raises(FeatureError, match=r"nowhere\.pt does not exist"):
        inception_features(scripted.with_name("nowhere.pt"))


def test_a_classifiers_features_say_that_they_are_not_fid() -> None:
    factors = (Factor(name="label", classes=("a", "b", "c")), Factor(name="style", classes=("x", "y")))
    network = classifier_features(
        Classifier(ClassifierCard(image_size=(8, 8), widths=(4, 6), factors=factors)).eval()
    )
    features = network.features(torch.rand(5, 3, 8, 8) * 2 - 1)
    assert features.pooled.shape == (5, 6)
    assert features.detail is not None
    assert len(features.detail) == 5
    torch.testing.assert_close(features.probabilities.sum(1), torch.ones(5))
    assert features.probabilities.shape == (5, 3)
    assert "not comparable with published FID" in network.note
