"""Rows of a step, and how many steps."""

from dataclasses import dataclass

from ssdtune.keys.ranges import COUNT
from ssdtune.settings import Number, Or, Whole, key


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class BatchKeys:
    """The batch and the length of the run."""

    per_device_train_batch_size: int = key(
        COUNT,
        "the micro-batch: rows that pass a block at once",
        default=1,
        aliases=("micro_batch_size",),
    )
    per_device_eval_batch_size: int = key(
        Or("auto", COUNT),
        "the same in evaluation; auto: as in training",
        default=None,
        aliases=("eval_batch_size",),
        example="4",
    )
    gradient_accumulation_steps: int = key(
        COUNT,
        "micro-batches of a step; all pass a block before it leaves, so more of them cost no I/O",
        default=8,
    )
    num_train_epochs: float = key(
        Number(is_open=True, maximum=10_000),
        "passes over the data",
        default=1.0,
        aliases=("num_epochs", "epochs"),
    )
    max_steps: int = key(
        Whole(1, besides=(-1,)),
        "steps to make instead; -1: as many as num_train_epochs needs",
        default=-1,
    )
