"""Each block is fetched at most twice a step, whatever the number of micro-batches, as the plan says.

Read off the engine's trace, the record of what really happened.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import num_misses, with_lora

from ssdtune.schedule import trace
from ssdtune.schedule.plan import Direction, Kind
from ssdtune.schedule.trace import UNPLANNED, TraceOp

Stream = Callable[..., Any]
NUM_STEPS = 5
STEADY = (4, 5)  # by then the plan has followed the model's real order of visits


def train(model: Any, name: str, *, rows: int, num_steps: int = NUM_STEPS) -> Any:
    """Runs steps on an adapted model; the engine after them."""
    for step in range(num_steps):
        model(**tiny_models.batch(name, rows, seed=step)).loss.backward()
    return model.get_base_model().ssdtune.engine


def loads(ops: list[TraceOp]) -> Counter[str]:
    """How often each block was read."""
    return Counter(op.block for op in ops if op.kind is Kind.LOAD)


def visits(ops: list[TraceOp]) -> list[tuple[str, Direction]]:
    """(block, direction) of each visit, as they came."""
    return [(op.block, op.direction) for op in ops if op.kind is Kind.COMPUTE]


def adapted(name: str, folder: Path, stream: Stream, **options: Any) -> Any:
    """A streamed tiny model with LoRA on its linear layers."""
    base = tiny_models.build(name)
    tiny_models.save(base, folder)
    return with_lora(stream(folder, **options))


@pytest.mark.parametrize(
    ("num_micro", "factor"), [(2, 1.0), (4, 1.0), (8, 1.0), (2, 3.5), (8, 2.0)]
)
def test_each_block_is_read_at_most_twice_a_step(
    num_micro: int, factor: float, tmp_path: Path, stream: Stream
) -> None:
    model = adapted("llama", tmp_path, stream, factor=factor, micro_batch_size=1)
    engine = train(model, "llama", rows=num_micro)
    steps = trace.steps(engine.trace)
    assert num_misses(engine) == 0
    for step in range(1, NUM_STEPS + 1):
        counted = loads(steps[step])
        assert max(counted.values(), default=0) <= 2, (step, counted)


@pytest.mark.parametrize(
    ("factor", "loss_factor", "turning"), [(1.6, 1, "model.layers.3"), (1.0, 3, "lm_head")]
)
def test_what_still_lies_in_its_slot_at_the_turn_around_is_not_read_again(
    factor: float, loss_factor: int, turning: str, tmp_path: Path, stream: Stream
) -> None:
    """The first block of backward: the last layer, where head and layers have a slot each, or the head, whose
    gradients are made in backward where a loss is scaled by what is no power of two."""
    model = adapted("llama", tmp_path, stream, factor=factor)
    for step in range(NUM_STEPS):
        (model(**tiny_models.batch("llama", 8, seed=step)).loss * loss_factor).backward()
    engine = model.get_base_model().ssdtune.engine
    assert num_misses(engine) == 0
    steps = trace.steps(engine.trace)
    for step in STEADY:
        backward = (
            name for name, direction in visits(steps[step]) if direction is Direction.BACKWARD
        )
        assert next(backward) == turning
        assert loads(steps[step])[turning] == 1, step


@pytest.mark.parametrize("num_micro", [2, 8])
def test_every_block_is_visited_once_each_way(
    num_micro: int, tmp_path: Path, stream: Stream
) -> None:
    """Forward in the model's order, backward in the opposite one, all micro-batches in each visit."""
    model = adapted("qwen3", tmp_path, stream, micro_batch_size=1)
    engine = train(model, "qwen3", rows=num_micro, num_steps=2)
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(4)), "lm_head"]
    layers = names[1:-1]
    forward = [(name, Direction.FORWARD) for name in names]
    for ops in trace.steps(engine.trace).values():
        backward = [v for v in visits(ops)[len(names) :] if v[0] != "lm_head"]
        assert visits(ops)[: len(names)] == forward or not visits(ops)
        assert backward == [(name, Direction.BACKWARD) for name in reversed(layers)] or not backward


