"""Settings of a dataclass: its fields with their readers, from a mapping to an instance and back."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ssdtune.settings.readers import Reader, Refused
from ssdtune.strict_yaml import ConfigError, Node, shown

REQUIRED: Any = "(required)"  # a default that says there is none; compared by identity

SHORT = 60  # characters of a default that is told beside an example


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Setting:
    """One key: what it is for, how it is read, its other names, and an example of a value."""

    help: str
    reader: Reader
    aliases: tuple[str, ...] = ()
    example: str = ""
    default: Any = REQUIRED

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is REQUIRED

    @property
    def default_text(self) -> str:
        """The default as YAML has it; empty where there is none."""
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
        is_short = len(setting.default_text) <= SHORT
        if not setting.is_required and setting.example and is_short:
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


@dataclass(eq=False, repr=False)
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


@dataclass(eq=False, repr=False)
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
