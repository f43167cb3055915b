"""The identity of a run: what must be equal for a checkpoint to be continued, and what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ditserve.model.data.dataset import Dataset
from ditserve.model.train.base_model import base_bundle
from ditserve.model.train.config import TrainConfig
from ditserve.model.train.dropout import condition_dropout
from ditserve.model.weights.lora import adapter_base

LONGEST = 80  # characters of a value in a message

# Fields that may change when a run is continued: where and how fast it runs, which files it writes, how long
# and at which rate it learns.
CHANGEABLE = frozenset(
    [
        "output",
        "init",
        "condition_start",
        "steps",
        "lr",
        "min_lr",
        "schedule",
        "warmup",
        "decay",
        "clip",
        "accumulate",
        "checkpoint_blocks",
        "compile",
        "threads",
        "device",
        "skip_limit",
        "rollback_limit",
        "checkpoint_every",
        "keep",
        "sheet_every",
        "vae",
        "log_every",
        "tensorboard",
        "stages",
        "data",
        "parallel",
    ]
)
CHANGEABLE_OF_DATA = {"path", "check", "corrupt_limit", "prefetch"}


def run_identity(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Return the values that must be equal for a checkpoint to be continued.

    They are all fields but CHANGEABLE, the sizes of the stages, the classes, and fingerprints of the
    pictures. What names a difference stands before the hashes, which only prove that there is one.
    """
    names = json.dumps([(factor.name, factor.classes) for factor in dataset.factors])
    dumped = config.model_dump(mode="json")
    return {
        **{key: value for key, value in dumped.items() if key not in CHANGEABLE},
        "data": {key: value for key, value in dumped["data"].items() if key not in CHANGEABLE_OF_DATA},
        "distillation": config.distillation
        and config.distillation.model_dump(mode="json", exclude={"teacher"}),
        "loss_space": config.space,
        "joint_dropout": condition_dropout(config, dataset).joint,
        "classes": [len(factor.classes) for factor in dataset.factors],
        "training_pictures": _pictures_per_class(dataset),
        "class_names": hashlib.sha256(names.encode()).hexdigest()[:16],
        "pictures": {
            "count": len(dataset.training),
            "labels": hashlib.sha256(dataset.labels[dataset.training].tobytes()).hexdigest()[:16],
        },
        "content": dataset.fingerprint(),
        **({"base": adapter_base(base_bundle(config.init))} if config.lora else {}),
        "stages": [{"size": list(size), "until": end} for end, size in config.stage_sizes(dataset)[:-1]],
    }


def _pictures_per_class(dataset: Dataset) -> dict[str, dict[str, int]]:
    labels = dataset.labels[dataset.training]
    return {
        factor.name: {
            name: int(count)
            for name, count in zip(
                # The last number is that of pictures whose class is not given.
                factor.classes,
                np.bincount(labels[:, k], minlength=len(factor.classes) + 1)[:-1],
                strict=True,
            )
        }
        for k, factor in enumerate(dataset.factors)
    }


def differences(was: Any, now: Any, field: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted field, old JSON, new JSON) for each difference.

    At the top level only the fields of `now` are compared; below it, the fields of both. Of two lists only
    the entries are told that the other one lacks, if there are any.
    """
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*now, *was}) if field else now:
            yield from differences(was.get(key), now.get(key), f"{field}.{key}" if field else str(key))
    elif was != now:
        old, new = was, now
        if isinstance(was, list) and isinstance(now, list):
            old, new = [x for x in was if x not in now], [x for x in now if x not in was]
            old, new = (old, new) if old or new else (was, now)
        yield field, _short(old), _short(new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