def test_micro_batches_cost_no_reading(tmp_path: Path, stream: Stream) -> None:
    """The same bytes for 2 and for 8 micro-batches."""
    tiny_models.save(tiny_models.build("llama"), tmp_path)
    read = set()
    for num_micro in (2, 8):
        model = with_lora(stream(tmp_path, micro_batch_size=1, factor=2.0))
        steps = trace.steps(train(model, "llama", rows=num_micro).trace)
        read.add(tuple(trace.read_bytes(steps[step]) for step in STEADY))
    assert len(read) == 1


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *(("llama", 1.0), ("llama", 2.0), ("llama", 3.5), ("llama", 100.0)),
        *(("gpt2", 1.0), ("gpt2", 3.5), ("mixtral", 1.0), ("mixtral", 2.0), ("gemma3_vlm", 2.0)),
        *(("t5", 1.0), ("bart", 1.0), ("bart", 3.5)),
    ],
)
def test_a_steady_step_reads_what_the_plan_says(
    name: str, factor: float, tmp_path: Path, stream: Stream
) -> None:
    """In bytes, and op by op: what the trace holds of a step is the plan's ops, each once."""
    model = adapted(name, tmp_path, stream, factor=factor)
    engine = train(model, name, rows=8)
    planned = engine.plan.sequences["train"]
    steps = trace.steps(engine.trace)
    for step in STEADY:
        assert trace.read_bytes(steps[step]) == planned.read_bytes
        assert Counter(op.op_id for op in steps[step]) == Counter(op.id for op in planned.ops)
        for op in steps[step]:
            wanted = planned.ops[op.op_id]
            assert (op.kind, op.lane, op.block) == (wanted.kind, wanted.lane, wanted.block)
            assert op.num_bytes == wanted.num_bytes
            assert op.end_s >= op.start_s


def test_a_model_that_fits_is_read_once(tmp_path: Path, stream: Stream) -> None:
    """With memory for all of it, each block is read before its first use and never again."""
    engine = train(adapted("llama", tmp_path, stream, factor=100.0), "llama", rows=4)
    counted = loads(engine.trace)
    assert counted == dict.fromkeys((block.name for block in engine.plan.blocks), 1)
    steps = trace.steps(engine.trace)
    assert all(not trace.read_bytes(steps[step]) for step in range(2, NUM_STEPS + 1))


def test_tied_embeddings_are_one_block(tmp_path: Path, stream: Stream) -> None:
    """Stored once, named once, read once where the head's visit follows no other block's."""
    model = adapted("gpt2", tmp_path, stream)
    base = model.get_base_model()
    assert base.lm_head.weight is base.transformer.wte.weight
    assert base.ssdtune.blocks.count("transformer.wte") == 1
    assert "lm_head" not in base.ssdtune.blocks


def test_evaluation_reads_each_block_once(tmp_path: Path, stream: Stream) -> None:
    model = adapted("llama", tmp_path, stream, factor=1.0).eval()
    with torch.no_grad():
        for step in range(4):
            model(**tiny_models.batch("llama", 8, seed=step))
    engine = model.get_base_model().ssdtune.engine
    assert num_misses(engine) == 0
    for ops in list(trace.steps(engine.trace).values())[:4]:
        assert set(loads(ops).values()) <= {1}


def test_reading_runs_ahead_of_compute(tmp_path: Path, stream: Stream) -> None:
    """With two slots for layers, most reading starts before the visit ahead of it has ended."""
    model = adapted("llama", tmp_path, stream, factor=2.7)
    engine = train(model, "llama", rows=8)
    planned = engine.plan.sequences["train"]
    layer = max(block.slot_bytes for block in engine.plan.blocks)
    assert engine.plan.slots.count(layer) == 2
    early = []
    for step in STEADY:
        ran = {op.op_id: op for op in trace.steps(engine.trace)[step]}
        computes = [op.id for op in planned.ops if op.kind is Kind.COMPUTE]
        for op in planned.ops:
            if op.kind is Kind.LOAD and op.visit > 1:
                early.append(ran[op.id].start_s < ran[computes[op.visit - 1]].end_s)
    assert early
    assert sum(early) >= len(early) // 2


def test_a_trace_names_planned_work(tmp_path: Path, stream: Stream) -> None:
    """After the first steps nothing in the trace is unplanned."""
    engine = train(adapted("mixtral", tmp_path, stream, factor=2.0), "mixtral", rows=4)
    assert all(op.op_id != UNPLANNED for op in engine.trace if op.step in STEADY)
