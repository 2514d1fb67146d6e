"""How a setting is described, read and refused. Which settings there are stands in config.py.

A value comes from YAML, from a flag or from Python and becomes a Node: the value and the place
where it was written. Each setting has a Reader, which turns a Node into a value, says what is
allowed, and writes the value back. Reading what was read changes nothing.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ssdtune.sizes import ALLOWED as ALLOWED_SIZES
from ssdtune.sizes import SizeError, format_size_exactly, parse_size
from ssdtune.strict_yaml import ConfigError, Node, shown

REQUIRED: Any = "(required)"  # a default that says there is none; compared by identity
_YES = ("true", "yes", "on")
_NO = ("false", "no", "off")
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d*(_\d+)*)")
_DECIMAL = re.compile(r"[+-]?((0|[1-9]\d*(_\d+)*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?")
_NAME = re.compile(r"[\w.-]+")


class Refused(Exception):
    """Raised by a Reader: why this value is wrong. read_setting adds place, key and remedy."""


# ------------------------------------------------------------------ readers

# Nobody compares or prints readers: without those methods (eq, repr) the import is 8 ms shorter.


@dataclass(frozen=True, eq=False, repr=False)
class Reader:
    """Turns a Node into a value or raises Refused; `allowed` finishes the sentence "Allowed: …"."""

    is_structured: ClassVar[bool] = False  # whether a flag's "[…]" or "{…}" is read as YAML

    @property
    def allowed(self) -> str:
        raise NotImplementedError

    def read(self, node: Node, key: str) -> Any:
        """key: the dotted name, for errors of members. Raises Refused or ConfigError."""
        raise NotImplementedError

    def write(self, value: Any) -> Any:
        """What YAML should hold, so that read() gives `value` back."""
        return value


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
class YesNo(Reader):
    """true or false, also yes/no and on/off."""

    @property
    def allowed(self) -> str:
        return "true or false"

    def read(self, node: Node, key: str) -> bool:
        if isinstance(node.value, bool):
            return node.value
        text = node.value.lower() if isinstance(node.value, str) else None
        if text in _YES or text in _NO:
            return text in _YES
        raise Refused(f"got {shown(node.value)}")


@dataclass(frozen=True, eq=False, repr=False)
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
            raise Refused(f"got {shown(value)}{_did_you_mean(word, self.words)}")
        raise Refused(f"got {shown(value)}")


@dataclass(frozen=True, eq=False, repr=False)
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


@dataclass(frozen=True, eq=False, repr=False)
class Size(Reader):
    """Bytes, or None for auto; see sizes.py. none_word: stands for 0 bytes, as false, no and 0 then do."""

    none_word: str = ""

    @property
    def allowed(self) -> str:
        return f"{ALLOWED_SIZES}{', or ' + self.none_word if self.none_word else ''}"

    def read(self, node: Node, key: str) -> int | None:
        if isinstance(node.value, _Bytes):
            return node.value
        is_none = node.value is not None and str(node.value).lower() in (self.none_word, "0", *_NO)
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


@dataclass(frozen=True, eq=False, repr=False)
class Names(Reader):
    """Names as a list or as comma-separated text; gives a tuple.

    all_word: stands for all and is kept as text. none_word: an empty list. words: what is known.
    """

    all_word: str = ""
    none_word: str = ""
    words: tuple[str, ...] = ()
    is_structured: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        names = f"some of {', '.join(self.words)}" if self.words else "names"
        special = self.all_word or self.none_word
        return f"{special + ', or ' if special else ''}{names}, as a list or separated by commas"

    def read(self, node: Node, key: str) -> str | tuple[str, ...]:
        value = node.value
        if isinstance(value, str) and value.strip() == self.all_word != "":
            return self.all_word
        if value is None or (isinstance(value, str) and value.strip() == self.none_word):
            value = []
        if isinstance(value, str):
            value = [Node(name, node.place) for name in value.split(",")]
        if not isinstance(value, list):
            raise Refused(f"got {shown(value)}")
        if not value and self.all_word:
            raise Refused("got an empty list")
        return tuple(dict.fromkeys(self._name(member.value) for member in value))

    def _name(self, value: Any) -> str:
        name = value.strip() if isinstance(value, str) else ""
        if not _NAME.fullmatch(name):
            raise Refused(f"got {shown(value)}, which is not a name (patterns are not read)")
        if self.words and name not in self.words:
            raise Refused(f"got {shown(name)}{_did_you_mean(name, self.words)}")
        return name

    def write(self, value: Any) -> Any:
        return value if isinstance(value, str) else list(value) or self.none_word or []


@dataclass(frozen=True, eq=False, repr=False)
class Words(Reader):
    """A mapping of names to texts; gives a tuple of pairs in their order, or none."""

    what: str
    is_structured: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return self.what

    def read(self, node: Node, key: str) -> tuple[tuple[str, str], ...]:
        value = node.value
        if value is None or value in ((), []):
            return ()
        if isinstance(value, list) and all(isinstance(pair.value, list) for pair in value):
            value = {pair.value[0].value: pair.value[1] for pair in value}  # was read before
        if not isinstance(value, dict):
            raise Refused(f"got {shown(value)}")
        for name, text in value.items():
            if not isinstance(text.value, str) or not text.value.strip():
                raise Refused(f"got {shown(text.value)} for {name}, which is no text")
        return tuple((name, text.value) for name, text in value.items())

    def write(self, value: Any) -> dict[str, str]:
        return dict(value)


@dataclass(frozen=True, eq=False, repr=False)
class Or(Reader):
    """A word that stands for None ("auto", "none"), or what the inner reader reads."""

    word: str
    inner: Reader

    @property
    def allowed(self) -> str:
        return f"{self.word}, or {self.inner.allowed}"

    def read(self, node: Node, key: str) -> Any:
        if node.value is None or node.value == self.word:
            return None
        return self.inner.read(node, key)

    def write(self, value: Any) -> Any:
        return self.word if value is None else self.inner.write(value)


@dataclass(frozen=True, eq=False, repr=False)
class WordOr(Reader):
    """A word that stays as it is, or what the inner reader reads."""

    word: str
    inner: Reader

    @property
    def allowed(self) -> str:
        return f"{self.word}, {self.inner.allowed}"

    def read(self, node: Node, key: str) -> Any:
        return self.word if node.value == self.word else self.inner.read(node, key)

    def write(self, value: Any) -> Any:
        return value if value == self.word else self.inner.write(value)


@dataclass(frozen=True, eq=False, repr=False)
class Also(Reader):
    """What the first reader reads, and what the inner one does; whose refusal is the first one's."""

    first: Reader
    inner: Reader

    @property
    def allowed(self) -> str:
        return f"{self.first.allowed}, {self.inner.allowed}"

    def read(self, node: Node, key: str) -> Any:
        try:
            return self.first.read(node, key)
        except Refused as refusal:
            try:
                return self.inner.read(node, key)
            except Refused:
                raise refusal from None


