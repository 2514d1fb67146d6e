"""Streamed LoRA training equals training in memory: losses, gradient norms, weights, bit for bit.

Plain gradient accumulation over the same micro-batches is the reference; the weights come from
sharded files in the hub's form, through the smallest budget that works.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    ROUNDING,
    Pair,
    accumulate_means,
    assert_same_training,
    digests,
    make_pair,
    num_misses,
)

EXACT = (
    *("llama", "qwen3", "gemma3", "opt", "gpt2", "mistral", "phi3", "mixtral", "qwen3_moe"),
    *("gpt_oss", "deepseek_v3", "bloom", "falcon", "gpt_neox", "mamba2", "gemma3n", "gemma3_vlm"),
)
SMOLLM2 = Path.home() / ".cache/ssdtune/smollm2-135m-instruct"
Stream = Callable[..., Any]


def batches(name: str, num_steps: int = 5, rows: int = 8) -> list[dict[str, Any]]:
    """Of two lengths, so that nothing may be kept from one step to the next."""
    return [tiny_models.batch(name, rows, 17 - s % 2, seed=s) for s in range(num_steps)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", EXACT)
def test_five_steps_equal_training_in_memory(
    name: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair(name, tmp_path, stream, dtype=dtype)
    before = digests(tmp_path)
    assert_same_training(pair, batches(name))
    assert num_misses(pair.engine) == 0
    assert digests(tmp_path) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny_models.SEQ2SEQ)
def test_encoder_decoders_equal_to_rounding(
    name: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    """Each decoder block hands back its own gradient of the encoder's states: another order."""
    pair = make_pair(name, tmp_path, stream, dtype=dtype)
    means = partial(accumulate_means, is_causal=False)
    assert_same_training(
        pair, batches(name), rounding=ROUNDING[dtype], plain_step=means, count=False
    )
