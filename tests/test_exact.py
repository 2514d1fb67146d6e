"""Streamed LoRA training equals training in memory: losses, gradient norms, weights, bit for bit.

Plain gradient accumulation over the same micro-batches is the reference; the weights come from
sharded files in the hub's form, through the smallest budget that works.
"""

from collections.abc import Callable, Iterator
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
    assert_equal,
    assert_same_gradients,
    assert_same_training,
    cut,
    digests,
    gradients,
    make_pair,
    num_items,
    num_misses,
    padded,
    with_lora,
)
from transformers import AutoModelForCausalLM

EXACT = (
    *("llama", "qwen3", "gemma3", "opt", "gpt2", "mistral", "phi3", "mixtral", "qwen3_moe"),
    *("gpt_oss", "deepseek_v3", "bloom", "falcon", "gpt_neox", "mamba2", "gemma3n", "gemma3_vlm"),
    "qwen3_next",
)
BF16 = ("llama", "gemma3", "gpt2", "mixtral", "gemma3n", "mamba2")
BF16_AT_ONCE = BF16[::2]  # the others in test_activations.py
SMOLLM2 = Path.home() / ".cache/ssdtune/smollm2-135m-instruct"
Stream = Callable[..., Any]


def every_architecture() -> Iterator[Any]:
    """(name, dtype), all in fp32 and in bf16; the long tail's bf16 is slow only by its number."""
    for name in EXACT:
        marks = [] if name in BF16_AT_ONCE else [pytest.mark.slow]
        yield pytest.param(name, torch.float32, id=f"{name}-fp32")
        yield pytest.param(name, torch.bfloat16, id=f"{name}-bf16", marks=marks)


def batches(name: str, num_steps: int = 5, rows: int = 8) -> list[dict[str, Any]]:
    """Of two lengths, so that nothing may be kept from one step to the next."""
    return [tiny_models.batch(name, rows, 17 - s % 2, seed=s) for s in range(num_steps)]


