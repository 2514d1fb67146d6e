"""Activations that stay from forward to backward: the same bits, one forward less, memory as rehearsed and within
the budget."""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    assert_equal,
    assert_same_training,
    gradients,
    make_pair,
    num_misses,
    with_lora,
)
from test_exact import BF16, BF16_AT_ONCE, EXACT, Stream, batches

from ssdtune.schedule.choices import Request
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, PlanError, Tier
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.saved_plan import plan_from
from ssdtune.schedule.search import search
from ssdtune.schedule.shares import search_shares
from ssdtune.schedule.simulate import Simulation, simulate
from ssdtune.schedule.validate import validate
from ssdtune.swap.recipe import view_of
from ssdtune.visit.activations import Activations, saving
from ssdtune.visit.rehearsal import rehearse

PLENTY = 10**9


def kept_by(model: Any) -> Activations:
    """The streamed model's activations, whatever is around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.ssdtune.activations


def tensor_bytes() -> int:
    """Of all tensors that are alive, whoever holds them: Python, or autograd for a hook."""
    found = (x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor)
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def half(name: str, folder: Path, stream: Stream) -> int:
    """Half of the bytes that a step of four micro-batches would keep."""
    base = tiny_models.build(name, dtype=torch.float32)
    tiny_models.save(base, folder)
    model = with_lora(stream(folder, model_class=type(base)), tiny_models.lora_targets(base))
    footprint = rehearse(model, tiny_models.batch(name, 2, 17)).footprint
    return 4 * sum(footprint.activation_bytes) // 2


# ------------------------------------------------------------------ bits


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if i % 2 else n for i, n in enumerate(EXACT)]
)
def test_training_equals_training_in_memory(name: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair(name, tmp_path, stream, activation_bytes=PLENTY)
    assert_same_training(pair, batches(name, 3, rows=6))
    kept = kept_by(pair.streamed)
    assert kept.num_kept > 0
    assert kept.num_over == 0
    assert kept.held_bytes == 0
    assert num_misses(pair.engine) == 0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in BF16_AT_ONCE else n for n in BF16]
)
def test_so_it_does_in_bf16(name: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair(
        name,
        tmp_path,
        stream,
        activation_bytes=PLENTY,
        dtype=torch.bfloat16,
        micro_batch_size=4,
    )
    assert_same_training(pair, batches(name, 2), num_micro=2)
    assert kept_by(pair.streamed).num_kept > 0


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.NVME])
def test_what_is_over_the_budget_is_computed_again(
    tier: Tier, tmp_path: Path, stream: Stream
) -> None:
    budget = half("llama", tmp_path / "measured", stream)
    made = {"block_inputs": tier, "scratch": tmp_path}
    pair = make_pair("llama", tmp_path / "model", stream, activation_bytes=budget, options=made)
    assert_same_training(pair, batches("llama", 3))
    kept = kept_by(pair.streamed)
    assert kept.num_kept > 0
    assert kept.num_over > 0
    assert kept.held_bytes == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_casts_are_as_without(autocast: bool, tmp_path: Path, stream: Stream) -> None:
    """The same numbers are drawn, and what a cast made of weights serves backward too."""
    found = []
    base = tiny_models.build("llama", dtype=torch.float32)
    tiny_models.save(base, tmp_path)
    batch = tiny_models.batch("llama", 4, 12)
    for budget in (0, PLENTY):
        model = with_lora(stream(tmp_path, activation_bytes=budget), lora_dropout=0.3)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach()})
    assert_equal(*found)


def test_a_second_backward_computes_again(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, activation_bytes=PLENTY)
    batch = batches("llama")[0]
    loss = pair.streamed(**batch).loss
    loss.backward(retain_graph=True)
    first = gradients(pair.streamed)
    pair.streamed.zero_grad()
    loss.backward()
    assert_equal(first, gradients(pair.streamed))


# ------------------------------------------------------------------ work and memory


@pytest.mark.parametrize(("budget", "times"), [(0, 2), (PLENTY, 1)])
def test_a_layer_is_computed_once(budget: int, times: int, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, activation_bytes=budget)
    batch = batches("llama")[0]
    pair.streamed(**batch).loss.backward()  # a first forward may be tried with a graph
    calls: list[int] = []
    layer = pair.streamed.get_base_model().model.layers[1].mlp
    layer.register_forward_hook(lambda *_: calls.append(1))
    pair.streamed(**batch).loss.backward()
    assert len(calls) == 4 * times


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "bloom"])
def test_what_stays_is_what_was_rehearsed(name: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair(name, tmp_path, stream, activation_bytes=PLENTY)
    batch = tiny_models.batch(name, 2, 16)
    expected = sum(rehearse(pair.streamed, batch).footprint.activation_bytes)
    loss = pair.streamed(**batch).loss
    held = kept_by(pair.streamed).held_bytes
    # The first of four layers has an input without a gradient, so that its norms save less.
    assert held == pytest.approx(expected, rel=0.04)
    assert held <= expected
    loss.backward()
    assert kept_by(pair.streamed).held_bytes == 0


def test_a_loss_that_is_dropped_lets_go(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, activation_bytes=PLENTY)
    loss = pair.streamed(**batches("llama")[0]).loss
    assert kept_by(pair.streamed).held_bytes > 0
    del loss
    gc.collect()
    assert kept_by(pair.streamed).held_bytes == 0


def test_what_is_over_the_budget_is_gone_with_its_visit(tmp_path: Path, stream: Stream) -> None:
    """At once, without looking for garbage. Its forward ran with a graph that no backward goes through."""
    budget = half("llama", tmp_path / "measured", stream)
    pair = make_pair("llama", tmp_path / "model", stream, activation_bytes=budget)
    alive = []
    gc.collect()  # so that it cannot take what other tests left between two counts
    gc.disable()
    try:
        for _ in range(3):
            pair.streamed(**batches("llama")[0]).loss.backward()
            alive.append(tensor_bytes())
    finally:
        gc.enable()
    assert kept_by(pair.streamed).num_over > 0
    assert alive[1] == alive[2]


def test_no_activation_is_alive_after_backward_while_the_loss_is(
    tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path, stream, activation_bytes=PLENTY)
    alive: list[Any] = []
    layer = pair.streamed.get_base_model().model.layers[1].mlp.down_proj

    def watch(module: Any, args: Any, result: torch.Tensor) -> None:
        alive.append(weakref.ref(args[0].untyped_storage()))

    layer.register_forward_hook(watch)
    loss = pair.streamed(**batches("llama")[0]).loss
    loss.backward()
    assert len(alive) == 4
    assert all(storage() is None for storage in alive)


def test_no_rows_of_a_weight_are_found_in_the_slot_too() -> None:
    """Experts that no token comes to: autograd saves parts of weights without an element, whose `data_ptr` is 0."""
    slot = torch.zeros(4096, dtype=torch.uint8)
    weight = view_of(slot, 256, torch.float32, (8, 4), (4, 1))
    hidden = torch.randn(3, 4, requires_grad=True)
    with saving([hidden], lambda: slot):
        made = hidden @ weight[5:5].t()
    (found,) = torch.autograd.grad(made.sum(), hidden)
    assert torch.equal(found, torch.zeros(3, 4))


# ------------------------------------------------------------------ plans


def request(budget: int, bytes_each: int = 10) -> Request:
    """Six layers and an embedding of 100 bytes each, through three slots."""
    blocks = [BlockShape(name=f"b{i}", slot_bytes=100, file_bytes=100) for i in range(7)]
    return Request(
        blocks=tuple(blocks),
        orders=plain_orders(7, first_trained=1),
        budgets=Budgets(ram_bytes=300, activation_bytes=budget),
        activation_bytes=(0, *[bytes_each] * 6),
    )


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A layer's forward takes one, its backward three, two where nothing is computed again; reading `read_s`."""

    read_s: float
    kind: str = "train"
    between_s: float = 0.0

    def steps(self, plan: Any) -> Any:
        return plan.sequences["train"]

    def op_seconds(self, steps: Any) -> list[float]:
        def one(op: Any) -> float:
            visit = steps.visits[op.visit]
            if op.kind != "compute":
                return self.read_s
            return 1.0 if visit.direction is Direction.FORWARD else 2.0 if visit.keeps else 3.0

        return [one(op) for op in steps.ops]

    def simulated(self, steps: Any) -> Simulation:
        return simulate(steps, self.op_seconds(steps))


