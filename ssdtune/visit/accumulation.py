"""Notices a training loop that fetches every block several times for one optimizer step.

Verticality spans one run. A loop that calls the model once per micro-batch and steps the optimizer
after several is right, but reads the whole model as often. It shows in the gradients: at the start
of a run they are there already.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

WATCHED_STEPS = 4  # optimizer steps after which a loop is known


class AccumulationWarning(UserWarning):
    """Every block is fetched several times for one optimizer step."""


class AccumulationWatch:
    """Counts runs between two optimizer steps, for the first few, and warns once if they are many."""

    def __init__(self) -> None:
        self._num_runs = 0
        self._num_steps = 0

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """A run with backward begins. parameters: those that train."""
        if self._num_steps > WATCHED_STEPS:
            return
        # Any value: LoRA's A has a gradient of zeros in the first step, a cleared one may have too.
        if any(p.grad is not None and bool(p.grad.any()) for p in parameters):
            self._num_runs += 1
            return
        num_runs, self._num_runs = self._num_runs, 1
        self._num_steps += 1
        if num_runs > 1:
            self._num_steps = WATCHED_STEPS + 1
            warnings.warn(_text(num_runs), AccumulationWarning, stacklevel=2)


def _text(num_runs: int) -> str:
    return (
        f"ssdtune: every block is fetched {num_runs} times for one optimizer step, once for each "
        f"micro-batch of its gradient accumulation. Fetch it once: use ssdtune.SSDTrainer with the "
        f"same arguments, or a batch {num_runs} times as large, no accumulation, and "
        "ssdtune.stream(…, micro_batch_size=your present batch)."
    )
