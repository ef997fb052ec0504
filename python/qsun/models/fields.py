"""JSON files and their fields, with errors that name the file, the field, what was found and expected."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsun.errors import CheckpointError

MAX_JSON_BYTES = 256 * 1024 * 1024
"""Far above any configuration, index or tokenizer: a larger file is not one."""

MAX_INTEGER = 2**31 - 1
"""No size or token id of a model is larger; what is larger is damage."""

MAX_NUMBER = 10**300
"""What an integer may reach where a number is expected."""

_MISSING = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises CheckpointError when the file cannot be read, is not UTF-8 JSON, or is not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {MAX_JSON_BYTES} of JSON")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}), expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise CheckpointError(f"{path} is not JSON ({error}), expected a JSON object") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


class Fields:
    """The fields of one JSON object (or GGUF header), read with their types.

    source: what errors call the object, usually the file's path.  A field that is absent takes `default` when
    one is given and is an error otherwise; null counts as absent.
    """

    __slots__ = ("_values", "source")

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def has_key(self, name: str) -> bool:
        """Whether the field is there at all, null included."""
        return name in self._values

    def raw(self, name: str, default: object = None) -> Any:
        """The field as it is, or `default`."""
        value = self._values.get(name)
        return default if value is None else value

    def integer(
        self, name: str, default: object = _MISSING, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """An integer from `minimum` to `maximum`."""
        expected = f"an integer from {minimum} to {maximum}"
        value = self._get(name, default, expected)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(name, value, expected)
        return value

    def number(self, name: str, default: object = _MISSING) -> float:
        """A finite number."""
        value = self._get(name, default, "a finite number")
        # An integer may be too large for a float, which math.isfinite does not survive.
        too_large = type(value) is int and abs(value) > MAX_NUMBER
        if type(value) not in (int, float) or too_large or not math.isfinite(value):
            raise self.error(name, value, "a finite number")
        return float(value)

    def boolean(self, name: str, default: object = _MISSING) -> bool:
        """true or false."""
        value = self._get(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def string(self, name: str, default: object = _MISSING) -> str:
        """A string."""
        value = self._get(name, default, "a string")
        if not isinstance(value, str):
            raise self.error(name, value, "a string")
        return value

    def strings(self, name: str, default: object = _MISSING) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(name, default, "a list of strings")
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self.error(name, value, "a list of strings")
        return tuple(value)

    def mapping(self, name: str, default: object = _MISSING) -> Fields:
        """A nested object."""
        value = self._get(name, default, "an object")
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return Fields(value, f"{self.source}: {name}")

    def names(self) -> tuple[str, ...]:
        """Every field that is present and not null."""
        return tuple(name for name, value in self._values.items() if value is not None)

    def error(self, name: str, got: object, expected: str) -> CheckpointError:
        """The error for a field that is not what it should be."""
        return CheckpointError(f"{self.source}: {name} is {got!r}, expected {expected}")

    def _get(self, name: str, default: object, expected: str) -> Any:
        value = self._values.get(name)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.source}: {name} is missing, expected {expected}")
            return default
        return value
