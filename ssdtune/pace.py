"""How much the quickstart trains, and in which number format, on the processor at hand.

Processors differ by a factor of a hundred: one with bf16 instructions multiplies bf16 far faster
than fp32; one without emulates them, many times slower than fp32. So both are measured, in a step's
passes of the quickstart's model, and the faster one is used; how many rows and steps then fit into
the time is read off a small ladder. Every choice is a key of the configuration, printed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NUM_PARAMETERS = 134_515_008  # of SmolLM2-135M
NUM_BLOCKS, HIDDEN, VOCABULARY = 30, 576, 49_152
NUM_SLICES = 12  # of its head: one is measured
# Per parameter and token: 2 FLOP forward, 2 for the forward that is repeated on the way back, 2 for
# the gradients of activations. Adapters are small, and the base's own gradients aren't computed.
TRAIN_FLOP, EVAL_FLOP = 6, 2
TRAIN_SECONDS = 75.0  # of the three minutes; the rest is for loading, checking and two answers
MEASURE_SECONDS = 0.5  # for each of two passes in each number format
ROW_TOKENS = 165  # of a row of the reference on average, chat template included
NOTHING_EVALUATED = "--eval_dataset [] --eval_strategy no --eval_on_start false".split()
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
    """GFLOP/s of whole training steps of SmolLM2, products and all else.

    A processor's rate in products alone says too little: attention, the loss and the adapters' small
    products make a step two to three times as long, and bf16 helps them less. So a pass through one
    block and one through a slice of the head are timed, MEASURE_SECONDS each.
    """
    import torch

    from ssdtune.visit.libraries import bound_caches

    bound_caches()  # before the first product, as they must be
    dtype = getattr(torch, dtype_name)
    seconds = NUM_BLOCKS * seconds_of(_block_pass(dtype))
    seconds += NUM_SLICES * seconds_of(_head_pass(dtype))
    return 2 * ROW_TOKENS * NUM_PARAMETERS * TRAIN_FLOP / seconds / 1e9


def seconds_of(run: Callable[[], object]) -> float:
    """The time of a run, on average over MEASURE_SECONDS or one run, after a first that doesn't count."""
    run()  # libraries prepare themselves on first use
    num_runs, started = 0, perf_counter()
    while num_runs == 0 or perf_counter() - started < MEASURE_SECONDS:
        run()
        num_runs += 1
    return (perf_counter() - started) / num_runs


def _block_pass(dtype: torch.dtype) -> Callable[[], object]:
    """A micro-batch through one block with adapters: forward, and again with backward."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(**sizes)
    block: Any = LlamaDecoderLayer(config, layer_idx=0).to(dtype)
    targets = [
        name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), block)
    x = torch.ones(2, ROW_TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(ROW_TOKENS)[None])

    def run() -> None:
        with torch.no_grad():
            block(x, position_embeddings=positions)
        block(x, position_embeddings=positions).sum().backward()

    return run


def _head_pass(dtype: torch.dtype) -> Callable[[], object]:
    """The same through a slice of the vocabulary, and the loss."""
    import torch
    from torch.nn import functional as F

    weight = torch.zeros(VOCABULARY // NUM_SLICES, HIDDEN, dtype=dtype)
    x = torch.ones(2 * ROW_TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    labels = torch.zeros(2 * ROW_TOKENS, dtype=torch.long)
    return lambda: F.cross_entropy(F.linear(x, weight).float(), labels).backward()


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
        return [*chosen, *NOTHING_EVALUATED]
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
    return [*chosen, *NOTHING_EVALUATED]
