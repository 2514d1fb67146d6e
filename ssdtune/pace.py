"""How much the quickstart trains, and in which number format, on the processor at hand.

Processors differ by a factor of a hundred: one with bf16 instructions multiplies bf16 far faster
than fp32; one without emulates them, many times slower than fp32. So both are measured, on the
matrix shapes of the quickstart's model, and the faster one is used; how many rows and steps then
fit into the time is read off a small ladder. Every choice is a key of the configuration, printed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

NUM_PARAMETERS = 134_515_008  # of SmolLM2-135M
# Per parameter and token: 2 FLOP forward, 2 for the forward that is repeated on the way back, 2 for
# the gradients of activations. Adapters are small, and the base's own gradients aren't computed.
TRAIN_FLOP, EVAL_FLOP = 6, 2
TRAIN_SECONDS = 75.0  # of the three minutes; the rest is for loading, checking and two answers
MEASURE_SECONDS = 0.3  # for each number format
ROW_TOKENS = 165  # of a row of the reference on average, chat template included
BIG_NUM_PARAMETERS = 2_000_000_000
BIG_STEP_SECONDS = 25.0


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One size of the quickstart. Rows are micro-batches of two."""

    steps: int
    micro_batches: int
    eval_rows: int
    learning_rate: float

    @property
    def flop(self) -> float:
        """FLOP of the whole run: its steps, and an evaluation before and after."""
        trained = self.steps * self.micro_batches * 2 * TRAIN_FLOP
        return NUM_PARAMETERS * ROW_TOKENS * (trained + 2 * self.eval_rows * EVAL_FLOP)


# Few steps, so large ones: 2e-3 took held-out loss from 2.99 to 2.74 in two steps of four rows.
LADDER = (
    Rung(steps=24, micro_batches=4, eval_rows=40, learning_rate=5e-4),
    Rung(steps=12, micro_batches=4, eval_rows=24, learning_rate=1e-3),
    Rung(steps=12, micro_batches=2, eval_rows=12, learning_rate=1e-3),
    Rung(steps=8, micro_batches=2, eval_rows=8, learning_rate=2e-3),
    Rung(steps=4, micro_batches=2, eval_rows=4, learning_rate=2e-3),
)


def measure_gflops(dtype_name: str) -> float:
    """GFLOP/s of a layer's two kinds of product, x Wᵀ and g W, at a block of SmolLM2's shape.

    Takes about MEASURE_SECONDS, two products at least.
    """
    import torch

    dtype = getattr(torch, dtype_name)
    x, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    torch.nn.functional.linear(x[:16], weight)  # the library prepares itself on first use
    num_products, started = 0, perf_counter()
    while num_products == 0 or perf_counter() - started < MEASURE_SECONDS:
        gradient = torch.nn.functional.linear(x, weight)
        torch.matmul(gradient, weight)
        num_products += 2
    flop = num_products * 2 * 256 * 576 * 1536
    return flop / (perf_counter() - started) / 1e9


def choose_dtype(gflops: Mapping[str, float]) -> str:
    """The faster number format; the checkpoint's own bfloat16 unless float32 is clearly faster."""
    return "float32" if gflops["float32"] > 1.2 * gflops["bfloat16"] else "bfloat16"


def choose_rung(gflops: float) -> Rung:
    """The largest run that such a processor does in TRAIN_SECONDS; the smallest if none."""
    fitting = (rung for rung in LADDER if rung.flop / (gflops * 1e9) <= TRAIN_SECONDS)
    return next(fitting, LADDER[-1])


def flags(rung: Rung, *, eval_path: str | None) -> list[str]:
    """The rung as flags of `ssdtune train`; evaluation at the end on rows of `eval_path`, if any."""
    chosen = ["--max_steps", str(rung.steps), "--warmup_steps", "0"]
    chosen += ["--learning_rate", str(rung.learning_rate)]
    chosen += ["--per_device_train_batch_size", "2"]
    chosen += ["--gradient_accumulation_steps", str(rung.micro_batches)]
    if eval_path is None:
        return [*chosen, "--eval_dataset", "[]", "--eval_strategy", "no"]
    rows = json.dumps([{"path": eval_path, "split": f"train[:{rung.eval_rows}]"}])
    return [*chosen, "--eval_dataset", rows, "--eval_steps", str(rung.steps)]


def big_flags(gflops: float) -> list[str]:
    """Two rows a step, as long as the processor does in BIG_STEP_SECONDS with two billion weights."""
    tokens = gflops * 1e9 * BIG_STEP_SECONDS / (BIG_NUM_PARAMETERS * TRAIN_FLOP)
    length = next((n for n in (256, 128, 64) if 2 * n <= tokens), 32)
    chosen = ["--max_length", str(length), "--per_device_train_batch_size", "1"]
    # The prompt alone fills a short row; weights that are random have no answers to learn.
    chosen += ["--gradient_accumulation_steps", "2", "--train_on", "all"]
    chosen += ["--warmup_steps", "0"]
    return [*chosen, "--eval_dataset", "[]", "--eval_strategy", "no"]
