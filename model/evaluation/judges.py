"""The networks by which an evaluation judges pictures, and the classes that they know."""

from __future__ import annotations

import argparse
from pathlib import Path

from ditserve.commands import command_line
from ditserve.model.evaluation.classifier_network import (
    CLASSIFIER,
    Classifier,
    ClassifierError,
    open_classifier,
    reading_factor,
)
from ditserve.model.evaluation.features import FeatureNetwork, classifier_features, inception_features
from ditserve.model.evaluation.picture_sets import picture_size
from ditserve.model.spec.errors import ModelError
from ditserve.model.spec.sizes import size_name
from ditserve.model.train.loaded_model import LoadedModel


class EvaluationError(ModelError):
    """An evaluation that cannot be made; the message is one sentence."""


def open_metric_networks(
    options: argparse.Namespace, loaded: LoadedModel
) -> tuple[FeatureNetwork, Classifier | None]:
    """Return the feature network, and the classifier that says what a picture shows.

    Beside Inception there is a classifier only if `--classifier` names one.

    Raises:
        EvaluationError: a classifier of other classes or another size, or no file for Inception.
        ClassifierError, FeatureError: one of the two cannot be opened.
    """
    classifier = None
    if options.features == "classifier" or options.classifier:
        folder = options.classifier or CLASSIFIER
        classifier = open_classifier(folder)
        known, wanted = known_classes(classifier, loaded)
        # The shipped one may know a few of anybody's classes, such as "fox", which judges nothing.
        if not known or (known < wanted and options.classifier is None):
            reason = f"knows {known or 'none'} of the model's {wanted} classes"
            raise EvaluationError(_no_classifier(folder, reason, loaded, options))
        try:
            reading_factor(classifier.card, picture_size(loaded))
        except ClassifierError:
            read, drawn = (
                size_name(size, "×") for size in (classifier.card.image_size, picture_size(loaded))
            )
            reason = f"reads pictures of {read}, not {drawn}"
            raise EvaluationError(_no_classifier(folder, reason, loaded, options)) from None
    if options.features == "inception":
        if options.weights is None:
            raise EvaluationError("--features inception needs the network's file: pass it with --weights")
        return inception_features(options.weights), classifier
    assert classifier is not None
    return classifier_features(classifier), classifier


def known_classes(classifier: Classifier, loaded: LoadedModel) -> tuple[int, int]:
    """Return how many of the model's classes the classifier knows, and how many there are."""
    known, wanted = (
        {(factor.name, name) for factor in factors for name in factor.classes}
        for factors in (classifier.card.factors, loaded.manifest.factors)
    )
    return len(known & wanted), len(wanted)


def _no_classifier(folder: Path, reason: str, loaded: LoadedModel, options: argparse.Namespace) -> str:
    """Return the sentence on a classifier that cannot judge the model; it has the command to train one."""
    if not loaded.manifest.factors:
        return "the model has no classes, by which a classifier could judge: use --features inception"
    config = next(
        (model / "config.json" for model in options.models if (model / "config.json").is_file()), None
    )
    return (
        f"the classifier in {folder} {reason}: train one by "
        f"{command_line('model.evaluation.classifier')} --config {config or 'RUN.json'} "
        f"--data {options.data} --out judge, and pass --classifier judge"
    )
