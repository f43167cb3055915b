"""The wire form of frozen dataclasses: one msgpack map a message, with a schema version. Pure.

A message is a map from field name to value; a dataclass inside it is such a map again, without a version.
Plain data: nothing is executed on the way in.

Releases share a queue while a fleet is upgraded. So a reader ignores fields that it does not know, a default
stands for a field that is missing, and every value is checked to be of its field's type. A change that is not
a new field with a default raises the version. The release that raises it still reads and writes the version
before: a message has the oldest version that says all of it, what is written about a job has the version of
the job, and what has readers of every release (a worker's report, an error that anybody writes) has the
oldest version. Other versions are refused.

Version 2: a job may compose conditions or layer them, decay its guidance, have a negative prompt or a least
quality, ask for the solver "unipc-2", run on several backbones, start from a picture, be drawn with adapters,
or be a clip or a volume.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    Self,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import msgpack

READABLE: Final = (1, 2)  # schema versions that this release reads and can write, the oldest first
NEWEST, OLDEST = READABLE[-1], READABLE[0]

# A number that may be infinite; all others are finite, because JSON and most arithmetic have no such numbers.
Endless: TypeAlias = Annotated[float, "may be infinite"]
# A field's type → the types of its values in a message.
_SCALARS: Final[Mapping[type, tuple[type, ...]]] = {
    bool: (bool,),
    bytes: (bytes,),
    float: (float, int),
    int: (int,),
    str: (str,),
}

T = TypeVar("T")


class WireError(ValueError):
    """Bytes that are not a message of a schema version that this release reads."""


class OtherVersion(WireError):
    """A message of a schema version that another release reads."""


class Message:
    """A base of slotted frozen dataclasses that travel as a message of their own."""

    __slots__ = ()

    @property
    def oldest_version(self) -> int:
        """Return the oldest schema version that says all of this message."""
        return OLDEST

    def to_bytes(self, version: int | None = None) -> bytes:
        """Return the message in a schema version, by default the oldest that says all of it."""
        return pack(fields_of(self), version or self.oldest_version)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the message in `data`.

        Raise `WireError` for anything else, other schema versions included.
        """
        return build(cls, unpack(data))


def pack(fields: Mapping[str, Any], version: int = OLDEST) -> bytes:
    """Return one message: the schema version and the fields, whose values may be dataclasses.

    The version comes first, where the scripts of the queue look for it.
    """
    packed: bytes = msgpack.packb({"v": version, **fields}, default=fields_of)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Return the fields of one message.

    Raises:
        WireError: it is malformed, or (`OtherVersion`) of a schema version that this release does not read.
    """
    try:
        fields = msgpack.unpackb(data, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"malformed message: {error}") from error
    if not isinstance(fields, dict):
        raise WireError("malformed message: not a map")
    version = fields.pop("v", None)
    if not isinstance(version, int):
        raise WireError(f"malformed message: its schema version is {version!r}")
    if version not in READABLE:
        raise OtherVersion(f"message of schema version {version}, this release reads {READABLE}")
    return fields


def read_number(text: bytes) -> int:
    """Return a whole number of a hash. Raise `WireError` for any other text."""
    if not re.fullmatch(rb"-?[0-9]{1,15}", text):
        raise WireError(f"{text!r:.60} is no whole number")
    return int(text)


def fields_of(value: Any) -> dict[str, Any]:
    """Return a slotted dataclass as a map.

    `dataclasses.asdict` copies what is inside and takes ten times as long.
    """
    return {name: getattr(value, name) for name in value.__slots__}


def build(kind: type[T], fields: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` of these fields, as msgpack gives them.

    A default stands for a missing field, and a field that is not known is ignored.

    Raises:
        WireError: a field without a default is missing, or a value is not of its field's type.
    """
    read: Callable[[Any], T] = _reader(cast("Any", kind))
    try:
        return read(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()
        raise WireError(f"not a {words}: {error}") from error


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return the function that makes a `kind` of what msgpack gives: tuples of lists, dataclasses of maps.

    It raises for anything that is not of this kind.
    """
    args, origin = get_args(kind), get_origin(kind)
    if is_dataclass(kind):
        return _map_reader(kind)
    if kind in _SCALARS:
        return _scalar_reader(_SCALARS[kind], lambda value: not isinstance(value, float) or isfinite(value))
    if kind == Endless:
        return _scalar_reader(_SCALARS[float], lambda value: value == value)
    if origin is Literal:
        return _literal_reader(args)
    if origin is tuple:
        return _tuple_reader(args)
    if origin is dict:
        read_value = _reader(args[1])
        return lambda values: {name: read_value(value) for name, value in values.items()}
    if origin in (Union, UnionType) and NoneType in args and len(args) == 2:
        read_some = _reader(next(arg for arg in args if arg is not NoneType))
        return lambda value: None if value is None else read_some(value)
    return lambda value: value


def _map_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind, include_extras=True)
    readers = {name: _reader(hints[name]) for name in kind.__slots__}

    def read(fields: Any) -> Any:
        known = {}
        for name, read_field in readers.items():
            if name in fields:
                try:
                    known[name] = read_field(fields[name])
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"its {name}: {error}") from error
        return kind(**known)

    return read


def _tuple_reader(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    if args[-1] is Ellipsis:
        read_item = _reader(args[0])
        return lambda values: tuple(map(read_item, _list(values)))
    readers = tuple(map(_reader, args))
    return lambda values: tuple(read(value) for read, value in zip(readers, _list(values), strict=True))


def _list(values: Any) -> Any:
    """Return a list as it is. A string or a map could be iterated over as well."""
    if type(values) not in (list, tuple):
        raise TypeError(f"{values!r:.60} is not a list")
    return values


def _scalar_reader(types: tuple[type, ...], holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) not in types or not holds(value):
            raise TypeError(f"{value!r:.60} is not of type {types[0].__name__}")
        return value

    return read


def _literal_reader(words: tuple[Any, ...]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in words:
            raise ValueError(f"{value!r:.60} is none of {', '.join(map(repr, words))}")
        return value

    return read