@pytest.mark.parametrize(("name", "dtype"), list(every_architecture()))
def test_five_steps_equal_training_in_memory(
    name: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    num_micro = 3 if dtype == torch.float32 else 2
    pair = make_pair(name, tmp_path, stream, dtype=dtype, micro_batch_size=6 // num_micro)
    before = digests(tmp_path)
    assert_same_training(pair, batches(name, rows=6), num_micro=num_micro)
    assert num_misses(pair.engine) == 0
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("t5", torch.float32, id="t5-fp32"),
        pytest.param("t5", torch.bfloat16, id="t5-bf16", marks=pytest.mark.slow),
        pytest.param("bart", torch.float32, id="bart-fp32", marks=pytest.mark.slow),
        pytest.param("bart", torch.bfloat16, id="bart-bf16"),
    ],
)
def test_encoder_decoders_equal_to_rounding(
    name: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    """Each decoder block hands back its own gradient of the encoder's states: another order.

    In bf16 AdamW turns the last bit of a small gradient into a step of another sign: one step.
    """
    pair = make_pair(name, tmp_path, stream, dtype=dtype)
    means = partial(accumulate_means, is_causal=False)
    steps = batches(name, 5 if dtype == torch.float32 else 1, rows=6)
    assert_same_training(pair, steps, rounding=ROUNDING[dtype], plain_step=means, count=False)


@pytest.mark.parametrize("name", tiny_models.SEQ2SEQ)
def test_a_decoder_behind_an_encoder_is_exact(name: str, tmp_path: Path, stream: Stream) -> None:
    """A position bias that hangs on nothing that trains must reach later blocks without a gradient.

    Else attention takes another kernel for it, and the recomputed activations differ.
    """
    pair = make_pair(name, tmp_path, stream, dtype=torch.bfloat16)
    batch = batches(name)[0]
    accumulate_means(pair.plain, cut(batch, 4), is_causal=False)
    pair.streamed(**batch).loss.backward()
    expected, found = (
        {n: g for n, g in gradients(m).items() if ".decoder." in n} for m in pair.models
    )
    assert_equal(expected, found)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_auxiliary_loss_of_routers_trains(name: str, tmp_path: Path, stream: Stream) -> None:
    """It is that of each micro-batch, as plain accumulation has it, with a coefficient that counts."""
    pair = make_pair(name, tmp_path, stream, adapt=with_router_lora)
    for model in pair.models:
        model.get_base_model().config.output_router_logits = True
        model.get_base_model().router_aux_loss_coef = 1.0
    batch = batches(name)[0]
    pieces, items = cut(batch, 4), num_items([batch])
    expected = [pair.plain(**piece, num_items_in_batch=items) for piece in pieces]
    output = pair.streamed(**batch, num_items_in_batch=items)
    assert output.aux_loss == sum(o.aux_loss for o in expected)
    assert_same_training(pair, batches(name, 3))
    for layer in range(4):
        joined = torch.cat([o.router_logits[layer] for o in expected])
        assert torch.equal(output.router_logits[layer], joined)


@pytest.mark.parametrize(("num_micro", "rounding"), [(1, None), (3, ROUNDING[torch.float32])])
def test_a_tied_matrix_that_trains(
    num_micro: int, rounding: float | None, tmp_path: Path, stream: Stream
) -> None:
    """The embedding's gradient of all micro-batches is added to the head's of all: to the bit where there is one."""
    pair = make_pair(
        "gpt2", tmp_path, stream, adapt=with_trained_embedding, micro_batch_size=6 // num_micro
    )
    batch = batches("gpt2", 1, rows=6)
    assert_same_training(pair, batch, num_micro=num_micro, rounding=rounding)


def with_trained_embedding(model: Any) -> Any:
    """LoRA beside the embedding, which is the head, too."""
    adapted = with_lora(model, ["c_attn"])
    adapted.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    return adapted


def with_router_lora(model: Any) -> Any:
    """LoRA below the routers, so that the auxiliary loss has a gradient of its own."""
    return with_lora(model, ["q_proj", "o_proj"])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gemma3_vlm"])
def test_hidden_states_and_attentions_are_those_of_the_model(
    name: str, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair(name, tmp_path, stream, attn_implementation="eager")
    batch = batches(name)[0]
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = [pair.plain.eval()(**piece, **wanted) for piece in cut(batch, 4)]
        output = pair.streamed.eval()(**batch, **wanted)
    assert torch.equal(output.logits, torch.cat([o.logits for o in expected]))
    for field in ("hidden_states", "attentions"):
        assert len(output[field]) == len(expected[0][field]) >= 4
        for layer, got in enumerate(output[field]):
            assert torch.equal(got, torch.cat([o[field][layer] for o in expected]))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_shared_keys_and_values_carry_their_gradient(
    dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    """Gemma 3n's last layers attend to keys and values that earlier ones left in a dict.

    LoRA on the earlier key and value projections alone: most of their gradient comes that way.
    """
    pair = make_pair(
        "gemma3n", tmp_path, stream, dtype=dtype, adapt=lambda m: with_lora(m, ["k_proj", "v_proj"])
    )
    layers = pair.plain.get_base_model().model.layers
    assert [layer.self_attn.is_kv_shared_layer for layer in layers] == [False, False, True, True]
    assert_same_training(pair, batches("gemma3n", 3, rows=6))


@pytest.mark.parametrize("factor", [1.5, 3.0, 100.0])
def test_more_memory_changes_no_bit(factor: float, tmp_path: Path, stream: Stream) -> None:
    """More slots, prefetching, residents, everything resident."""
    pair = make_pair("mixtral", tmp_path, stream, factor=factor)
    assert_same_training(pair, batches("mixtral", 3, rows=6))
    assert num_misses(pair.engine) == 0


@pytest.mark.parametrize("num_micro", [1, 2, 8])
def test_any_number_of_micro_batches_is_exact(
    num_micro: int, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("qwen3", tmp_path, stream, micro_batch_size=8 // num_micro)
    assert_same_training(pair, batches("qwen3", 2), num_micro=num_micro)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "bloom"])
def test_padded_rows_are_exact(name: str, tmp_path: Path, stream: Stream) -> None:
    """Micro-batches differ: some have padding and so a mask of their own, some have none."""
    pair = make_pair(name, tmp_path, stream)
    lengths = [17, 17, 12, 9, 17, 5, 3, 17]
    assert_same_training(pair, [padded(b, lengths) for b in batches(name, 2)])


def test_dropout_is_drawn_again_as_forward_drew_it(tmp_path: Path, stream: Stream) -> None:
    """With one micro-batch random numbers come in the order of the unmodified model: same bits."""
    dropout = {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}
    pair = make_pair(
        "gpt2",
        tmp_path,
        stream,
        micro_batch_size=8,
        adapt=lambda m: with_lora(m, lora_dropout=0.3),
        config=dropout,
    )
    batch = batches("gpt2")[0]
    seen = []
    for model in pair.models:
        torch.manual_seed(7)
        loss = model(**batch).loss
        loss.backward()
        seen.append({"loss": loss.detach(), "random numbers drawn after": torch.rand(3)})
    assert_equal(seen[0], seen[1], "outcomes")
    assert_same_gradients(pair)


def test_recompute_sees_the_masks_of_forward(tmp_path: Path, stream: Stream) -> None:
    """Several micro-batches draw in another order, but each recompute equals its own forward."""
    pair = make_pair("gpt2", tmp_path, stream, config={"resid_pdrop": 0.5})
    seen: list[torch.Tensor] = []
    for block in pair.streamed.get_base_model().transformer.h:
        block.mlp.dropout.register_forward_hook(
            lambda _m, _a, out: seen.append(out.detach().clone())
        )
    pair.streamed(**batches("gpt2")[0]).loss.backward()
    forward, backward = seen[:16], seen[16:]  # 4 blocks, 4 micro-batches
    assert len(backward) == 16
    for block in range(4):
        drawn = forward[4 * block : 4 * block + 4]
        again = backward[4 * (3 - block) : 4 * (3 - block) + 4]
        assert all(torch.equal(a, b) for a, b in zip(reversed(drawn), again, strict=True))
        assert not torch.equal(drawn[0] == 0, drawn[1] == 0)


def smollm2_batches(num_steps: int) -> list[dict[str, Any]]:
    """English of four rows, 24 tokens each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    words = (__doc__ or "").split() * 20
    ids = torch.tensor(tokenizer(" ".join(words))["input_ids"][: num_steps * 4 * 24])
    steps = ids.view(num_steps, 4, 24)
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in steps
    ]


def check_smollm2(stream: Stream, dtype: torch.dtype, num_steps: int) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    plain = with_lora(AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=dtype), targets)
    streamed = with_lora(stream(SMOLLM2, dtype=dtype, micro_batch_size=1, factor=1.2), targets)
    assert_same_training(Pair("smollm2", SMOLLM2, plain, streamed), smollm2_batches(num_steps))


needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason=f"SmolLM2 is not in {SMOLLM2}; the quickstart puts it there"
)


@needs_smollm2
def test_smollm2_takes_a_step_as_in_memory(stream: Stream) -> None:
    check_smollm2(stream, torch.float32, num_steps=1)


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_smollm2_takes_five_steps_as_in_memory(dtype: torch.dtype, stream: Stream) -> None:
    check_smollm2(stream, dtype, num_steps=5)
