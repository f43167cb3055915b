"""The commands of ditserve: the one list that `ditserve --help`, its dispatch and every message read.

A checkout runs a command as `python -m export.onnx`, an installed package as `ditserve export`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

# A checkout has links where an installed package has folders.
IN_CHECKOUT = Path(__file__).with_name("model").is_symlink()


@dataclass(frozen=True, slots=True)
class Command:
    """A module with its first arguments, one line about it, and the extra that brings what it imports."""

    words: str
    summary: str
    extra: str


COMMANDS = {
    "serve": Command("service", "serve models on this machine: a private Valkey, workers, the API", "serve"),
    "api": Command("service api", "serve the API alone, with workers elsewhere", "serve"),
    "worker": Command("service worker", "run one worker alone", "serve"),
    "generate": Command("service generate", "ask a running service for an image", "client"),
    "keys": Command("service keys", "add, list or revoke API keys", "serve"),
    "dead": Command("service dead", "list or requeue jobs put aside after too many attempts", "serve"),
    "models": Command("service models", "list bundles with their state and size", "serve"),
    "schema": Command("service schema", "print what a bundle or a pipeline's folder takes", "serve"),
    "convert": Command("model.convert", "import published weights and pipelines, or export weights", "train"),
    "export": Command("export.onnx", "make a complete bundle, with graphs, of a run or a bundle", "export"),
    "backbone": Command(
        "export.backbone", "add the network of another bundle to a bundle, for rungs of its ladder", "export"
    ),
    "block-cache": Command(
        "export.block_cache", "add networks whose first blocks run at some steps only to a bundle", "export"
    ),
    "half": Command("export.half", "add a backbone in half precision to a bundle", "export"),
    "int8": Command("export.int8", "add an INT8 backbone to a bundle", "export"),
    "fp8": Command("export.fp8", "record what FP8 costs a bundle in quality", "export"),
    "trt": Command("export.trt", "build TensorRT engines of a bundle", "gpu"),
    "data": Command("model.data", "make, describe and encode sets of pictures", "train"),
    "train": Command("model.train", "train a network", "train"),
    "curve": Command("model.train.curve", "draw the curve of a training run", "train"),
    "autoencoder": Command("model.train.autoencoder", "train a small autoencoder", "train"),
    "sample": Command("model.sample", "draw pictures of a run or a bundle without a service", "train"),
    "evaluate": Command("model.evaluate", "measure what a model's pictures are worth", "train"),
    "classifier": Command("model.evaluation.classifier", "train the judge of generated pictures", "train"),
    "attention": Command("model.attention", "paint where a network attends", "train"),
    "describe": Command("model.describe", "print what networks cost", "torch"),
    "prune": Command("model.prune", "take away the heads and channels that matter least", "train"),
    "scaling": Command("model.scaling", "train a family and fit its scaling law", "train"),
    "bench": Command("bench", "measure the service and its parts: ditserve bench NAME", "dev"),
}


def process_words(*words: str) -> list[str]:
    """Return the command that starts a module of ours, such as "ditserve.service", in a process of its own.

    An installed one must not import what lies in the current folder, as `-m` would; a checkout is run there.
    """
    return [sys.executable, *(() if IN_CHECKOUT else ("-P",)), "-m", *words]


def command_line(words: str) -> str:
    """Return how a command is run here, such as "python -m service keys", or "ditserve keys" once installed.

    The first of `words` is a module, without `ditserve.`, as in `COMMANDS`.
    """
    if IN_CHECKOUT:
        return f"python -m {words}"
    words = words.replace("bench.", "bench ", 1)
    fitting = [name for name, command in COMMANDS.items() if f"{words} ".startswith(f"{command.words} ")]
    name = max(fitting, key=lambda name: len(COMMANDS[name].words))
    return f"ditserve {name}{words.removeprefix(COMMANDS[name].words)}"
