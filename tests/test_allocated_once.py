"""Slots and buffers are allocated once: a step takes no memory of its own, and a fill only what the design names."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import check_slot, make_engine, run_step, write_blocks

from ssdtune.swap.engine import Engine
from ssdtune.swap.recipe import Copy, TensorView
from ssdtune.visit.live_bytes import LiveBytes


def places(engine: Engine) -> list[Any]:
    """Addresses of slots and buffers, then the tensors in the slots, themselves."""
    slots = engine.slots
    buffers = sorted(buffer.memory.data_ptr() for buffer in slots.buffers._buffers)
    visits = engine.plan.sequences["train"].visits
    tensors = (id(t) for visit in visits for t in slots.tensors(visit.block, visit.slot))
    return [*(memory.data_ptr() for memory in slots.memory), *buffers, *tensors]


def refuse_to_allocate(patch: pytest.MonkeyPatch) -> None:
    """In all threads: no memory for bytes of the drive, and none by the function that tensors are made with."""
    empty = torch.empty

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if args[0] and kwargs.get("device") != "meta":
            raise AssertionError(f"allocated: {args}")
        return empty(*args, **kwargs)

    for name, module in list(sys.modules.items()):
        if name.startswith("ssdtune.") and hasattr(module, "aligned_bytes"):
            patch.setattr(module, "aligned_bytes", refuse)
    patch.setattr(torch, "empty", refuse)


@pytest.mark.parametrize(
    ("kinds", "memory"),
    [
        (["packed", "plain", "copied", "plain"], {"num_slots": 2.0, "prefetch": 1}),
        (["packed"] * 7, {"num_slots": 3.0, "device_slots": 3.0}),
    ],
    ids=["RAM", "a device, some in RAM"],
)
def test_after_two_steps_nothing_is_allocated(
    kinds: list[str], memory: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By planned visits and by those on demand."""
    blocks = write_blocks(tmp_path, kinds)
    engine = make_engine(blocks, **memory)
    try:
        for _ in range(2):
            run_step(engine, blocks)
        before = places(engine)
        with monkeypatch.context() as patch:
            refuse_to_allocate(patch)
            run_step(engine, blocks)
            engine.begin_step("train")
            for visit in reversed(engine.plan.sequences["train"].visits):
                slot = engine.enter(visit.block, visit.direction)
                check_slot(engine, blocks, visit.block, slot)
            engine.leave()
        assert any(op.is_miss for op in engine.trace), "the last step was out of order"
        assert places(engine) == before
    finally:
        engine.close()


Piece = Callable[[torch.Tensor], torch.Tensor]
# What of a file tensor [6, 4] is wanted, how a recipe says it, and the bytes that are taken meanwhile.
PIECES: dict[str, tuple[Piece, dict[str, Any], int]] = {
    "the tensor": (lambda w: w, {}, 0),
    "rows": (lambda w: w[1:3], {"source_slices": ((1, 3), (0, 4))}, 0),
    "transposed": (lambda w: w.T, {"permute": (1, 0)}, 0),
    "rows of two halves in turn": (
        lambda w: torch.stack([w[:3], w[3:]], dim=1).view(6, 4),
        {"view": (2, 3, 4), "permute": (1, 0, 2)},
        0,
    ),
    "unaligned": (lambda w: w, {}, 6 * 4 * 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PIECES)
def test_a_piece_goes_to_its_slot_without_another_copy(name: str, dtype: torch.dtype) -> None:
    """As it lies, cut, permuted, cast (from float32); a tensor that lies unaligned in its file is copied first."""
    wanted, how, num_bytes = PIECES[name]
    weight = torch.randn(6, 4)
    offset = 2 if num_bytes else 8
    buffer = torch.zeros(128, dtype=torch.uint8)
    buffer[offset : offset + weight.nbytes] = weight.view(torch.uint8).flatten()
    source = TensorView(name="w", dtype=torch.float32, shape=(6, 4), offset=offset)
    expected = wanted(weight).to(dtype)
    target = torch.zeros(expected.shape, dtype=dtype)
    storage = buffer.untyped_storage()  # held, so that it is known below from its first use on
    with LiveBytes() as live:
        buffer.view(128)
        Copy(source=source, target=0, **how).run(buffer, [target])
    assert torch.equal(target, expected)
    assert live.peak == num_bytes
    assert storage.nbytes() == 128
