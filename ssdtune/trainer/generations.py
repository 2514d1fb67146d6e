"""Texts that a model makes while it is trained without gradients: what an objective of text judges.

Every variant of the weights answers the same prompts with the same random numbers, so that their values differ by the
weights alone. (MeZO's own objective of this kind: F1 of greedy answers, arXiv 2305.17333, section 3.3 and its code's
`zo_forward_nondiff`.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ssdtune.data.collate import IGNORED_LABEL
from ssdtune.errors import SSDTuneError
from ssdtune.kernels.philox import key_of

# What answers are made of, and what tells prompts from answers. Of anything else generate would know nothing.
READ = frozenset({"input_ids", "attention_mask", "labels", "decoder_input_ids"})


class GenerationError(SSDTuneError):
    """Answers that can't be made."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How answers are made. max_new_tokens: at most; an end token ends one before. temperature: 0 takes the likeliest
    token; else tokens are drawn, by numbers that the run's seed, the step and the prompts stand for."""

    max_new_tokens: int = 32
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf:
            raise GenerationError(
                f"max_new_tokens is {self.max_new_tokens} and temperature {self.temperature:g}: "
                "the first must be 1 or more, the second 0 (the likeliest token) or above."
            )


def prompts(batch: Mapping[str, Any], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), padded on the left: of each row what stands before its first trained label; without labels
    all of it."""
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    is_there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if labels is not None:
        is_there = is_there & ((labels != IGNORED_LABEL).cumsum(1) == 0)
    rows = [row[there] for row, there in zip(ids, is_there, strict=True)]
    length = max(map(len, rows))
    if not min(map(len, rows)):
        raise GenerationError(
            "a row has no prompt: its labels begin with its first token.\n"
            "Give rows of prompt + completion, or batches without labels."
        )
    made = ids.new_full((len(rows), length), pad_token_id)
    attended = torch.zeros_like(made)
    for k, row in enumerate(rows):
        made[k, length - len(row) :] = row
        attended[k, length - len(row) :] = 1
    return made, attended


def answers(
    model: Any,
    batch: Mapping[str, Any],
    how: Generation,
    *,
    seed: int,
    step: int,
    pad_token_id: int,
) -> torch.Tensor:
    """Ids of the answers to a batch's prompts, [rows, at most max_new_tokens]. An encoder's prompts are its inputs as they
    are, labels or not."""
    if model.config.is_encoder_decoder:
        ids, mask, first = batch["input_ids"], batch.get("attention_mask"), 1  # a decoder's start
    else:
        ids, mask = prompts(batch, pad_token_id)
        first = ids.shape[1]
    drawing = LogitsProcessorList()
    if how.temperature:
        # By what is asked, so that it doesn't matter which process asks it.
        asked = hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=8).digest()
        drawing.append(Drawn(key_of(seed, step, int.from_bytes(asked, "little")), how.temperature))
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=how.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_token_id,
        logits_processor=drawing,
    )
    return made[:, first:]


class Drawn(LogitsProcessor):
    """The likeliest token after this is one drawn from the softmax of logits / temperature: the Gumbel-max trick.

    Noise hangs on a key and on how many tokens there are: not on a generator that all micro-batches share.
    """

    def __init__(self, key: int, temperature: float) -> None:
        self.key, self.temperature = key, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [rows, vocabulary]."""
        key = key_of(self.key, input_ids.shape[1])
        generator = torch.Generator().manual_seed(key >> 1)  # takes 63 bits
        exponential = torch.empty(scores.shape).exponential_(generator=generator)
        return scores.float() / self.temperature - exponential.log().to(scores.device)
