"""Readers of one value: a number, a word, a text, a size."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ssdtune.sizes import ALLOWED as ALLOWED_SIZES
from ssdtune.sizes import SizeError, format_size_exactly, parse_size
from ssdtune.strict_yaml import Node, shown

YES = ("true", "yes", "on")
NO = ("false", "no", "off")
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*(_\d+)*)")
_DECIMAL = re.compile(r"[+-]?((0|[1-9]\d*(_\d+)*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")


class Refused(Exception):
    """Raised by a Reader: why this value is wrong. read_setting adds place, key and remedy."""


# Nobody compares, prints or writes to readers: without the methods for it (eq, repr, frozen) the import is 15 ms shorter.


@dataclass(eq=False, repr=False)
class Reader:
    """Turns a Node into a value or raises Refused; `allowed` finishes the sentence "Allowed: …"."""

    is_structured: ClassVar[bool] = False  # whether a flag's "[…]" or "{…}" is read as YAML

    @property
    def allowed(self) -> str:
        """What may be written, in words."""
        raise NotImplementedError

    def read(self, node: Node, key: str) -> Any:
        """key: the dotted name, for errors of members. Raises Refused or ConfigError."""
        raise NotImplementedError

    def write(self, value: Any) -> Any:
        """What YAML should hold, so that read() gives `value` back."""
        return value


@dataclass(eq=False, repr=False)
class Whole(Reader):
    """A whole number within [minimum, maximum], or one of `besides`."""

    minimum: int
    maximum: int | None = None
    besides: tuple[int, ...] = ()

    @property
    def allowed(self) -> str:
        limits = f", {self.minimum} or more" if self.maximum is None else ""
        if self.maximum is not None:
            limits = f" from {self.minimum} to {self.maximum}"
        return ", or ".join([f"a whole number{limits}", *map(str, self.besides)])

    def read(self, node: Node, key: str) -> int:
        number = _number(node.value)
        if number != int(number):
            raise Refused(f"got {shown(node.value)}, which is not whole")
        number = int(number)
        ceiling = 2**63 - 1 if self.maximum is None else self.maximum
        if number not in self.besides and not self.minimum <= number <= ceiling:
            raise Refused(f"got {shown(node.value)}, which is out of range")
        return number


@dataclass(eq=False, repr=False)
class Number(Reader):
    """A finite number from `minimum` (excluded if is_open) to `maximum`.

    is_steps: from 1 on it counts steps and must be whole; below 1 it is a share of the run.
    """

    minimum: float = 0.0
    maximum: float | None = None
    is_open: bool = False
    excludes_maximum: bool = False
    is_steps: bool = False

    @property
    def allowed(self) -> str:
        if self.is_steps:
            low = "above 0" if self.is_open else "0"
            return f"a whole number of steps, or a share of the run ({low} to below 1)"
        limits = f"above {self.minimum:g}" if self.is_open else f"{self.minimum:g} or more"
        if self.maximum is not None:
            limits += f", {'below' if self.excludes_maximum else 'at most'} {self.maximum:g}"
        return f"a number, {limits}"

    def read(self, node: Node, key: str) -> float:
        number = float(_number(node.value))
        is_low = number < self.minimum or (self.is_open and number == self.minimum)
        is_high = self.maximum is not None and (
            number > self.maximum or (self.excludes_maximum and number == self.maximum)
        )
        if is_low or is_high:
            raise Refused(f"got {shown(node.value)}, which is out of range")
        if not self.is_steps or number < 1:
            return number
        if number != int(number):
            raise Refused(f"got {shown(node.value)}: from 1 on it counts steps")
        return int(number)


@dataclass(eq=False, repr=False)
class YesNo(Reader):
    """true or false, also yes/no and on/off."""

    @property
    def allowed(self) -> str:
        return "true or false"

    def read(self, node: Node, key: str) -> bool:
        if isinstance(node.value, bool):
            return node.value
        text = node.value.lower() if isinstance(node.value, str) else None
        if text in YES or text in NO:
            return text in YES
        raise Refused(f"got {shown(node.value)}")


@dataclass(eq=False, repr=False)
class OneOf(Reader):
    """One of a few words. synonyms: (other spelling, word). later: known, not supported yet."""

    words: tuple[str, ...]
    synonyms: tuple[tuple[str, str], ...] = ()
    later: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return ", ".join(self.words)

    def read(self, node: Node, key: str) -> str:
        value = node.value
        if value is False and "no" in self.words:  # Python's reading of YAML's `no`
            return "no"
        if type(value) is int and str(value) in self.words:
            return str(value)
        if isinstance(value, str):
            word = dict(self.synonyms).get(value.lower(), value.lower())
            if word in self.words:
                return word
            if word in self.later:
                raise Refused(f"{shown(value)} is not supported yet")
            raise Refused(f"got {shown(value)}{did_you_mean(word, self.words)}")
        raise Refused(f"got {shown(value)}")


@dataclass(eq=False, repr=False)
class Text(Reader):
    """Text, of one line unless has_lines. is_path: a leading ~ becomes the home folder; is_folder: gives a Path."""

    what: str
    is_path: bool = False
    is_folder: bool = False
    has_lines: bool = False
    pattern: str = ""

    @property
    def allowed(self) -> str:
        return self.what

    def read(self, node: Node, key: str) -> Any:
        value = os.fspath(node.value) if isinstance(node.value, os.PathLike) else node.value
        if not isinstance(value, str):
            raise Refused(f"got {shown(value)}, which is not text")
        if not value.strip():
            raise Refused("got an empty text")
        line = value.replace("\n", " ") if self.has_lines else value
        if not line.isprintable() or len(value) > 4096:
            raise Refused(f"got {shown(value)}: one line of printable text, please")
        if self.pattern and not re.fullmatch(self.pattern, value, re.DOTALL):
            raise Refused(f"got {shown(value)}")
        if (self.is_path or self.is_folder) and value.startswith("~"):
            value = os.path.expanduser(value)
        return Path(value) if self.is_folder else value

    def write(self, value: Any) -> str:
        return str(value)


@dataclass(eq=False, repr=False)
class Size(Reader):
    """Bytes, or None for auto; see sizes.py. none_word: stands for 0 bytes, as false, no and 0 then do."""

    none_word: str = ""

    @property
    def allowed(self) -> str:
        return f"{ALLOWED_SIZES}{', or ' + self.none_word if self.none_word else ''}"

    def read(self, node: Node, key: str) -> int | None:
        if isinstance(node.value, _Bytes):
            return node.value
        is_none = node.value is not None and str(node.value).lower() in (self.none_word, "0", *NO)
        if self.none_word and is_none:
            return _Bytes(0)
        if node.value is not None and not isinstance(node.value, str | int | float):
            raise Refused(f"got {shown(node.value)}")
        try:
            num_bytes = parse_size(node.value)
        except SizeError as error:
            raise Refused(str(error)) from error
        return None if num_bytes is None else _Bytes(num_bytes)

    def write(self, value: Any) -> str:
        return self.none_word if value == 0 and self.none_word else format_size_exactly(value)


class _Bytes(int):
    """Bytes that were read already: read again, 200KB must not look like a 200000 that lacks its unit."""


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Refused(f"got {shown(value)}, which is not a number")
    if isinstance(value, str):
        text = value.strip()
        if len(text) > 40:
            raise Refused(f"got {shown(text)}, which is not a number")
        if re.fullmatch(r"[+-]?0\d+", text):
            raise Refused(f"got {text}: YAML reads a leading 0 as octal; write {int(text)}")
        if re.fullmatch(r"[+-]?\d+(:\d+)+", text):
            raise Refused(f"got {text}: YAML reads colons as base 60; write a plain number")
        if _WHOLE.fullmatch(text):
            return int(text)
        if not _DECIMAL.fullmatch(text):
            raise Refused(f"got {shown(text)}, which is not a number")
        value = float(text)
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        raise Refused(f"got {shown(value)}, which is not finite")
    if abs(value) > 2**63:
        raise Refused(f"got {shown(value)}, which is out of range")
    return value


def did_you_mean(word: str, words: tuple[str, ...]) -> str:
    """The end of a refusal that names the nearest word; empty where none is near."""
    import difflib

    near = difflib.get_close_matches(word[:100], words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
