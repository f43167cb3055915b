"""The judge of generated pictures learns, is repeatable, survives the disk, and refuses other sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from ditserve.model.evaluation.classifier import accuracies, fit, main
from ditserve.model.evaluation.classifier_network import (
    CARD,
    Classifier,
    ClassifierCard,
    ClassifierError,
    classify,
    open_classifier,
    save_classifier,
    top_k_accuracy,
)
from ditserve.model.spec.bundle import WEIGHTS
from ditserve.model.spec.manifest import Factor

FACTORS = (
    Factor(name="label", classes=("red", "green", "blue")),
    Factor(name="style", classes=("full", "half")),
)
TINY = ClassifierCard(image_size=(16, 16), widths=(8, 16), factors=FACTORS)


def drawings(copies: int = 4) -> tuple[Tensor, Tensor]:
    """Return pictures of one colour (label), whole or in the upper half (style), and their labels."""
    images, labels = [], []
    for label in range(3):
        for style in range(2):
            picture = torch.ones(3, 16, 16)
            picture[:, : 8 if style else 16] = -1
            picture[label, : 8 if style else 16] = 1
            images += [picture] * copies
            labels += [[label, style]] * copies
    return torch.stack(images), torch.tensor(labels)


def fitted(seed: int = 0, steps: int = 30) -> Classifier:
    with Progress(disable=True) as progress:
        return fit(*drawings(), TINY, steps=steps, seed=seed, progress=progress)


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return fitted()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The file of a training run, with its pictures beside it."""
    images, labels = drawings()
    np.savez(
        tmp_path / "data.npz",
        x=((images + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy(),
        y=labels[:, 0].numpy(),
        s=labels[:, 1].numpy(),
        names=np.array(FACTORS[0].classes),
        styles=np.array(FACTORS[1].classes),
    )
    config = {
        "data": {"path": str(tmp_path / "data.npz"), "hold_out": 0.5},
        "output": "x",
        "model": {"patch_size": 4},
        "diffusion": {"schedule": "cosine", "prediction": "x0"},
        "steps": 1,
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    return tmp_path / "run.json"


def test_it_learns_both_factors(trained: Classifier) -> None:
    images, labels = drawings()
    shares = accuracies(classify(trained, images), labels, FACTORS, "seen")
    assert shares == {"label_top1_seen": 1.0, "style_top1_seen": 1.0}


def test_training_repeats_by_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = fitted(steps=3), fitted(steps=3), fitted(seed=1, steps=3)
    assert torch.equal(torch.rand(1), expected)
    images, _ = drawings()
    assert torch.equal(classify(first, images).features, classify(again, images).features)
    assert not torch.equal(classify(first, images).features, classify(other, images).features)


def test_a_saved_classifier_is_the_same_within_half_precision(trained: Classifier, tmp_path: Path) -> None:
    save_classifier(trained, tmp_path, TINY)
    opened, (images, _) = open_classifier(tmp_path), drawings()
    assert opened.card.factors == FACTORS
    for ours, kept in zip(classify(trained, images).logits, classify(opened, images).logits, strict=True):
        torch.testing.assert_close(ours, kept, rtol=0.02, atol=0.02)


def test_features_have_a_fixed_width_and_do_not_depend_on_neighbours(trained: Classifier) -> None:
    images, _ = drawings()
    together, alone = classify(trained, images), classify(trained, images[5:6])
    assert together.features.shape == (24, 16)
    assert together.detail.shape == (24, 8)
    torch.testing.assert_close(together.features[5:6], alone.features)
    torch.testing.assert_close(together.detail[5:6], alone.detail)


def test_detail_is_lost_by_blurring(trained: Classifier) -> None:
    sharp = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1)
    assert (classify(trained, blurred).detail.mean(1) < 0.7 * classify(trained, sharp).detail.mean(1)).all()


def test_top_counts_the_label_among_the_likeliest() -> None:
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    labels = torch.tensor([0, 1, 2])
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_command_writes_a_classifier_and_what_it_measured(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "judge"
    command = ["--config", str(run), "--out", str(out), "--epochs", "1", "--widths", "8", "16"]
    assert main(command) == 0
    card = open_classifier(out).card
    keys = {
        f"{name}_top1_{suffix}" for name in ("label", "style") for suffix in ("unseen", "seen", "distorted")
    }
    assert set(card.accuracy) == keys
    images, labels = drawings()
    again = accuracies(classify(open_classifier(out), images), labels, card.factors, "seen")
    assert again == {name: card.accuracy[name] for name in again}
    # The pictures held out from the generator are counted too.
    assert card.training["pictures"] == 24
    assert card.training["unseen"] == 3
    first = (out / WEIGHTS).read_bytes()
    assert main(command) == 0
    assert (out / WEIGHTS).read_bytes() == first


def test_the_command_refuses_in_a_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(run), "--data", str(tmp_path / "none.npz"), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("model.evaluation.classifier: ")
    assert "none.npz" in message
    assert main(["--config", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main(["--config", str(run), "--out", str(tmp_path / "out"), "--widths", "8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_whole_classifier_is_refused(trained: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match=f"holds no classifier: .*{CARD} is missing"):
        open_classifier(tmp_path)
    save_classifier(trained, tmp_path, TINY)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[:-1] + b"x")
    with pytest.raises(ClassifierError, match=f"{WEIGHTS} differs from the hash"):
        open_classifier(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights)
    card = json.loads((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps({**card, "widths": [8, 12]}))
    with pytest.raises(ClassifierError, match=f"{WEIGHTS} cannot be read"):
        open_classifier(tmp_path)
    (tmp_path / CARD).write_text(json.dumps({**card, "colour": 1}))
    with pytest.raises(ClassifierError, match=f"{CARD}: colour"):
        open_classifier(tmp_path)


def test_pictures_of_another_size_are_refused(trained: Classifier) -> None:
    for height, width in ((8, 8), (24, 24), (32, 16)):
        with pytest.raises(ClassifierError, match=f"reads pictures of 16×16, not {height}×{width}"):
            classify(trained, torch.zeros(1, 3, height, width))


def test_pictures_of_a_multiple_of_its_size_are_averaged(trained: Classifier) -> None:
    small = torch.rand(2, 3, 16, 16) * 2 - 1
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(classify(trained, large).logits[0], classify(trained, small).logits[0])
