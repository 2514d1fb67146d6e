"""From a YAML file and flags to a checked TrainConfig, with a note for everything read otherwise.

    loaded = load_config(Path("train.yaml"), ["--lora_r", "32", "--offload.ram=300MB"])
    print(*loaded.notes, sep="\n")

What the keys are stand in keys/. A flag beats the file, the file beats the default. No key is
ignored: it is used, translated with a note, or refused with its line.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssdtune.foreign_keys import translate
from ssdtune.keys import DatasetSource, Offload, TrainConfig
from ssdtune.keys.idle import idle_keys
from ssdtune.settings import (
    Record,
    Setting,
    YesNo,
    read_record,
    settings_of,
    unknown_key,
    walk_settings,
    write_record,
)
from ssdtune.strict_yaml import MAX_BYTES, ConfigError, Node, read_yaml, shown

__all__ = [
    "ConfigError",
    "DatasetSource",
    "Loaded",
    "Offload",
    "TrainConfig",
    "help_text",
    "load_config",
    "reference_markdown",
    "to_yaml",
]

_FLAGS = "command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checked configuration and how it came about.

    notes: lines to print, each naming file:line. sources: dotted key -> "train.yaml:12",
    "command line" or "default". path: the YAML file, None where flags gave everything. flags: as
    they were typed.
    """

    config: TrainConfig
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    path: Path | None
    flags: tuple[str, ...] = ()


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Loaded:
    """Read the file, then the flags over it, and check all. Raises ConfigError.

    overrides: as typed after `ssdtune train CONFIG`: ["--lora_r", "32", "--bf16"].
    """
    notes: list[str] = []
    root = Node({}, _FLAGS) if path is None else _read_file(Path(path))
    entries: dict[str, Node] = {}
    for name, node in root.value.items():
        _merge(entries, _canonical(name, node, notes), is_flag=False)
    for name, node in _read_flags(overrides):
        _merge(entries, _canonical(name, node, notes), is_flag=True)
    sources = dict(_sources(entries))
    place = str(path) if path is not None else _FLAGS
    try:
        config: TrainConfig = read_record(TrainConfig, Node(entries, place))
    except ConfigError as error:
        if not error.keys:
            raise
        given = [sources[name] for name in error.keys if sources[name] != "default"]
        raise ConfigError(f"{given[0] if given else place}: {error}") from error
    notes += _idle_notes(config, sources)
    return Loaded(
        config=config,
        notes=tuple(notes),
        sources=sources,
        path=None if path is None else Path(path),
        flags=tuple(overrides),
    )


def to_yaml(config: TrainConfig) -> str:
    """Every key with its value; load_config gives an equal TrainConfig back."""
    import yaml

    text = yaml.safe_dump(
        write_record(config), sort_keys=False, allow_unicode=True, width=1_000_000
    )
    return f"# All keys of this run, defaults too. `ssdtune train --help` explains them.\n{text}"


# ------------------------------------------------------------------ reading


def _read_file(path: Path) -> Node:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder.\nGive the YAML file in it.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{path}: cannot read it: {reason}.\n"
            f"{_nearest_file(path)}`ssdtune train CONFIG.yaml` wants the path of a YAML file."
        ) from error
    root = read_yaml(content, str(path))
    if not isinstance(root.value, dict):
        raise ConfigError(
            f"{root.place}: {shown(root.value)} instead of keys.\n"
            "Write one `key: value` per line; `ssdtune train --help` lists the keys."
        )
    return root


def _nearest_file(path: Path) -> str:
    import difflib

    try:
        there = [name for name in os.listdir(path.parent) if name.endswith((".yaml", ".yml"))]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f"Did you mean {path.parent / near[0]}? " if near else ""


def _read_flags(words: Sequence[str]) -> Iterator[tuple[str, Node]]:
    """("lora_r", Node) or ("offload", Node({"ram": …})) for each flag, in order."""
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"{_FLAGS}: {shown(word)} is neither a flag nor a flag's value.\n"
                "Write flags as `--lora_r 32` or `--offload.ram 300MB`, after the YAML file."
            )
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        setting = _setting_of_flag(name)
        if not equals:
            is_alone = not waiting or waiting[0].startswith("--")
            if is_alone and setting is not None and not isinstance(setting.reader, YesNo):
                raise ConfigError(
                    f"{_FLAGS}: {name}: the flag has no value.\n"
                    f"Allowed: {setting.reader.allowed}.\n"
                    f"Write for instance `--{name} {setting.example or setting.default_text}`."
                )
            text = "true" if is_alone else waiting.pop(0)
        node = _node_of_flag(name, text, setting)
        for part in reversed(name.split(".")[1:]):
            node = Node({part: node}, _FLAGS)
        yield name.split(".")[0], node


