"""Pad one micro-batch to its own longest row.

Labels of padding are masked because of *where* they are, never because of the token: where the
pad token is also the end token (a common choice), masking by token would hide every real end from
the loss, and the model would never learn to stop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class CausalCollator:
    """Rows of `input_ids` and `labels` to tensors [num_rows, length]; other columns are left out.

    pad_to_multiple_of: round the length up. attention_mask is always there, also where all rows
    are of one length, so that a batch does not change its path through the model with its rows.
    Works as `data_collator` of a plain `transformers.Trainer`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    padding_side: Literal["right", "left"] = "right"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(row["input_ids"]) for row in features)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(features), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED_LABEL, dtype=torch.long),
        }
        for k, row in enumerate(features):
            num_tokens = len(row["input_ids"])
            first = 0 if self.padding_side == "right" else length - num_tokens
            place = slice(first, first + num_tokens)
            batch["input_ids"][k, place] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            batch["attention_mask"][k, place] = 1
            batch["labels"][k, place] = torch.as_tensor(row["labels"], dtype=torch.long)
        return batch


@dataclass(frozen=True)
class OptionsCollator:
    """Rows with a label (`options`, `option_lengths`, `label`; see `tokens.Tokenized`) to one micro-batch.

    A text's last token is nobody's input; texts of a row that are the same without it are one sequence, so that options
    of one token each cost no more than one text.

        labels      [num_rows]                 numbers of the right options
        picks       [num_picks, 5]             sequence, position, token, row x num_options + option, number within it:
                                               whose log-probabilities make an option's likelihood
        input_ids, attention_mask  [num_sequences, length]
        logits_to_keep  [num_positions]        where logits are wanted, ascending; `position` counts among these

    sequences_per_row: at most, for whoever wants to know how large a micro-batch gets. Rows of `input_ids` and
    `labels` alone are padded as `CausalCollator` does: what a rehearsal gives.
    """

    pad_token_id: int
    num_options: int
    sequences_per_row: int

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        pad = CausalCollator(self.pad_token_id)
        if "options" not in features[0]:
            return pad(features)
        sequences: list[list[int]] = []
        picks: list[tuple[int, ...]] = []
        for number, row in enumerate(features):
            start, places = len(sequences), dict[tuple[int, ...], int]()
            for option, ids in enumerate(row["options"]):
                fed = tuple(ids[:-1])
                place = places.setdefault(fed, start + len(places))
                if place == len(sequences):
                    sequences.append(list(fed))
                first = len(ids) - row["option_lengths"][option]
                which = number * self.num_options + option
                picks += [
                    (place, at - 1, ids[at], which, at - first) for at in range(first, len(ids))
                ]
        kept = sorted({position for _, position, *_ in picks})
        where = {position: k for k, position in enumerate(kept)}
        padded = pad([{"input_ids": ids, "labels": ids} for ids in sequences])
        return {
            "labels": torch.tensor([row["label"] for row in features]),
            "picks": torch.tensor([(s, where[p], *rest) for s, p, *rest in picks]),
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "logits_to_keep": torch.tensor(kept),
        }


@dataclass(frozen=True)
class PadChoice:
    """The token that fills padding. note: to be printed; None where there was nothing to choose."""

    token: str | None
    token_id: int
    note: str | None = None


def choose_pad_token(tokenizer: Any) -> PadChoice:
    """The tokenizer's pad token, else an unused one, else the end token. Adds none, changes nothing.

    A new token would need a larger embedding. Padding is under the attention mask and out of the
    loss, so the choice does not touch the result; it is said because saved tokenizers carry it.
    """
    if tokenizer.pad_token_id is not None:
        note = None
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            note = (
                f"pad token = end token ({tokenizer.pad_token}): padding is masked by position, "
                "real ends stay trained"
            )
        return PadChoice(tokenizer.pad_token, tokenizer.pad_token_id, note)
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    candidates = [name for name in added if re.search(r"(?i)\bpad|_pad\b", name)]
    candidates = [
        name for name in candidates if not re.search(r"(?i)image|vision|audio|video", name)
    ]
    if tokenizer.unk_token is not None:
        candidates.append(tokenizer.unk_token)
    candidates += [name for name in added if "reserved" in name.lower()]
    if tokenizer.eos_token is not None:
        candidates.append(tokenizer.eos_token)
    if not candidates:
        return PadChoice(None, 0, "pad token: the tokenizer has none; padding is token 0, masked")
    token = candidates[0]
    token_id = int(tokenizer.convert_tokens_to_ids(token))
    return PadChoice(
        token,
        token_id,
        f"pad token: the tokenizer has none; {token} (id {token_id}) pads, masked by position",
    )
