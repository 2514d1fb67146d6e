"""The rows that a model is looked at on: the first ones of a data file, tokenized by the model's tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssdtune.packing.layout import PackError
from ssdtune.trainer.rows import open_tokenizer
from ssdtune.visit.front_door import accepts

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 4096  # of the text; their hidden states are in memory, once for each model
ROW_TOKENS = 1024  # of a row; the rest of it is left out


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """batches: one row each, with labels. counts: tokens in each row's loss."""

    name: str
    batches: Sequence[Mapping[str, torch.Tensor]]
    counts: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Of all rows, whether they count in a loss or not."""
        return sum(batch["input_ids"].numel() for batch in self.batches)

    def batches_for(self, model: Any) -> list[Mapping[str, Any]]:
        """The batches as a streamed model's forward takes them once: keys and values of every layer and row would be
        kept for nobody."""
        more = {"use_cache": False} if accepts(model.forward.inner, "use_cache") else {}
        return [{**batch, **more} for batch in self.batches]


def load_text(path: str, model: str) -> Text:
    """The first rows of a data file, MOST_TOKENS at most; what trains has a loss. Raises SSDTuneError for a file that
    training would refuse, PackError where nothing in its first rows trains."""
    from ssdtune.data import CausalCollator, choose_pad_token, load_dataset_rows, tokenize_rows

    tokenizer = open_tokenizer(model)
    rows = load_dataset_rows({"path": path}).first(MOST_TOKENS)
    dataset = tokenize_rows(rows, tokenizer, max_length=ROW_TOKENS).dataset
    collate = CausalCollator(choose_pad_token(tokenizer).token_id)
    batches: list[Mapping[str, torch.Tensor]] = []
    num_tokens = 0
    for row in dataset:
        num_tokens += len(row["input_ids"])  # pyright: ignore[reportCallIssue, reportArgumentType]
        if batches and num_tokens > MOST_TOKENS:
            break
        batches.append(collate([row]))  # pyright: ignore[reportArgumentType]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    kept = [i for i, count in enumerate(counts) if count]
    if not kept:
        raise PackError(
            f"{path}: none of its first {len(batches)} rows has two tokens of which one is trained.\n"
            "Give a text with longer rows."
        )
    return Text(path, [batches[i] for i in kept], [counts[i] for i in kept])
