"""Rows with a label: a template makes a text of each, and every label has its words.

    template "{text} It was {label}", label_words {0: terrible, 1: great}
    "a fine film" with label 1  ->  "a fine film It was terrible", *"a fine film It was great"*

A row becomes one text for each label; the *option* is what stands from the label's words to the end, together with the
white space before it, since that is how tokenizers cut. What a model is to do is to find the right option the likeliest
(Malladi et al., arXiv 2305.17333, appendix E.2 and its code: `encode_prompt`, `--train_as_classification`).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssdtune.data.faults import DataError, RowError, field_list
from ssdtune.data.formats import Format

if TYPE_CHECKING:
    import numpy as np

    from ssdtune.data.labels import Encoder

LABEL = "label"  # what stands for the label's words in a template


@dataclass(frozen=True)
class LabelTemplate:
    """How rows with a label are put into words.

    before, after: the template around {label}, as `string.Formatter` reads it. words: of each label, in the order in
    which they are numbered. field: where a row has its label.
    """

    before: str
    after: str
    words: tuple[tuple[str, str], ...]
    field: str

    @staticmethod
    def of(
        template: str, words: Mapping[str, str] | Sequence[tuple[str, str]], field: str
    ) -> LabelTemplate:
        """Raises DataError for a template that is none, and for words that tell no labels apart."""
        pairs = tuple(words.items()) if isinstance(words, Mapping) else tuple(words)
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise _bad_template(template, str(error)) from error
        for _, name, spec, conversion in parts:
            if name is not None and (spec or conversion or not name.isidentifier()):
                raise _bad_template(template, f"{{{name}}} is more than the name of a field")
        if [name for _, name, _, _ in parts].count(LABEL) != 1:
            raise _bad_template(template, f"it needs {{{LABEL}}} once")
        before, after = template.split(f"{{{LABEL}}}")
        if len(pairs) < 2:
            raise DataError(
                "dataset.label_words: one label leaves nothing to choose from\n"
                "Give the words of two labels or more: {0: terrible, 1: great}."
            )
        _check_words(pairs)
        return LabelTemplate(before, after, pairs, field)

    @property
    def format(self) -> Format:
        """What rows must have."""
        names = [name for part in (self.before, self.after) for name in _fields(part)]
        return Format("labelled", tuple(dict.fromkeys((*names, self.field))), noun="labelled rows")

    def texts(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """(prompt, what follows it for each label). Fields are filled in without white space at their ends."""
        filled = {name: _text(row, name) for name in self.format.required if name != self.field}
        prompt, after = self.before.format(**filled), self.after.format(**filled)
        stem = prompt.rstrip(" ")
        return stem, [f"{prompt[len(stem) :]}{word}{after}" for _, word in self.words]

    def number(self, row: Mapping[str, Any]) -> int:
        """Which of the labels a row has. Raises RowError for another."""
        value = row[self.field]
        name = str(value).lower() if isinstance(value, bool) else str(value).strip()
        names = [known for known, _ in self.words]
        if name not in names:
            raise RowError(
                f"{self.field} is {name[:30]!r}, and label_words has {field_list(names)}",
                "Add it to label_words, or remove the row.",
            )
        return names.index(name)


@dataclass(frozen=True)
class EncodedOptions:
    """options: token ids of the whole text with each, int32. lengths: tokens of each that are the option. label: the
    right one's number. is_cut: the text's beginning was left out."""

    options: list[np.ndarray]
    lengths: list[int]
    label: int
    num_source_tokens: int
    is_cut: bool


def encode_options(
    row: Mapping[str, Any],
    template: LabelTemplate,
    encoder: Encoder,
    max_length: int | None,
) -> EncodedOptions:
    """Token ids of a row with each of its options. Raises RowError.

    What is longer than max_length loses its beginning, behind the token that the tokenizer itself puts first: the
    option is what is trained.
    """
    prompt, endings = template.texts(row)
    found = [encoder.encode_ending(prompt, ending) for ending in endings]
    if len({tuple(ids) for ids, _ in found}) < len(found):
        raise RowError(
            "two labels have the same tokens", "Give label_words that the tokenizer tells apart."
        )
    longest = max(len(ids) for ids, _ in found)
    lengths = [num for _, num in found]
    if max_length is not None and max(lengths) + 2 > max_length:
        raise RowError(
            f"an option has {max(lengths)} tokens, and max_length is {max_length}",
            "Raise max_length, or shorten label_words and what follows {label}.",
        )
    head = encoder.num_leading_tokens()
    excess = 0 if max_length is None else max(0, longest - max_length)
    options = [_without(ids, head, excess) for ids, _ in found]
    return EncodedOptions(options, lengths, template.number(row), longest, excess > 0)


def _check_words(pairs: Sequence[tuple[str, str]]) -> None:
    """Raises DataError for a label without words, and for two with the same: then no option is likelier."""
    label_of: dict[str, str] = {}
    for label, word in pairs:
        if not word.strip():
            raise DataError(f"dataset.label_words: {label} has no words\nGive it some.")
        if word in label_of:
            raise DataError(
                f"dataset.label_words: {label_of[word]} and {label} are both {word!r}, which leaves nothing to choose\n"
                "Give each label words of its own."
            )
        label_of[word] = label


def _without(ids: np.ndarray, head: int, count: int) -> np.ndarray:
    """The tokens without so many behind the first `head`: the same ones for every option of a row."""
    import numpy as np

    return np.concatenate([ids[:head], ids[head + count :]]) if count else ids


def _fields(part: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(part) if name]


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row[field]
    if isinstance(value, dict | list):
        raise RowError(f"{field} is a {type(value).__name__}", "The template needs a text there.")
    return str(value).strip()


def _bad_template(template: str, why: str) -> DataError:
    return DataError(
        f"dataset.template: can't read {template[:60]!r}: {why}\n"
        'Write for instance "{text} It was {label}": fields of the row in braces, {label} for its words, {{ for a brace.'
    )
