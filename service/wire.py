"""The wire form of frozen dataclasses: one msgpack map a message, with a schema version. Pure.

A message is a map from field name to value; a dataclass inside it is such a map again, without a version.
Plain data: a reader of another schema version refuses what it does not know instead of guessing, and nothing
is executed on the way in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgpack

WIRE_VERSION = 1

T = TypeVar("T")


class WireError(ValueError):
    """Bytes that are not a message of this schema version."""


class Message:
    """A base of slotted frozen dataclasses that travel as a message of their own."""

    __slots__ = ()

    def to_bytes(self) -> bytes:
        return pack(fields_of(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the message in `data`.

        Raise `WireError` for anything else, other schema versions included.
        """
        return build(cls, unpack(data))


def pack(fields: Mapping[str, Any]) -> bytes:
    """Return one message: the schema version and the fields, whose values may be dataclasses."""
    packed: bytes = msgpack.packb({"v": WIRE_VERSION, **fields}, default=fields_of)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Return the fields of one message. Raise `WireError` if it is malformed or of another schema version."""
    try:
        fields = msgpack.unpackb(data, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"malformed message: {error}") from error
    if not isinstance(fields, dict):
        raise WireError("malformed message: not a map")
    version = fields.pop("v", None)
    if version != WIRE_VERSION:
        raise WireError(f"message of schema version {version!r}, this release reads {WIRE_VERSION}")
    return fields


def fields_of(value: Any) -> dict[str, Any]:
    """Return a slotted dataclass as a map.

    `dataclasses.asdict` copies what is inside and takes ten times as long.
    """
    return {name: getattr(value, name) for name in value.__slots__}


def build(kind: type[T], fields: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` of these fields, as msgpack gives them; a default stands for a missing one.

    Raises:
        WireError: a field is missing, unknown, or not of its form.
    """
    read: Callable[[Any], T] = _reader(cast("Any", kind))
    try:
        return read(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()
        raise WireError(f"not a {words}: {error}") from error


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return the function that makes a `kind` of what msgpack gives: tuples of lists, dataclasses of maps."""
    if is_dataclass(kind):
        return _map_reader(kind)
    args, origin = get_args(kind), get_origin(kind)
    if origin is tuple and args[-1] is Ellipsis:
        item = _reader(args[0])
        return tuple if item is _as_it_is else lambda values: tuple(map(item, values))
    if origin is tuple:
        items = tuple(map(_reader, args))
        return lambda values: tuple(read(value) for read, value in zip(items, values, strict=True))
    if origin in (Union, UnionType) and NoneType in args and len(args) == 2:
        some = _reader(next(arg for arg in args if arg is not NoneType))
        return some if some is _as_it_is else lambda value: None if value is None else some(value)
    return _as_it_is


def _map_reader(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    readers = {name: read for name in kind.__slots__ if (read := _reader(hints[name])) is not _as_it_is}
    return lambda fields: kind(
        **{name: readers[name](value) if name in readers else value for name, value in fields.items()}
    )


def _as_it_is(value: Any) -> Any:
    return value
