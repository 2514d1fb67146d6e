"""What the processes of a zeroth-order run exchange: losses at each step, and before the first what makes their steps one
another's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.utils import broadcast, gather_object

from ssdtune.trainer.trainer import TrainerError
from ssdtune.zeroth_order.log import Header


def gathered(shares: list[float]) -> list[list[float]]:
    """Those of all processes, in their order."""
    return gather_object([shares])


def begin_alike(trained: Iterable[torch.Tensor]) -> None:
    """Gives every process the first one's values of an adapter, as DistributedDataParallel does where there are gradients.
    Without it each would train another: random states differ, and libraries of linear algebra round as threads and
    addresses have it."""
    broadcast([values.data for values in trained], from_process=0)


def check_alike(header: Header) -> None:
    """Raises TrainerError in every process where one would make other steps than the first. header: of its log."""
    first, *others = gather_object([header])
    for number, other in enumerate(others, 1):
        there, here = "in process 0", f"in process {number}"
        if differences := other.differences(first, there=there, here=here):
            raise TrainerError(
                f"the processes would not take the same steps: {'; '.join(differences)}.\n"
                "Give each of them the same model and arguments, seed among them."
            )
