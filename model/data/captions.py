"""Captions of the emoji set: wordings from names, keywords and styles. Pure.

A picture has many wordings, one a line. Those of one name share no line with those of another unless a
keyword means both.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

# A keyword of more names than this says too little to stand alone.
SHARED = 8
# Keywords of a name that are used, at most.
KEYWORDS = 8
# One wording in so many is kept from training, to be asked for in evaluations.
UNSEEN = 12

# The first is what an evaluation asks for: it tells all that the labels tell.
STYLE_FORMS = ("{subject} in {style} style", "{subject}", "{subject}, {style}", "{style} {subject}")
VOWELS = "aeiou"
ARTICLE = re.compile(r"an? ")


class Wordings:
    """The wordings of names: `names` maps a name to its short name, `keywords` to words that people look up.

    Wordings(...)("sleepy-cat", "twemoji") gives lines such as "sleepy cat", "a tired cat, twemoji".
    """

    def __init__(self, names: Mapping[str, str], keywords: Mapping[str, Sequence[str]]) -> None:
        self.names = {key: clean(name) or clean(key) or key for key, name in names.items()}
        cleaned = {
            key: list(dict.fromkeys(filter(None, map(clean, words)))) for key, words in keywords.items()
        }
        users = Counter(word for words in cleaned.values() for word in words)
        taken = set(self.names.values())
        self.keywords = {
            key: [word for word in words if users[word] <= SHARED and word not in taken][:KEYWORDS]
            for key, words in cleaned.items()
        }

    def subjects(self, key: str) -> list[str]:
        """Return the ways to say what a name shows; its short name is there several times, as it is asked."""
        name, words = self.names[key], self.keywords.get(key, [])
        article = "an" if name[0] in VOWELS else "a"
        both = [f"{name}, {word}" for word in words[:3]]
        return [name, name, f"{article} {name}", f"{name} emoji", *both, *words]

    def __call__(self, key: str, style: str) -> list[str]:
        """Return the wordings of a picture that training draws from."""
        return [line for line in self._all(key, style) if not self._unseen(key, line)]

    def unseen(self, key: str, style: str) -> list[str]:
        """Return the wordings of a picture that are kept from training."""
        return [line for line in dict.fromkeys(self._all(key, style)) if self._unseen(key, line)]

    def _all(self, key: str, style: str) -> list[str]:
        spoken = clean(style)
        return [
            form.format(subject=subject, style=spoken)
            for subject in self.subjects(key)
            for form in STYLE_FORMS
            if not (ARTICLE.match(subject) and form.startswith("{style}"))
        ]

    def _unseen(self, key: str, line: str) -> bool:
        name = self.names[key]
        asked = line == name or line.startswith(f"{name} in ")
        return not asked and zlib.crc32(f"{key}/{line}".encode()) % UNSEEN == 0


def clean(words: str) -> str:
    """Return words in lower case with single spaces; "" for what is no word, such as ":D"."""
    text = re.sub(r"[_\-\s()]+", " ", words.replace("’", "'").lower()).strip()
    return text if re.search(r"[a-z]{2}|\d", text) and not re.search(r"[:;<>{}=]", text) else ""
