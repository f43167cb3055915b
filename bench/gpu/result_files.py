"""The results of a measurement of a GPU in its folder: a JSON file a part, and what is made of them.

A part writes its file after every point, so that nothing is lost when its process ends. Only the standard
library is needed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DONE = "done"
# A point that could not be measured has this key alone, with one sentence.
ERROR = "error"


@dataclass(slots=True)
class PartResult:
    """The points of a part by name; `setting` is what they were measured with and on.

    `status` is "done", the reason why the part ended before, or empty while it runs. `running` is the point
    that is being measured.
    """

    part: str
    setting: dict[str, str]
    status: str = ""
    seconds: float = 0.0
    running: str = ""
    points: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.status == DONE

    @property
    def errors(self) -> dict[str, str]:
        return {name: str(point[ERROR]) for name, point in self.points.items() if ERROR in point}

    @property
    def wrong(self) -> list[str]:
        """The points at which the device did not give what it must."""
        signs = ("passed", "equal_to_uncaptured")
        return [name for name, point in self.points.items() if any(point.get(s) is False for s in signs)]

    def write(self, folder: Path) -> None:
        write_text(path_of(folder, self.part), json.dumps(asdict(self), indent=1) + "\n")


def path_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def read_part(folder: Path, part: str, setting: Mapping[str, str]) -> PartResult:
    """Return the result of a part; an empty one if there is none, or it is of another setting."""
    path = path_of(folder, part)
    try:
        result = PartResult(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return PartResult(part, dict(setting))
    return result if result.setting == dict(setting) else PartResult(part, dict(setting))


def write_text(path: Path, text: str) -> None:
    """Write a file that is seen whole or not at all."""
    scratch = path.with_name(f".{path.name}.writing")
    scratch.write_text(text)
    os.replace(scratch, path)