def test_a_plan_keeps_what_the_budget_holds() -> None:
    plan = make_plan(request(35))
    assert len(plan.kept_blocks) == 3
    assert 0 not in plan.kept_blocks, "nothing goes back through an embedding"
    assert plan.activation_bytes == 30
    assert not any(v.keeps for v in plan.sequences["forward"].visits)
    assert not make_plan(request(0)).kept_blocks
    assert plan_from(plan.to_json()) == plan


def test_where_bytes_are_not_known_all_may_and_the_budget_decides() -> None:
    plan = make_plan(dataclasses.replace(request(35), activation_bytes=()))
    assert plan.kept_blocks == frozenset(range(1, 7))


def test_a_plan_that_keeps_half_a_visit_or_too_much_is_refused() -> None:
    plan = make_plan(request(35))
    with pytest.raises(PlanError, match=r"offload\.activations"):
        validate(dataclasses.replace(plan, budgets=Budgets(ram_bytes=300, activation_bytes=29)))
    train = plan.sequences["train"]
    last = len(train.visits) - 1
    visits = [
        dataclasses.replace(v, keeps=None if v.keeps else Tier.DEVICE) if i == last else v
        for i, v in enumerate(train.visits)
    ]
    steps = dataclasses.replace(train, visits=tuple(visits))
    with pytest.raises(PlanError, match="stay in some visits only"):
        validate(dataclasses.replace(plan, sequences={**plan.sequences, "train": steps}))


def test_a_search_keeps_where_compute_is_the_limit_and_not_where_the_drive_is() -> None:
    fast = search(request(60), Seconds(read_s=0.01)).plan
    assert len(fast.kept_blocks) == 6
    slow = search(request(60), Seconds(read_s=50.0)).plan
    assert len(slow.kept_blocks) <= 1, (
        "after the last read there is something to gain, else nowhere"
    )


def test_weights_and_activations_share_a_budget() -> None:
    """What compute waits for gets the memory: the drive's weights, or activations where all is read in time."""
    shared = dataclasses.replace(request(0, bytes_each=60), budgets=Budgets(ram_bytes=700))
    fast = search_shares(shared, Seconds(read_s=0.01)).plan
    assert len(fast.kept_blocks) == 6
    slow = search_shares(shared, Seconds(read_s=50.0)).plan
    assert slow.slot_bytes == 700
    assert not slow.kept_blocks
    for plan in (fast, slow):
        assert plan.ram_bytes + plan.activation_bytes <= 700
