"""A step whose order is not the plan's is still right: blocks are fetched on demand and counted.

The model passes its layers in an order that each test chooses, per step or per micro-batch.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    ROUNDING,
    Pair,
    accumulate,
    assert_equal,
    assert_same_training,
    cut,
    gradients,
    make_pair,
    num_items,
    num_misses,
)
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from ssdtune.schedule import trace

Stream = Callable[..., Any]
PLAIN = [0, 1, 2, 3]


class OrderedLlama(LlamaForCausalLM):
    """A decoder that passes its layers as `order(kind)` says; `kind` is the batch's first token."""

    order: Callable[[int], Sequence[int]] = staticmethod(lambda kind: PLAIN)

    def forward(  # type: ignore[override] - as few arguments as these tests need
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        hidden = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.model.rotary_emb(hidden, positions)
        for i in self.order(int(input_ids[0, 0])):
            layer = self.model.layers[i]
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
        logits = self.lm_head(self.model.norm(hidden))
        loss = self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )
        return CausalLMOutput(loss=loss, logits=logits)


def ordered_pair(folder: Path, stream: Stream, **options: Any) -> Pair:
    return make_pair("llama", folder, stream, model_class=OrderedLlama, **options)


def set_order(pair: Pair, order: Callable[[int], Sequence[int]]) -> None:
    for model in pair.models:
        model.get_base_model().order = order


def batch(step: int = 0) -> dict[str, torch.Tensor]:
    """Four micro-batches of two rows; micro-batch m starts with token 3 + m."""
    ids = tiny_models.batch("llama", 8, seed=step)["input_ids"]
    ids[::2, 0] = torch.arange(4) + 3
    return {"input_ids": ids, "labels": ids.clone()}


OTHER_ORDERS = {
    "one skipped": [0, 1, 3],
    "most skipped": [2],
    "one twice": [0, 1, 1, 2, 3],
    "one twice, apart": [0, 1, 2, 1, 3],
    "reached early": [3, 0, 1, 2],
    "backwards": [3, 2, 1, 0],
    "all twice": [0, 1, 2, 3, 0, 1, 2, 3],
}


@pytest.mark.parametrize(
    ("order", "factor"),
    [*((order, 1.0) for order in OTHER_ORDERS), ("one skipped", 2.5), ("backwards", 2.5)],
)
def test_another_order_trains_as_in_memory(
    order: str, factor: float, tmp_path: Path, stream: Stream
) -> None:
    """A layer passed twice sums its own gradient in another order than the unmodified model."""
    pair = ordered_pair(tmp_path, stream, factor=factor)
    assert_same_training(pair, [batch(0)])
    set_order(pair, lambda kind: OTHER_ORDERS[order])
    is_repeated = len(set(OTHER_ORDERS[order])) < len(OTHER_ORDERS[order])
    rounding = ROUNDING[torch.float32] if is_repeated else None
    assert_same_training(pair, [batch(step) for step in range(1, 3)], rounding=rounding)


@pytest.mark.parametrize("order", OTHER_ORDERS)
def test_a_lasting_order_is_followed(order: str, tmp_path: Path, stream: Stream) -> None:
    """The first step of an order that the plan does not have may miss; from then on none does."""
    pair = ordered_pair(tmp_path, stream, factor=1.0)
    pair.streamed(**batch()).loss.backward()
    set_order(pair, lambda kind: OTHER_ORDERS[order])
    for step in range(4):
        pair.streamed(**batch(step)).loss.backward()
    steps = trace.steps(pair.engine.trace)
    misses = {step: sum(op.is_miss for op in ops) for step, ops in steps.items()}
    assert all(not misses[step] for step in (4, 5)), misses


def test_a_block_out_of_order_is_counted_as_a_miss(tmp_path: Path, stream: Stream) -> None:
    pair = ordered_pair(tmp_path, stream, factor=1.0)
    for step in range(3):
        pair.streamed(**batch(step)).loss.backward()
    assert num_misses(pair.engine) == 0
    set_order(pair, lambda kind: OTHER_ORDERS["backwards"])
    pair.streamed(**batch()).loss.backward()
    assert num_misses(pair.engine) > 0


def test_an_order_that_never_lasts_is_still_right(tmp_path: Path, stream: Stream) -> None:
    """More changes than the planner follows."""
    pair = ordered_pair(tmp_path, stream, factor=1.0)
    orders = [PLAIN, [0, 2, 3], [3, 2, 1, 0], [1, 2], [0, 3], [2, 0, 1], PLAIN, [3]]
    for step, order in enumerate(orders):
        set_order(pair, lambda kind, order=order: order)
        assert_same_training(pair, [batch(step)])
    set_order(pair, lambda kind: PLAIN)
    assert_same_training(pair, [batch(step) for step in range(2)])


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_micro_batches_may_disagree_on_the_order(
    factor: float, tmp_path: Path, stream: Stream
) -> None:
    """Whoever comes to the earliest block passes first; nobody waits for ever."""
    orders = [PLAIN, [3, 2, 1, 0], [1, 3], [2, 0, 3, 1]]
    pair = ordered_pair(tmp_path, stream, factor=factor)
    set_order(pair, lambda kind: orders[kind - 3])
    assert_same_training(pair, [batch(step) for step in range(3)], rounding=ROUNDING[torch.float32])