@dataclass(frozen=True, eq=False, repr=False)
class YesNoOr(Reader):
    """true, false, or what the inner reader reads."""

    inner: Reader

    @property
    def allowed(self) -> str:
        return f"true, false, {self.inner.allowed}"

    def read(self, node: Node, key: str) -> Any:
        is_bool = isinstance(node.value, bool) or str(node.value).lower() in (*_YES, *_NO)
        return (YesNo() if is_bool else self.inner).read(node, key)


@dataclass(frozen=True, eq=False, repr=False)
class Record(Reader):
    """A mapping whose keys are the settings of a dataclass; null gives its defaults."""

    cls: type
    is_structured: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return f"a mapping of {', '.join(settings_of(self.cls))}"

    def read(self, node: Node, key: str) -> Any:
        if isinstance(node.value, self.cls):
            return node.value
        if node.value is None:
            return self.cls()
        if not isinstance(node.value, dict):
            raise Refused(f"got {shown(node.value)}")
        return read_record(self.cls, node, f"{key}.")

    def write(self, value: Any) -> dict[str, Any]:
        return write_record(value)


@dataclass(frozen=True, eq=False, repr=False)
class Records(Reader):
    """A list of mappings; a bare text stands for a mapping with this text as its first setting."""

    inner: Record
    what: str
    is_structured: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return f"{self.what}, or a list of these"

    def read(self, node: Node, key: str) -> tuple[Any, ...]:
        value = node.value
        if value is None:
            return ()
        members = value if isinstance(value, list) else [node]
        return tuple(self._member(member, f"{key}[{i}]") for i, member in enumerate(members))

    def _member(self, node: Node, key: str) -> Any:
        if isinstance(node.value, str | os.PathLike):
            first = next(iter(settings_of(self.inner.cls)))
            node = Node({first: node}, node.place)
        if not isinstance(node.value, dict | self.inner.cls):
            raise Refused(f"got {shown(node.value)} in {key}")
        return self.inner.read(node, key)

    def write(self, value: Any) -> list[Any]:
        return [self.inner.write(member) for member in value]


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


