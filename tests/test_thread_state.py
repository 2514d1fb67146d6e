"""What torch keeps per thread, and context variables, belong to the micro-batch that set them.

Each test runs a decoder whose own forward enters some state around some layers, not the same in
every micro-batch, and compares with plain accumulation bit for bit: state that leaked to a
neighbour, or that recompute did not find, changes results.
"""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    Pair,
    accumulate,
    assert_same_gradients,
    assert_same_training,
    cut,
    make_pair,
    num_items,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from ssdtune.visit.thread_state import ThreadState

Stream = Callable[..., Any]
Around = Callable[[int, int], AbstractContextManager[Any]]
FACTOR: contextvars.ContextVar[float] = contextvars.ContextVar("FACTOR", default=1.0)
NUM_MICRO = 4


class StatefulLlama(LlamaForCausalLM):
    """A decoder that enters `around(layer, kind)` for each layer; `kind` is the batch's first token.

    `skips(layer, kind)`: layers that a micro-batch does not pass at all.
    """

    around: Around = staticmethod(lambda layer, kind: nullcontext())
    skips: Callable[[int, int], bool] = staticmethod(lambda layer, kind: False)

    def forward(  # type: ignore[override] - as few arguments as these tests need
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        kind = int(input_ids[0, 0])
        hidden = self.model.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.model.rotary_emb(hidden, positions)
        for i, layer in enumerate(self.model.layers):
            if not self.skips(i, kind):
                with self.around(i, kind):
                    hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
                if hidden.is_inference():
                    hidden = hidden.clone()
        logits = self.lm_head(self.model.norm(hidden))
        loss = self.loss_function(
            logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )
        return CausalLMOutput(loss=loss, logits=logits)


def stateful_pair(folder: Path, stream: Stream, around: Around, **options: Any) -> Pair:
    options = {"model_class": StatefulLlama, **options}
    pair = make_pair("llama", folder, stream, **options)
    for model in pair.models:
        model.get_base_model().around = around
    return pair


def batches(num_steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """Micro-batch m of each starts with token 3 + m."""
    made = []
    for step in range(num_steps):
        ids = tiny_models.batch("llama", 2 * NUM_MICRO, seed=step)["input_ids"]
        ids[::2, 0] = torch.arange(NUM_MICRO) + 3
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def micro(kind: int) -> int:
    """The micro-batch's number."""
    return kind - 3


def backward_in_another_thread(loss: torch.Tensor) -> None:
    """Such a thread begins with no state of torch's and no context variable of the caller's."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


# ------------------------------------------------------------------ grad mode


def frozen_tower(layer: int, kind: int) -> AbstractContextManager[Any]:
    return torch.no_grad() if layer < 2 else nullcontext()


def frozen_in_odd_ones(layer: int, kind: int) -> AbstractContextManager[Any]:
    return torch.no_grad() if layer < 2 and micro(kind) % 2 else nullcontext()


def frozen_in_the_middle(layer: int, kind: int) -> AbstractContextManager[Any]:
    return torch.no_grad() if layer == micro(kind) % 3 else nullcontext()


@pytest.mark.parametrize("around", [frozen_tower, frozen_in_odd_ones, frozen_in_the_middle])
def test_layers_under_no_grad_leave_their_neighbours_gradients(
    around: Around, tmp_path: Path, stream: Stream
) -> None:
    assert_same_training(stateful_pair(tmp_path, stream, around), batches())


def test_grad_mode_is_back_after_a_run(tmp_path: Path, stream: Stream) -> None:
    """A micro-batch that ends with gradients switched off leaves the caller's mode alone."""
    pair = stateful_pair(tmp_path, stream, lambda layer, kind: torch.no_grad())
    before = ThreadState.capture()
    pair.streamed(**batches()[0])
    assert ThreadState.capture() == before


def inference_tower(layer: int, kind: int) -> AbstractContextManager[Any]:
    return torch.inference_mode() if layer < 2 and micro(kind) != 1 else nullcontext()


def inference_at_staggered_layers(layer: int, kind: int) -> AbstractContextManager[Any]:
    return torch.inference_mode() if layer == micro(kind) % 3 else nullcontext()


@pytest.mark.parametrize("around", [inference_tower, inference_at_staggered_layers])
def test_layers_in_inference_mode_leave_their_neighbours_gradients(
    around: Around, tmp_path: Path, stream: Stream
) -> None:
    assert_same_training(stateful_pair(tmp_path, stream, around), batches())


# ------------------------------------------------------------------ autocast


def full_precision_layers(layer: int, kind: int) -> AbstractContextManager[Any]:
    is_full = layer == 1 or (layer == 2 and micro(kind) % 2)
    return torch.autocast("cpu", enabled=False) if is_full else nullcontext()


@pytest.mark.parametrize("where", ["outside", "inside", "another thread"])
@pytest.mark.parametrize("around", [full_precision_layers, lambda layer, kind: nullcontext()])
def test_autocast_regions_are_found_again_by_recompute(
    around: Around, where: str, tmp_path: Path, stream: Stream
) -> None:
    """Trainers run backward outside autocast. Inside, a cast that forward cached must not be used."""
    pair = stateful_pair(tmp_path, stream, around)
    for batch in batches():
        items, total = num_items([batch]), torch.zeros(())
        for piece in cut(batch, NUM_MICRO):
            total = total + under_autocast(pair.plain, piece, items, where)
        loss = under_autocast(pair.streamed, batch, items, where)
        assert torch.equal(loss, total)
        assert_same_gradients(pair)
        for model in pair.models:
            model.zero_grad()


def under_autocast(model: Any, batch: Any, items: int, where: str) -> torch.Tensor:
    """The loss of a forward in bf16 autocast, after its backward inside of it, outside, or in another thread."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, num_items_in_batch=items).loss
        if where == "inside":
            loss.backward()
        if where == "another thread":
            backward_in_another_thread(loss)
    if where == "outside":
        loss.backward()
    return loss.detach()


def half_precision_layers(layer: int, kind: int) -> AbstractContextManager[Any]:
    on = layer == micro(kind)
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else nullcontext()


def test_a_layer_may_switch_autocast_on(tmp_path: Path, stream: Stream) -> None:
    assert_same_training(stateful_pair(tmp_path, stream, half_precision_layers), batches())


# ------------------------------------------------------------------ context variables


@contextlib.contextmanager
def factor(value: float) -> Iterator[None]:
    token = FACTOR.set(value)
    try:
        yield
    finally:
        FACTOR.reset(token)


def read_factor_in_layers(model: Any) -> None:
    """Every feed-forward network multiplies its result by the context variable."""
    for layer in model.get_base_model().model.layers:
        read_factor(layer.mlp)


def read_factor(module: Any) -> None:
    """The module multiplies its result by the context variable."""
    plain = module.forward
    module.forward = lambda hidden: plain(hidden) * FACTOR.get()


def test_context_variables_travel_with_their_micro_batch(tmp_path: Path, stream: Stream) -> None:
    """One set by the caller, others by layers, each different; recompute finds the same values."""
    pair = stateful_pair(
        tmp_path,
        stream,
        lambda layer, kind: factor(1 + layer / 4) if micro(kind) != 2 else nullcontext(),
    )
    for model in pair.models:
        read_factor_in_layers(model)
    FACTOR.set(0.75)
    try:
        assert_same_training(pair, batches())
        assert FACTOR.get() == 0.75
    finally:
        FACTOR.set(1.0)


def test_a_variable_set_for_good_reaches_later_layers_only(tmp_path: Path, stream: Stream) -> None:
    """Set before a layer and never reset: it holds from there to the end of its own forward."""

    def around(layer: int, kind: int) -> AbstractContextManager[Any]:
        FACTOR.set(1.0 + micro(kind) / 8 if layer == micro(kind) else FACTOR.get())
        return nullcontext()

    pair = stateful_pair(tmp_path, stream, around)
    for model in pair.models:
        read_factor_in_layers(model)
    batch = batches()[0]
    items = num_items([batch])
    for piece in cut(batch, NUM_MICRO):
        contextvars.copy_context().run(accumulate, pair.plain, [piece], items)
    pair.streamed(**batch, num_items_in_batch=items).loss.backward()
    assert FACTOR.get() == 1.0
    assert_same_gradients(pair)


# ------------------------------------------------------------------ modes


class ScaledSilu(TorchFunctionMode):
    """Multiplies every `silu` by a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * self.scale if func is torch.nn.functional.silu else result


class ScaledSiluBelow(TorchDispatchMode):
    """The same under autograd's level."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * self.scale if func is torch.ops.aten.silu.default else result


@pytest.mark.parametrize("mode", [ScaledSilu, ScaledSiluBelow])
def test_modes_travel_with_their_micro_batch(
    mode: Callable[[float], AbstractContextManager[Any]], tmp_path: Path, stream: Stream
) -> None:
    """On the stack in some layers, deeper in others, not at all in the last micro-batch."""

    def around(layer: int, kind: int) -> AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        if micro(kind) != NUM_MICRO - 1:
            for depth in range(layer % 3):
                stack.enter_context(mode(1.5 + depth + micro(kind)))
        return stack

    assert_same_training(stateful_pair(tmp_path, stream, around), batches())


class LlamaWithSensitiveHead(StatefulLlama):
    """Its head, which is computed when the loss is, reads the context variable, and ends in a `silu`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        head: Any = self.lm_head
        plain = head.forward
        head.forward = lambda hidden: torch.nn.functional.silu(plain(hidden))
        read_factor(head)


@pytest.mark.parametrize("mode", [lambda scale: nullcontext(), ScaledSilu, ScaledSiluBelow])
def test_a_thread_that_knows_nothing_finds_variables_and_modes_again(
    mode: Callable[[float], AbstractContextManager[Any]], tmp_path: Path, stream: Stream
) -> None:
    """The caller's and those of layers, where all is recomputed in another thread, after the caller has left them.

    The head too: its gradients were made for a loss that is not scaled.
    """
    pair = stateful_pair(
        tmp_path,
        stream,
        lambda layer, kind: factor(1 + layer / 4 + micro(kind)),
        model_class=LlamaWithSensitiveHead,
    )
    for model in pair.models:
        read_factor_in_layers(model)
    batch = batches()[0]
    items = num_items([batch])
    with factor(0.75), mode(3.0):
        for piece in cut(batch, NUM_MICRO):
            (pair.plain(**piece, num_items_in_batch=items).loss * 3).backward()
        loss = pair.streamed(**batch, num_items_in_batch=items).loss * 3
    backward_in_another_thread(loss)
    assert_same_gradients(pair)


def test_a_mode_of_the_caller_holds_inside(tmp_path: Path, stream: Stream) -> None:
    pair = stateful_pair(tmp_path, stream, lambda layer, kind: nullcontext())
    batch = batches()[0]
    pieces, items = cut(batch, NUM_MICRO), num_items([batch])
    with ScaledSilu(3.0):
        expected = accumulate(pair.plain, pieces, items)
        loss = pair.streamed(**batch, num_items_in_batch=items).loss
        loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert_same_gradients(pair)


def test_recompute_leaves_the_state_of_backward_alone(tmp_path: Path, stream: Stream) -> None:
    """Recompute enters forward's autocast and mode; the caller's are back after it."""
    pair = stateful_pair(tmp_path, stream, lambda layer, kind: ScaledSilu(2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pair.streamed(**batches()[0]).loss
    before = ThreadState.capture()
    loss.backward()
    assert ThreadState.capture() == before


# ------------------------------------------------------------------ unequal paths


@pytest.mark.parametrize(
    "skips",
    [
        lambda layer, kind: layer == micro(kind),
        lambda layer, kind: layer > 0 and micro(kind) == 2,
        lambda layer, kind: layer == 3,
    ],
    ids=["each another layer", "one all but the first", "all the last"],
)
def test_micro_batches_may_take_different_paths(
    skips: Callable[[int, int], bool], tmp_path: Path, stream: Stream
) -> None:
    """A layer waits for those who come to it; who skips it waits at the next."""
    pair = stateful_pair(tmp_path, stream, lambda layer, kind: nullcontext())
    for model in pair.models:
        model.get_base_model().skips = skips
    assert_same_training(pair, batches())


def test_unequal_paths_under_unequal_states(tmp_path: Path, stream: Stream) -> None:
    def around(layer: int, kind: int) -> AbstractContextManager[Any]:
        states = [torch.no_grad, lambda: ScaledSilu(2.0), nullcontext, lambda: factor(0.5)]
        return states[(layer + micro(kind)) % 4]()

    pair = stateful_pair(tmp_path, stream, around)
    for model in pair.models:
        read_factor_in_layers(model)
        model.get_base_model().skips = lambda layer, kind: (layer * 3 + micro(kind)) % 5 == 0
    assert_same_training(pair, batches())