# ------------------------------------------------------------------ steps that are no plain steps


def plain_gradients(pair: Pair, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Of the mean losses of all these batches, summed."""
    for one in batches:
        accumulate(pair.plain, cut(one, 4), num_items([one]))
    return gradients(pair.plain)


def test_an_evaluation_between_forward_and_backward_changes_nothing(
    tmp_path: Path, stream: Stream
) -> None:
    pair = ordered_pair(tmp_path, stream)
    loss = pair.streamed(**batch(0)).loss
    with torch.no_grad():
        pair.streamed(**batch(1))
    loss.backward()
    assert_equal(plain_gradients(pair, [batch(0)]), gradients(pair.streamed))


def test_two_forwards_may_share_a_backward(tmp_path: Path, stream: Stream) -> None:
    """Two runs in one step associate the sum otherwise: equal to rounding."""
    pair = ordered_pair(tmp_path, stream)
    (pair.streamed(**batch(0)).loss + pair.streamed(**batch(1)).loss).backward()
    expected = plain_gradients(pair, [batch(0), batch(1)])
    assert_equal(expected, gradients(pair.streamed), rounding=ROUNDING[torch.float32])


def test_forwards_whose_loss_is_dropped_leave_nothing_behind(
    tmp_path: Path, stream: Stream
) -> None:
    pair = ordered_pair(tmp_path, stream)
    for step in range(3):
        pair.streamed(**batch(step))
    gc.collect()
    assert_same_training(pair, [batch(step) for step in range(2)])


def test_accumulation_outside_equals_to_rounding(tmp_path: Path, stream: Stream) -> None:
    """`model(batch).loss.backward()` several times before the optimizer's step."""
    pair = ordered_pair(tmp_path, stream)
    for step in range(3):
        pair.streamed(**batch(step)).loss.backward()
    expected = plain_gradients(pair, [batch(step) for step in range(3)])
    assert_equal(expected, gradients(pair.streamed), rounding=ROUNDING[torch.float32])


def test_a_graph_that_is_kept_can_be_walked_again(tmp_path: Path, stream: Stream) -> None:
    pair = ordered_pair(tmp_path, stream)
    loss = pair.streamed(**batch()).loss
    loss.backward(retain_graph=True)
    once = gradients(pair.streamed)
    pair.streamed.zero_grad()
    loss.backward()
    assert_equal(once, gradients(pair.streamed))
    assert_equal(plain_gradients(pair, [batch()]), once)


def test_gradients_of_chosen_parameters_only(tmp_path: Path, stream: Stream) -> None:
    """`torch.autograd.grad` for one layer's adapter: backward stops there."""
    pair = ordered_pair(tmp_path, stream)
    expected = plain_gradients(pair, [batch()])
    chosen = [
        (n, p) for n, p in pair.streamed.named_parameters() if "layers.2" in n and p.requires_grad
    ]
    loss = pair.streamed(**batch()).loss
    found = torch.autograd.grad(loss, [p for _, p in chosen])
    assert_equal(
        {name: expected[name] for name, _ in chosen},
        dict(zip((name for name, _ in chosen), found, strict=True)),
    )
    assert_same_training(pair_without_gradients(pair), [batch(1)])


def pair_without_gradients(pair: Pair) -> Pair:
    for model in pair.models:
        model.zero_grad()
    return pair


def test_two_streamed_models_take_turns(tmp_path: Path, stream: Stream) -> None:
    """A policy and a reference, say, each with an engine of its own."""
    one = ordered_pair(tmp_path / "one", stream)
    other = make_pair("gpt2", tmp_path / "other", stream)
    for step in range(2):
        assert_same_training(one, [batch(step)])
        assert_same_training(other, [tiny_models.batch("gpt2", 8, seed=step)])
    first = one.streamed(**batch(5)).loss
    second = other.streamed(**tiny_models.batch("gpt2", 8)).loss
    (first + second).backward()
    assert_equal(plain_gradients(one, [batch(5)]), gradients(one.streamed))


def test_a_dropped_model_ends_its_threads_and_frees_its_slots(tmp_path: Path) -> None:
    import threading
    import weakref

    from support import streamed

    before = {t.ident for t in threading.enumerate()}
    tiny_models.save(tiny_models.build("llama"), tmp_path)
    model = streamed(tmp_path)
    model(**tiny_models.batch("llama", 4, 9, seed=0))
    slots = weakref.ref(model.ssdtune.engine.slots)
    started = [t for t in threading.enumerate() if t.ident not in before and "ssdtune" in t.name]
    assert started
    del model
    gc.collect()
    assert not any(thread.is_alive() for thread in started)
    gc.collect()
    assert slots() is None
