"""The length of prompts: the tokens of a text are counted by the model's own tokenizer, without PyTorch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ditserve.model.spec.bundle import BundleError
from ditserve.model.spec.network_config import BundleConfig
from ditserve.model.spec.pipeline_config import FAMILIES, TOKENIZER, PipelineConfig


class PromptLimit:
    """The most tokens of a text that a model takes; `tokens` is None for one that does not count them.

    Args:
        config: that of the network. Only an imported pipeline counts tokens.
        folder: the pipeline's, with its tokenizer.

    Raises:
        BundleError: the tokenizer cannot be read, the package that reads it is not installed, or a prompt
            may have no tokens.
    """

    def __init__(self, config: BundleConfig, folder: Path) -> None:
        self.tokens: int | None = None
        if not isinstance(config, PipelineConfig):
            return
        self._family = family = FAMILIES[config.family]
        file = folder / config.tokenizer / TOKENIZER
        try:
            # Only here: most models count no tokens.
            tokenizers = import_module("tokenizers")
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except ImportError:
            raise BundleError(
                f"{folder} needs the package tokenizers, to count the tokens of prompts: "
                "pip install 'ditserve[serve-text]'"
            ) from None
        # Its errors are of no class of their own.
        except Exception as error:
            raise BundleError(f"{file} cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._most = config.text_limit
        self._own = self._count(family.head + family.tail) - self._count("")
        self.tokens = self._most - self._own
        if self.tokens < 1:
            raise BundleError(
                f"{folder} takes texts of {self._most} tokens, and the pipeline's own words are "
                f"{self._own} of them: import it with more tokens"
            )

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)

    def excess(self, text: str, *, negative: bool = False) -> str | None:
        """Return "N tokens, and this model takes M" of a text that is too long; None of one that is not.

        `negative` says that guidance subtracts it.
        """
        if self.tokens is None or not text:
            return None
        family, text = self._family, text.lower() if self._family.lowers else text
        plain = family.plain_negatives and negative
        own, most = (0, self._most) if plain else (self._own, self.tokens)
        count = self._count(text if plain else family.head + text + family.tail) - own
        return f"{count} tokens, and this model takes {most}" if count > most else None