def _setting_of_flag(name: str) -> Setting | None:
    for key, setting in (*walk_settings(TrainConfig), *settings_of(TrainConfig).items()):
        if name in (key, *setting.aliases):
            return setting
    return None


def _node_of_flag(name: str, text: str, setting: Setting | None) -> Node:
    if setting is not None and setting.reader.is_structured and text[:1] in ("[", "{"):
        return _moved(read_yaml(text.encode("utf-8", "surrogateescape"), f"--{name}"))
    return Node(None if text == "null" else text, _FLAGS)


def _moved(node: Node) -> Node:
    """The same value with the command line as its place: a flag has no lines."""
    value = node.value
    if isinstance(value, dict):
        value = {name: _moved(member) for name, member in value.items()}
    elif isinstance(value, list):
        value = [_moved(member) for member in value]
    return Node(value, _FLAGS)


def _canonical(name: str, node: Node, notes: list[str]) -> dict[str, Node]:
    """Entries under our own names; another tool's name leaves a note."""
    settings = settings_of(TrainConfig)
    if name in settings:
        return {name: node}
    for key, setting in settings.items():
        if name in setting.aliases:
            notes.append(f"{node.place}: {name}: read as {key}")
            return {key: node}
    translated = translate(name, node)
    if translated is None:
        raise unknown_key(TrainConfig, name, node.place)
    entries, note = translated
    notes.append(note)
    return entries


def _merge(entries: dict[str, Node], new: Mapping[str, Node], *, is_flag: bool) -> None:
    """Lay `new` over `entries`; in one file the same key may not stand twice, by two names."""
    for name, node in new.items():
        old = entries.get(name)
        if old is not None and not is_flag:
            raise ConfigError(
                f"{node.place}: {name}: given twice by different names, first at {old.place}.\n"
                "Keep one of the two lines."
            )
        is_record = isinstance(settings_of(TrainConfig)[name].reader, Record)
        if is_record and old and isinstance(old.value, dict) and isinstance(node.value, dict):
            node = Node({**old.value, **node.value}, old.place)  # noqa: PLW2901
        entries[name] = node


def _sources(entries: Mapping[str, Node]) -> Iterator[tuple[str, str]]:
    for key, _ in walk_settings(TrainConfig):
        name, _, member = key.partition(".")
        node = entries.get(name)
        if node is not None and member and isinstance(node.value, dict):
            node = node.value.get(member)
        yield key, "default" if node is None else node.place


def _idle_notes(config: TrainConfig, sources: Mapping[str, str]) -> Iterator[str]:
    """A note for each key that was given, as something else than its default, and has no effect beside the others."""
    for key, reason in idle_keys(config):
        group, _, member = key.rpartition(".")
        holder = getattr(config, group) if group else config
        default = settings_of(type(holder))[member].default
        if sources[key] != "default" and getattr(holder, member) != default:
            yield f"{sources[key]}: {key}: has no effect, because {reason}"


# ------------------------------------------------------------------ explaining


def help_text() -> str:
    """All keys for a terminal, grouped, with what is allowed and the default."""
    lines: list[str] = []
    for title, key, setting in _described():
        if title:
            lines += ["", title]
        state = "required" if setting.is_required else f"default {setting.default_text}"
        lines += [f"  --{key}  ({state})", f"      {setting.help}"]
        lines.append(f"      {setting.reader.allowed}")
        if setting.aliases:
            lines.append(f"      also called {', '.join(setting.aliases)}")
    return "\n".join(lines[1:])


def reference_markdown() -> str:
    """The reference for the docs: one table per group."""
    lines: list[str] = []
    for title, key, setting in _described():
        if title:
            lines += ["", f"### {title}", "", "| key | default | allowed | what it is for |"]
            lines.append("| --- | --- | --- | --- |")
        default = "**required**" if setting.is_required else f"`{setting.default_text}`"
        also = f" Also called {', '.join(f'`{name}`' for name in setting.aliases)}."
        text = f"{setting.help}.{also if setting.aliases else ''}"
        row = (f"`{key}`", default, setting.reader.allowed, text)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join(lines[1:]) + "\n"


def _described() -> Iterator[tuple[str, str, Setting]]:
    """(group's title or "", dotted key, setting), in order of declaration."""
    for key, setting in walk_settings(TrainConfig):
        name, _, member = key.partition(".")
        is_first = not member or member == next(iter(settings_of(Offload)))
        yield (TrainConfig.groups.get(name, "") if is_first else ""), key, setting
