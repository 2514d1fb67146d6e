"""YAML read event by event into Nodes: text as it was typed, and the line where it stands.

A scalar stays text and the setting's own type decides what it means, so that YAML 1.1's guesses
(012 is octal, 1:30 is 90, 1e-4 is a string, `no` is false) never happen. Refused, with the line:
duplicate keys, tags (!!python/object builds objects), anchors and aliases (nested ones expand to
gigabytes), several documents, and whatever is no YAML at all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ssdtune.errors import SSDTuneError

MAX_BYTES = 2**18
_MAX_DEPTH = 8
_MAX_NODES = 10_000
_NULLS = ("", "~", "null", "Null", "NULL")


class ConfigError(SSDTuneError):
    """A setting that cannot be used. `keys`: those at fault where no place is known yet."""

    def __init__(self, message: str, *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was written ("train.yaml:12", "command line", "Offload").

    value: dict[str, Node], list[Node], None, text as typed, or any Python value from the API.
    """

    value: Any
    place: str

    @classmethod
    def of(cls, value: Any, place: str) -> "Node":
        """Wrap a Python value, its members too."""
        if isinstance(value, Mapping):
            return cls({str(name): cls.of(member, place) for name, member in value.items()}, place)
        if isinstance(value, list | tuple):
            return cls([cls.of(member, place) for member in value], place)
        return cls(value, place)


def shown(value: Any) -> str:
    """A value as an error quotes it: short, printable, without the terminal's control codes."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing (null)"
    if isinstance(value, int) and abs(value) > 2**64:
        return "an enormous number"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "…"


def read_yaml(content: bytes, name: str) -> Node:
    """The document as one Node; an empty one is an empty mapping. Raises ConfigError.

    name: the file as the user called it; every Node's place is "name:line".
    """
    import yaml

    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{name}: {len(content):,} bytes is no configuration (at most {MAX_BYTES:,}).\n"
            "Is it a data file? Data goes under the key `dataset`."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{name}:{line}: not UTF-8 (byte {content[error.start]:#x}).\n"
            "Save the file as UTF-8 text."
        ) from error
    try:
        return _Tree(yaml.parse(text, Loader=yaml.SafeLoader), name).document()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(
            f"{name}:{line}: the character {error.character!r:.20} is not allowed in YAML.\n"
            "Remove it: was the file copied from a terminal?"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(
            f"{name}:{line}: not YAML: {error.problem or error.context}.\n"
            "Check this line and the one above: indentation (spaces, no tabs), quotes, `key: value`."
        ) from error


class _Tree:
    """Builds Nodes from the parser's events."""

    def __init__(self, events: Iterator[Any], name: str) -> None:
        self._events = events
        self._name = name
        self._num_nodes = 0

    def document(self) -> Node:
        import yaml

        next(self._events)  # StreamStart
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            return Node({}, f"{self._name}:1")
        node = self._node(next(self._events), depth=0)
        next(self._events)  # DocumentEnd
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._error(event, "a second document begins here", "Keep one, without `---`")
        return Node({}, node.place) if node.value is None else node

    def _node(self, event: Any, *, depth: int) -> Node:
        import yaml

        self._refuse(event, depth)
        place = self._place(event)
        if isinstance(event, yaml.ScalarEvent):
            is_null = event.style is None and event.value in _NULLS
            return Node(None if is_null else event.value, place)
        if isinstance(event, yaml.SequenceStartEvent):
            members = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                members.append(self._node(event, depth=depth + 1))
            return Node(members, place)
        return Node(self._mapping(depth), place)

    def _mapping(self, depth: int) -> dict[str, Node]:
        import yaml

        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            self._refuse(event, depth)
            place = self._place(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise self._error(event, "a key is a list or a mapping", "Write `key: value`")
            key = event.value
            if key in entries:
                raise ConfigError(
                    f"{place}: {shown(key)[1:-1]}: given twice, first at {entries[key].place}.\n"
                    "Keep one of the two lines."
                )
            # A value's place is its key's line: that is where a reader looks for it.
            entries[key] = Node(self._node(next(self._events), depth=depth + 1).value, place)
        return entries

    def _refuse(self, event: Any, depth: int) -> None:
        import yaml

        self._num_nodes += 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            what = "anchors (&) and aliases (*) are not read"
            raise self._error(event, what, "Write the value out, or quote a text that begins so")
        if event.tag is not None:
            what = f"the tag {shown(event.tag)[1:-1]} is not read"
            raise self._error(
                event, what, "Write a plain value, or quote a text that begins with !"
            )
        if depth > _MAX_DEPTH or self._num_nodes > _MAX_NODES:
            what = f"deeper than {_MAX_DEPTH} levels or more than {_MAX_NODES:,} values"
            raise self._error(event, what, "A configuration is flat, with one block `offload:`")

    def _place(self, event: Any) -> str:
        return f"{self._name}:{event.start_mark.line + 1}"

    def _error(self, event: Any, what: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self._place(event)}: {what}.\n{remedy}.")
