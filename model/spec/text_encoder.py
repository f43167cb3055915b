"""The name of a model's text encoder: what the user says, or else what the model was trained with. Pure.

A name is one of `model.nets.text`, a folder, or `package.module:Class`. A class is imported only if the user
names it: a bundle, which may come from anywhere, does not choose the code that runs. Here is also how
texts with emoji reach an encoder of words.
"""

from __future__ import annotations

import re
import unicodedata

from ditserve.model.spec.errors import BundleError
from ditserve.model.spec.manifest import Manifest

DEFAULT = "minilm"


# What stands between and behind the characters of one emoji: joiners, and the form and colour of skin.
EMOJI_PARTS = re.compile("[\u200d\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]")
# Signs of prose, such as ° and ©, come before; the first pictographs are arrows.
FIRST_PICTOGRAPH = "\u2190"
# Of pictographs older than these, but for squares, the words tell how they are printed: ❤ is the "heavy black
# heart", while 🖤 is a black one.
FIRST_COLOURED = "\u2c00"
PRINT = re.compile("(heavy |black |white )+(?!.*square)")


def spell_pictographs(text: str) -> str:
    """Return a text with the Unicode name in place of each emoji, which tokenizers of words do not know.

    Example: "a 🐱 with 🕶️" becomes "a cat face with dark sunglasses".
    """
    if text.isascii():
        return text
    return " ".join("".join(map(_spelled, EMOJI_PARTS.sub(" ", text))).split())


def _spelled(character: str) -> str:
    if character < FIRST_PICTOGRAPH or unicodedata.category(character) != "So":
        return character
    name = unicodedata.name(character, "").lower()
    return f" {PRINT.sub('', name, count=1) if character < FIRST_COLOURED else name} "


def is_encoder_class(name: str) -> bool:
    """Return True for `package.module:Class`, a text encoder that is imported by name."""
    return re.fullmatch(r"(?!transformers:)[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def text_encoder_name(manifest: Manifest, given: str | None, option: str) -> str:
    """Return `given`, the value of a command's `option`, or else the encoder that the model was trained with.

    Raises:
        BundleError: nothing is given, and the model was trained with a class.
    """
    if given:
        return given
    training = manifest.provenance.get("training")
    data = training.get("data") if isinstance(training, dict) else None
    name = data.get("text") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name:
        return DEFAULT
    if is_encoder_class(name):
        raise BundleError(
            f"the texts of {manifest.name} are encoded by the class {name}, and a bundle does not choose "
            f"what is imported: name it with {option} {name}"
        )
    return name
