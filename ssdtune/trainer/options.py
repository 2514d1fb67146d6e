"""Training the choice among a row's options, by gradients or without: what `data.OptionsCollator` makes of rows.

An option's score is the mean log-probability of its tokens; a row's loss is the cross-entropy of its options' scores,
that of a step the mean over its rows; the guess is the option with the highest score. (Malladi et al., arXiv 2305.17333;
their code: `forward_wrap_with_option_len` with `num_options`, and `one_step_pred`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import EvalPrediction, Trainer

from ssdtune.data import OptionsCollator
from ssdtune.visit.base import base_of
from ssdtune.visit.front_door import accepts

COLUMNS = ("options", "option_lengths", "label")


def option_scores(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Mean log-probability of the tokens of each option, float32 [num_rows, num_options].

    batch: as `OptionsCollator` makes it.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "picks", "logits_to_keep")}
    kept = batch["logits_to_keep"]
    if accepts(base_of(model).forward, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=kept).logits
    else:
        logits = model(**inputs).logits[:, kept]
    sequence, position, token, option, place = batch["picks"].unbind(1)
    found = logits[sequence, position].float().log_softmax(-1)
    found = found.gather(1, token.unsqueeze(1)).squeeze(1)
    # One place for each token, so that sums have one order, on a GPU too.
    table = found.new_zeros(int(option.max()) + 1, int(place.max()) + 1)
    counts = torch.bincount(option)
    scores = table.index_put((option, place), found).sum(1) / counts
    return scores.view(len(batch["labels"]), -1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose right option has the highest score."""
    scores: Any = prediction.predictions
    return {"accuracy": float((scores.argmax(-1) == prediction.label_ids).mean())}


class OptionsTrainer(Trainer):
    """A Trainer that, given an OptionsCollator, trains the choice and evaluates its accuracy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.has_options = isinstance(kwargs.get("data_collator"), OptionsCollator)
        if self.has_options and kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = accuracy
        super().__init__(*args, **kwargs)
        if self.has_options:
            self.loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Trainer's own, or the share of the step's loss that the rows of a batch with options have."""
        if "picks" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores, right = option_scores(model, inputs), inputs["labels"]
        loss = F.cross_entropy(scores, right, reduction="sum")
        loss = loss / (len(right) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the mean over them is taken later
        return (loss, {"loss": loss, "scores": scores}) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device
    ) -> Any:
        """Rows, where they have options: Trainer would leave out the first one, as a causal loss does a token."""
        if not self.has_options or not batch_samples:
            return super()._get_num_items_in_batch(list(batch_samples), device)
        shifted = [{"shift_labels": b["labels"], "labels": b["labels"]} for b in batch_samples]
        return super()._get_num_items_in_batch(shifted, device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        if self.has_options:
            new = set(COLUMNS) - set(self._signature_columns)
            self._signature_columns += sorted(new)
