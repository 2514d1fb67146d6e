"""The chat template: render a chat, and find in the rendered text what the assistant said.

No template says where its turns begin and end. Those with `{% generation %}` blocks mark the
answers themselves (`tokens` asks transformers for that mask). For all others the chat is rendered
in growing prefixes: messages before a turn plus the generation prompt end where the answer
begins; messages up to and including it end where the answer ends. That holds only if those
renderings *are* prefixes of the whole, and templates exist that rewrite earlier turns, so every
boundary is checked against the full text; what cannot be checked is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdtune.data.faults import DataError, RowError, shorten
from ssdtune.data.formats import ChatSample

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REWRITES = (
    "Set train_on: last (only the final answer is needed) or all, or chat_template: to a copy of "
    "the template with {% generation %} … {% endgeneration %} around the answers."
)


def read_chat_template(tokenizer: Any, chat_template: str | None = "auto") -> str | None:
    """The template's text: the tokenizer's own ("auto", None), or that of a .jinja file.

    Returns None where the tokenizer has none. Raises DataError for a file that isn't there or does
    not parse.
    """
    if chat_template is None or chat_template == "auto":
        own = getattr(tokenizer, "chat_template", None)
        return own.get("default") if isinstance(own, dict) else own
    path = Path(chat_template).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat_template: can't read {path}: {getattr(error, 'strerror', None) or error}\n"
            "Give auto (the tokenizer's own) or the path of a Jinja file."
        ) from error
    _check_syntax(text, path)
    return text


def _check_syntax(text: str, path: Path) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)
    except jinja2.TemplateSyntaxError as fault:
        raise DataError(f"chat_template: {path} line {fault.lineno}: {fault.message}") from fault


@dataclass(frozen=True)
class Turn:
    """One answer in a rendered chat: text[start:stop], its end-of-turn token included.

    is_open: no special token ends it, so the model is not taught to stop.
    """

    start: int
    stop: int
    is_open: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with one template. text: None where there is none (then `render` refuses)."""

    tokenizer: Any
    text: str | None
    special_tokens: tuple[str, ...]  # longest first; what can end a turn
    special_ids: frozenset[int]

    @staticmethod
    def of(tokenizer: Any, chat_template: str | None = "auto") -> ChatTemplate:
        """See `read_chat_template`."""
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        # Gemma lists runs of newlines among its added tokens: they end nothing.
        special = {token for token in (*added, *tokenizer.all_special_tokens) if token.strip()}
        longest_first = tuple(sorted(special, key=lambda token: (-len(token), token)))
        ids = frozenset(tokenizer.convert_tokens_to_ids(list(longest_first)))
        text = read_chat_template(tokenizer, chat_template)
        return ChatTemplate(tokenizer, text, longest_first, ids)

    @property
    def _break(self) -> re.Pattern[str]:
        return re.compile("|".join([*map(re.escape, self.special_tokens), r"\s"]))

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return self.text is not None and _GENERATION_BLOCK.search(self.text) is not None

    @property
    def writes_date(self) -> bool:
        """Whether what it renders depends on the day."""
        return self.text is not None and "strftime_now" in self.text

    def render(self, chat: ChatSample, num_messages: int | None = None, **options: Any) -> Any:
        """The chat (its first `num_messages`) as text; options go to `apply_chat_template`.

        Raises RowError with the template's own words, DataError where there is no template.
        """
        import jinja2

        if self.text is None:
            raise DataError(
                f"the rows are chats, but the tokenizer {self.tokenizer.name_or_path!r} has no "
                "chat template\n"
                "Use the model's Instruct version, set chat_template: to the Jinja file the model "
                "was made for, or give rows of prompt + completion."
            )
        messages = list(chat.messages[:num_messages])
        tools = list(chat.tools) if chat.tools else None
        arguments = {"tools": tools, "chat_template": self.text, "tokenize": False, **options}
        try:
            return self.tokenizer.apply_chat_template(messages, **arguments)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:8])
            raise RowError(
                f"the chat template refuses it: {shorten(str(error), 160)}",
                f"Its roles: {roles}{', …' if len(messages) > 8 else ''}. Mend the row or remove it.",
            ) from error

    def answers(self, chat: ChatSample, text: str, turn_idxs: Iterable[int]) -> list[Turn]:
        """Where the messages `turn_idxs` (assistant turns, ascending) stand in `text`.

        text: `render(chat)`. Raises RowError where the template leaves a boundary undecided.
        """
        turns = []
        for turn_idx in turn_idxs:
            start = self.answer_start(chat, text, turn_idx)
            stop = self._answer_stop(chat, text, turn_idx, start)
            if turns and start < turns[-1].stop:
                raise self._undecided(turn_idx)
            turns.append(self._trimmed(text, start, stop))
        return turns

    def answer_start(self, chat: ChatSample, text: str, turn_idx: int) -> int:
        """Where the answer `turn_idx` begins: right behind the generation prompt."""
        if turn_idx == 0:  # nothing to render before it
            return self._content_start(chat, text, turn_idx, 0)
        before = self.render(chat, turn_idx)
        prompt = self.render(chat, turn_idx, add_generation_prompt=True)
        if prompt != before and text.startswith(prompt):
            return len(prompt)
        if not text.startswith(before):
            raise self._undecided(turn_idx)
        # Reasoning models open a thought in the generation prompt that these chats don't have:
        # what both share, up to the last whole token or white space, is the header.
        shared = text[len(before) : _common_length(prompt, text)]
        header = max((found.end() for found in self._break.finditer(shared)), default=0)
        if header:
            return len(before) + header
        return self._content_start(chat, text, turn_idx, len(before))

    def _content_start(self, chat: ChatSample, text: str, turn_idx: int, floor: int) -> int:
        """For templates without a generation prompt: where the content itself stands."""
        content = chat.messages[turn_idx].get("content")
        found = text.find(content.strip(), floor) if isinstance(content, str) else -1
        if found < 0:
            raise self._undecided(turn_idx)
        return found

    def _answer_stop(self, chat: ChatSample, text: str, turn_idx: int, start: int) -> int:
        if turn_idx == len(chat.messages) - 1:
            return len(text)
        through = self.render(chat, turn_idx + 1)
        if len(through) > start and text.startswith(through):
            return len(through)
        # Some templates write the last answer differently from earlier ones (Qwen3 adds an empty
        # thought, gpt-oss ends it with another token). Then the answer ends with the special token
        # in the place of the one that ends `through`, or else with the next one like it.
        end_token = self._last_token(through)
        body = through.rstrip().removesuffix(end_token)
        if end_token and len(body) > start and text.startswith(body):
            for token in self.special_tokens:
                if text.startswith(token, len(body)):
                    return len(body) + len(token)
        if end_token and (found := text.find(end_token, start)) >= 0:
            return found + len(end_token)
        raise self._undecided(turn_idx)

    def _trimmed(self, text: str, start: int, stop: int) -> Turn:
        """Without the white space that templates put between an end token and the next turn."""
        token = self._last_token(text[start:stop])
        if not token:
            return Turn(start, stop, is_open=True)
        return Turn(start, start + len(text[start:stop].rstrip()), is_open=False)

    def _last_token(self, text: str) -> str:
        stripped = text.rstrip()
        return next((token for token in self.special_tokens if stripped.endswith(token)), "")

    def _undecided(self, turn_idx: int) -> RowError:
        return RowError(
            f"the chat template rewrites earlier turns, so the bounds of messages[{turn_idx}] are "
            "undecided",
            _REWRITES,
        )


def _common_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))
