"""Readers of several values, and of what another reader reads or a word that stands beside it."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ssdtune.settings.readers import NO, YES, Reader, Refused, YesNo, did_you_mean
from ssdtune.strict_yaml import Node, shown

_NAME = re.compile(r"[\w.-]+")


@dataclass(eq=False, repr=False)
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
            raise Refused(f"got {shown(name)}{did_you_mean(name, self.words)}")
        return name

    def write(self, value: Any) -> Any:
        return value if isinstance(value, str) else list(value) or self.none_word or []


@dataclass(eq=False, repr=False)
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


@dataclass(eq=False, repr=False)
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


@dataclass(eq=False, repr=False)
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


@dataclass(eq=False, repr=False)
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


@dataclass(eq=False, repr=False)
class YesNoOr(Reader):
    """true, false, or what the inner reader reads."""

    inner: Reader

    @property
    def allowed(self) -> str:
        return f"true, false, {self.inner.allowed}"

    def read(self, node: Node, key: str) -> Any:
        is_bool = isinstance(node.value, bool) or str(node.value).lower() in (*YES, *NO)
        return (YesNo() if is_bool else self.inner).read(node, key)
