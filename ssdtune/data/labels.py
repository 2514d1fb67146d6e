"""Samples to token ids and a mask of the tokens that are trained.

Text is tokenised whole, as the model will see it, and the trained part found through the
tokenizer's character offsets: tokenising a prompt and its answer apart gives other tokens at the
seam than the model meets when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any

from ssdtune.data.faults import DataError, RowError
from ssdtune.data.formats import ChatSample, TextSample
from ssdtune.data.template import ChatTemplate

if TYPE_CHECKING:
    import numpy as np


class Remark(IntFlag):
    """Facts about one row that are worth a note when counted over all."""

    NONE = 0
    OPEN_END = 1  # an answer ends without a special token
    SEAM = 2  # one token holds the end of a prompt and the start of its completion
    GLUED = 4  # no white space between prompt and completion
    LEFT_OUT = 8  # the template leaves a message out, or rewrites it
    EMPTY_ANSWER = 16  # nothing but the end token is trained
    END_ADDED = 32  # the template's mask left the end-of-turn token out


@dataclass(frozen=True)
class Encoded:
    """input_ids: int32 [num_tokens]. is_trained: bool [num_tokens]; never true at 0, see below."""

    input_ids: np.ndarray
    is_trained: np.ndarray
    remarks: Remark = Remark.NONE


@dataclass(frozen=True)
class Encoder:
    """One tokenizer, one template, one answer to "what is trained" (formats.TRAIN_ON)."""

    tokenizer: Any
    template: ChatTemplate
    train_on: str

    def encode(self, sample: TextSample | ChatSample) -> Encoded:
        """Token ids and mask of one row, uncut. Raises RowError.

        The first token is predicted from nothing, so it is never trained: counted as trained it
        would make `num_items_in_batch` one too large per row where the shift is not considered.
        """
        if isinstance(sample, TextSample):
            encoded = self._encode_text(sample)
        elif self.template.marks_answers and self.train_on != "all":
            encoded = self._encode_marked_chat(sample)
        else:
            encoded = self._encode_chat(sample)
        encoded.is_trained[:1] = False
        return encoded

    def encode_ending(self, prompt: str, ending: str) -> tuple[np.ndarray, int]:
        """(ids of prompt + ending, how many at their end hold some of the ending); no end token. Raises RowError."""
        import numpy as np

        text = prompt + ending
        ids, is_ending, _ = self._tokenise(
            text, [(len(prompt), len(text))], add_special_tokens=True
        )
        last = int(np.flatnonzero(is_ending)[-1]) + 1  # some tokenizers put an end token behind
        first = int(is_ending.argmax())
        if not first:
            raise RowError(
                "the template has nothing before {label}",
                "Let it begin with a field of the row: a first token is predicted from nothing.",
            )
        return ids[:last], last - first

    def num_leading_tokens(self) -> int:
        """Tokens that the tokenizer itself puts before a text."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        places = range(len(whole) - len(plain) + 1)
        return next((k for k in places if whole[k : k + len(plain)] == plain), 0)

    def _encode_text(self, sample: TextSample) -> Encoded:
        """prompt + completion + end token, with the tokens that the tokenizer adds itself."""
        import numpy as np

        start = 0 if self.train_on == "all" else len(sample.prompt)
        text = sample.prompt + sample.completion
        if not text:
            return Encoded(np.zeros(0, np.int32), np.zeros(0, bool))
        ids, is_trained, remarks = self._tokenise(
            text, [(start, len(text))], add_special_tokens=True
        )
        end_id = self.tokenizer.eos_token_id
        if end_id is None:
            remarks |= Remark.OPEN_END
        elif ids[-1] == end_id:
            is_trained[-1] = True
        else:
            ids, is_trained = np.append(ids, np.int32(end_id)), np.append(is_trained, True)
        if sample.prompt and not sample.completion.strip():
            remarks |= Remark.EMPTY_ANSWER
        elif sample.prompt and not (sample.prompt[-1].isspace() or sample.completion[0].isspace()):
            remarks |= Remark.GLUED
        return Encoded(ids, is_trained, remarks)

    def _encode_chat(self, chat: ChatSample) -> Encoded:
        """A template that does not mark its answers: they are found by growing prefixes."""
        text = self.template.render(chat)
        remarks = self._remarks(chat, text)
        spans = [(0, len(text))]
        if self.train_on != "all":
            turns = self.template.answers(chat, text, self._trained_turns(chat))
            spans = [(turn.start, turn.stop) for turn in turns]
            if any(turn.is_open for turn in turns):
                remarks |= Remark.OPEN_END
        ids, is_trained, seam = self._tokenise(text, spans, add_special_tokens=False)
        return Encoded(ids, is_trained, remarks | seam)

    def _encode_marked_chat(self, chat: ChatSample) -> Encoded:
        """A template with generation blocks: transformers gives the mask."""
        import numpy as np

        self._need_offsets()
        out = self.template.render(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = np.asarray(out["input_ids"], np.int32)
        is_trained = np.asarray(out["assistant_masks"], bool)
        turns = self._trained_turns(chat)
        answers = [k for k, message in enumerate(chat.messages) if message["role"] == "assistant"]
        text = self.template.render(chat)
        if turns != answers:  # some answers are context: those before the first trained turn
            start = self.template.answer_start(chat, text, turns[0]) if turns else len(text)
            offsets = np.asarray(out.encodings[0].offsets).reshape(-1, 2)
            is_trained &= offsets[:, 1] > start
        remarks = self._include_end_tokens(ids, is_trained) | self._remarks(chat, text)
        return Encoded(ids, is_trained, remarks)

    def _remarks(self, chat: ChatSample, text: str) -> Remark:
        """What is odd about a chat that `text` renders."""
        remarks = Remark.NONE
        contents = [message.get("content") for message in chat.messages]
        if any(isinstance(content, str) and content.strip() not in text for content in contents):
            remarks |= Remark.LEFT_OUT
        for k in self._trained_turns(chat):
            if not contents[k] and "tool_calls" not in chat.messages[k]:
                remarks |= Remark.EMPTY_ANSWER
        return remarks

    def _trained_turns(self, chat: ChatSample) -> list[int]:
        """Indices of the messages whose tokens are trained."""
        turns = [k for k, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self.train_on == "completion" and chat.num_prompt:
            return [k for k in turns if k >= chat.num_prompt]
        return turns if self.train_on == "assistant" else turns[-1:]

    def _include_end_tokens(self, ids: np.ndarray, is_trained: np.ndarray) -> Remark:
        """Train the end-of-turn token where a template's mask stops just before it (in place).

        Which token that is shows at the end of the chat: what stands right behind the last
        trained token, if special; elsewhere only that same token, or the tokenizer's end token.
        """
        import numpy as np

        stops = np.flatnonzero(is_trained[:-1] & ~is_trained[1:]) + 1  # first token behind a run
        special = self.template.special_ids
        end_ids = {self.tokenizer.eos_token_id}
        if len(stops) and not is_trained[-1] and self._only_blank(ids[stops[-1] + 1 :]):
            end_ids |= special & {int(ids[stops[-1]])}
        remarks = Remark.NONE
        for stop in stops:
            if int(ids[stop - 1]) not in special and int(ids[stop]) in end_ids:
                is_trained[stop] = True
                remarks |= Remark.END_ADDED
        ends = np.flatnonzero(is_trained & ~np.append(is_trained[1:], False))
        if any(int(ids[end]) not in special for end in ends):
            remarks |= Remark.OPEN_END
        return remarks

    def _only_blank(self, ids: np.ndarray) -> bool:
        return not self.tokenizer.decode(ids.tolist(), skip_special_tokens=False).strip()

    def _tokenise(
        self, text: str, spans: Sequence[tuple[int, int]], *, add_special_tokens: bool
    ) -> tuple[np.ndarray, np.ndarray, Remark]:
        """(ids, mask of the tokens that overlap a span, SEAM if one reaches over a start)."""
        import numpy as np

        whole = bool(spans) and spans[0] == (0, len(text))
        if not whole:
            self._need_offsets()
        # verbose=False: "longer than the maximum" is ours to say, with the number of rows.
        out = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=not whole,
            verbose=False,
        )
        ids = np.asarray(out["input_ids"], np.int32)
        if whole:
            return ids, np.ones(len(ids), bool), Remark.NONE
        starts, ends = _token_bounds(out["offset_mapping"])
        is_trained = np.zeros(len(ids), bool)
        remarks = Remark.NONE
        for start, stop in spans:
            is_trained |= (ends > start) & (starts < stop)
            if np.any((starts < start) & (ends > start)):
                remarks |= Remark.SEAM
        return ids, is_trained, remarks

    def _need_offsets(self) -> None:
        if not self.tokenizer.is_fast:
            raise DataError(
                f"train_on: {self.train_on} needs a tokenizer with character offsets, and "
                f"{self.tokenizer.name_or_path!r} has none\n"
                "Use a model folder with tokenizer.json, or train_on: all."
            )


def _token_bounds(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Character bounds per token, [num_tokens] each.

    Byte-level tokenizers may leave white space out of their offsets, so that a token of nothing
    else has an empty range at its end: it reaches back to the end of the token before. Tokens
    the tokenizer adds are (0, 0): they overlap nothing.
    """
    import numpy as np

    bounds = np.asarray(offsets, np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0].copy(), bounds[:, 1]
    before = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    is_empty = starts == ends
    starts[is_empty] = np.minimum(before, starts)[is_empty]
    return starts, ends