def _did_you_mean(word: str, words: tuple[str, ...]) -> str:
    import difflib

    near = difflib.get_close_matches(word[:100], words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


# ------------------------------------------------------------------ settings of a dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """One key: what it is for, how it is read, its other names, and an example of a value."""

    help: str
    reader: Reader
    aliases: tuple[str, ...] = ()
    example: str = ""
    default: Any = REQUIRED

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def default_text(self) -> str:
        return "" if self.is_required else as_text(self.reader.write(self.default))


def key(
    reader: Reader,
    help: str,
    *,
    default: Any = REQUIRED,
    aliases: tuple[str, ...] = (),
    example: str = "",
) -> Any:
    """A dataclass field that carries its own description; without a default it is required."""
    setting = Setting(help, reader, aliases, example, default)
    given = dataclasses.MISSING if default is REQUIRED else default
    return dataclasses.field(default=given, metadata={"setting": setting})


def as_text(written: Any) -> str:
    """What a Reader wrote, as one would type it: True -> "true", ["a", "b"] -> "a,b"."""
    if isinstance(written, bool):
        return str(written).lower()
    if isinstance(written, list):
        return ",".join(map(as_text, written)) or "none"
    if isinstance(written, dict):
        return "{" + ", ".join(f"{name}: {as_text(value)}" for name, value in written.items()) + "}"
    return str(written)


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a dataclass by name, in order of declaration."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(cls)}


def walk_settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Every setting that has a flag: ("lora_r", …), ("offload.ram", …)."""
    for name, setting in settings_of(cls).items():
        if isinstance(setting.reader, Record):
            yield from walk_settings(setting.reader.cls, f"{prefix}{name}.")
        else:
            yield prefix + name, setting


def read_record(cls: type, node: Node, prefix: str = "") -> Any:
    """An instance of `cls` from a mapping Node; raises ConfigError with place, key and remedy."""
    settings = settings_of(cls)
    entries: dict[str, Node] = node.value
    for name, entry in entries.items():
        if name not in settings:
            raise unknown_key(cls, name, entry.place, prefix)
    for name, setting in settings.items():
        if setting.is_required and name not in entries:
            raise ConfigError(
                f"{node.place}: {prefix}{name} is missing.\n"
                f"Needed: {setting.help}.\nAdd for instance `{name}: {setting.example}`."
            )
    return cls(
        **{name: read_setting(settings, name, entry, prefix) for name, entry in entries.items()}
    )


def read_setting(settings: Mapping[str, Setting], name: str, node: Node, prefix: str = "") -> Any:
    """Read one value; a refusal becomes a ConfigError of at most four short lines."""
    setting = settings[name]
    try:
        return setting.reader.read(node, prefix + name)
    except Refused as refusal:
        good = setting.example or setting.default_text
        otherwise = "" if setting.is_required else ", or leave it out for the default"
        if not setting.is_required and setting.example:
            otherwise += f" ({setting.default_text})"
        written = f"--{prefix}{name} {good}" if node.place == "command line" else f"{name}: {good}"
        end = "" if str(refusal).endswith("?") else "."
        raise ConfigError(
            f"{node.place}: {prefix}{name}: {refusal}{end}\n"
            f"Allowed: {setting.reader.allowed}.\nWrite for instance `{written}`{otherwise}."
        ) from refusal


def read_again(record: Any) -> None:
    """For __post_init__ of a frozen dataclass: read every field, so that Python is checked too."""
    settings = settings_of(type(record))
    for name in settings:
        node = Node.of(getattr(record, name), type(record).__name__)
        object.__setattr__(record, name, read_setting(settings, name, node))


def write_record(record: Any) -> dict[str, Any]:
    """The settings of an instance as plain values for YAML; read_record gives an equal instance."""
    settings = settings_of(type(record))
    return {name: each.reader.write(getattr(record, name)) for name, each in settings.items()}


def unknown_key(cls: type, name: str, place: str, prefix: str = "") -> ConfigError:
    """The error for a key that is not declared: known and not supported, or the nearest name."""
    for pattern, remedy in getattr(cls, "not_supported", {}).items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return ConfigError(f"{place}: {prefix}{name}: not supported yet.\n{remedy}")
    return ConfigError(
        f"{place}: {prefix}{shown(name)[1:-1] or shown(name)}: ssdtune has no such key.\n"
        f"{_nearest_key(cls, name, prefix)}`ssdtune train --help` lists them all."
    )


def _nearest_key(cls: type, name: str, prefix: str) -> str:
    import difflib

    settings = settings_of(cls)
    key_of = {other: key for key, each in settings.items() for other in (key, *each.aliases)}
    if not prefix:  # `ram: 8GB` at the top level means offload.ram
        dotted = (key for key, _ in walk_settings(cls) if "." in key)
        key_of = {key.split(".")[-1]: key for key in dotted} | key_of
    near = difflib.get_close_matches(name[:100], key_of, n=1, cutoff=0.6)
    if not near:
        return ""
    key = key_of[near[0]]
    is_alias = key in settings and near[0] != key
    return f"Did you mean {prefix}{key}{f' (also called {near[0]})' if is_alias else ''}? "
