"""Fills and what carries them: bytes end where the recipe says, buffers serve one at a time, ops are
recorded under the plan's ids. One level below the engine."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    COLUMNS,
    CPU,
    ROWS,
    Blocks,
    F,
    GatedStorage,
    gated,
    make_small_plan,
    wait_for,
    write_blocks,
)

from ssdtune.kernels.checksum import checksum
from ssdtune.schedule.plan import Kind, Lane
from ssdtune.schedule.trace import UNPLANNED, TraceOp
from ssdtune.swap.fills import Fill, Lanes, Pools, SwapError
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe, Copy, Summed, TensorView, alone
from ssdtune.swap.slots import Buffers, Slots
from ssdtune.swap.storage import StorageError, aligned_bytes

MakeLanes = Callable[..., "Running"]


def a_fill(block: int = 0, slot: int = 0, op_id: int = UNPLANNED) -> Fill:
    return Fill(block=block, name=f"layers.{block}", slot=slot, op_id=op_id, step=3, direction=F)


class Running:
    """Lanes over real files, and what they recorded."""

    def __init__(
        self,
        blocks: Blocks,
        *,
        num_slots: float = 3.0,
        cached: Any = (),
        storage: GatedStorage | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        plan = make_small_plan(blocks, num_slots, 2)
        self.slots = Slots(plan, blocks.recipes, CPU)
        self.storage = storage or gated(blocks)
        self.pool = ReaderPool(self.storage)
        self.ops: list[TraceOp] = []
        self.num_issued = 0
        memory = {block: aligned_bytes(blocks.recipes[block].file_bytes) for block in cached}
        self.lanes = Lanes(
            self.slots,
            Pools(self.pool),
            self.ops.append,
            on_issued=self._count,
            cached=memory,
            timeout_s=timeout_s,
        )

    def _count(self) -> None:
        self.num_issued += 1

    def close(self) -> None:
        self.storage.gate.set()
        self.lanes.stop()
        self.pool.close()
        self.lanes.close(10)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[MakeLanes]:
    """`Running`, closed after the test."""
    made: list[Running] = []

    def make(blocks: Blocks, **options: Any) -> Running:
        made.append(Running(blocks, **options))
        return made[-1]

    yield make
    for running in made:
        running.close()


# ------------------------------------------------------------------ one fill


def test_a_fill_is_present_after_it_was_issued_and_only_then() -> None:
    fill = a_fill()
    assert not (fill.is_issued())
    assert not (fill.is_present())
    assert not (fill.has_failed())
    fill.issue()
    assert fill.is_issued()
    assert fill.is_present()
    assert not fill.has_failed()
    fill.issue(ValueError("too late"))
    fill.wait(0)


def test_a_failed_fill_has_ended_but_is_not_present() -> None:
    fill = a_fill(block=7)
    fill.issue(StorageError("the drive is gone"))
    assert fill.is_issued()
    assert fill.has_failed()
    assert not fill.is_present()
    for _ in range(2):
        with pytest.raises(SwapError, match=r"layers\.7: the drive is gone") as caught:
            fill.wait(0)
        assert isinstance(caught.value.__cause__, StorageError)


def test_a_wait_that_is_too_long_says_what_for() -> None:
    fill = a_fill(block=7, slot=2)
    fill.stage = "being read from model-00001.safetensors"
    with pytest.raises(SwapError) as caught:
        fill.wait(0.01)
    for word in ("0.01 s", "layers.7", "slot 2", "model-00001.safetensors", "ssdtune doctor"):
        assert word in str(caught.value)


# ------------------------------------------------------------------ lanes


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_bytes_end_where_the_recipe_says(kind: str, tmp_path: Path, run: MakeLanes) -> None:
    """In any slot that fits, one block after the other."""
    blocks = write_blocks(tmp_path, [kind] * 5)
    running = run(blocks)
    for block in (0, 4, 2, 2, 1):
        fill = a_fill(block, slot=block % len(running.slots.memory))
        running.lanes.start(fill)
        fill.wait(10)
        found = running.slots.tensors(block, fill.slot)
        assert all(map(torch.equal, found, blocks.expected[block]))
    assert running.num_issued == 5


def test_a_fills_ops_are_those_of_the_plan(tmp_path: Path, run: MakeLanes) -> None:
    """LOAD under the fill's own id, the copy under the next; unplanned ones under none."""
    blocks = write_blocks(tmp_path, ["plain", "packed"])
    running = run(blocks)
    for block, op_id in ((0, 11), (1, 20), (1, UNPLANNED)):
        fill = a_fill(block, slot=block, op_id=op_id)
        running.lanes.start(fill)
        fill.wait(10)
    found = [(op.op_id, op.kind, op.lane, op.block, op.num_bytes) for op in running.ops]
    plain, packed = blocks.recipes
    assert found == [
        (11, Kind.LOAD, Lane.NVME_READ, "layers.0", plain.file_bytes),
        (20, Kind.LOAD, Lane.NVME_READ, "layers.1", packed.file_bytes),
        (21, Kind.UNPACK, Lane.CPU, "layers.1", packed.slot_bytes),
        (UNPLANNED, Kind.LOAD, Lane.NVME_READ, "layers.1", packed.file_bytes),
        (UNPLANNED, Kind.UNPACK, Lane.CPU, "layers.1", packed.slot_bytes),
    ]
    assert all(op.step == 3 and op.start_s <= op.end_s for op in running.ops)


def test_what_ram_keeps_is_read_once(tmp_path: Path, run: MakeLanes) -> None:
    """Its only planned op is the copy; the read is no part of a steady step."""
    blocks = write_blocks(tmp_path, ["packed"] * 3)
    running = run(blocks, cached=[1])
    for op_id in (5, 6, 7):
        fill = a_fill(1, slot=0, op_id=op_id)
        running.lanes.start(fill)
        fill.wait(10)
        assert all(map(torch.equal, running.slots.tensors(1, 0), blocks.expected[1]))
        running.slots.memory[0].zero_()
    assert [(op.op_id, op.kind) for op in running.ops] == [
        (UNPLANNED, Kind.LOAD),
        (5, Kind.UNPACK),
        (6, Kind.UNPACK),
        (7, Kind.UNPACK),
    ]


def test_bytes_are_checked_when_they_are_read_and_no_more(
    tmp_path: Path, run: MakeLanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What RAM keeps is copied many times and read once; what was read damaged is read again, and checked again."""
    blocks = summed(write_blocks(tmp_path, ["packed"] * 3))
    seen: list[int] = []
    monkeypatch.setattr(
        "ssdtune.swap.recipe.checksum", lambda part: (seen.append(1), checksum(part))[1]
    )
    running = run(blocks, cached=[1])

    def fill_of(block: int) -> Fill:
        running.lanes.start(fill := a_fill(block))
        return fill

    blocks.path.write_bytes(bytes(len(blocks.content)))
    for _ in range(2):
        with pytest.raises(SwapError, match=r"layers\.1.*is damaged"):
            fill_of(1).wait(10)
    blocks.restore()
    seen.clear()
    for block, checks in ((1, 2), (1, 2), (0, 4), (0, 6), (1, 6)):  # of two tensors each
        fill_of(block).wait(10)
        assert len(seen) == checks


def summed(blocks: Blocks) -> Blocks:
    """The same, each tensor of the file with its checksum."""
    content = torch.frombuffer(bytearray(blocks.content), dtype=torch.uint8)

    def with_sums(recipe: BlockRecipe) -> BlockRecipe:
        (extent,) = recipe.extents
        start = extent.file_offset - extent.buffer_offset
        sums = tuple(
            Summed(
                name=view.name,
                path=blocks.path,
                offset=view.offset,
                num_bytes=view.num_bytes,
                checksum=checksum(content[start + view.offset :][: view.num_bytes]),
            )
            for view in dict.fromkeys(copy.source for copy in recipe.copies)
            if isinstance(view, TensorView)
        )
        return dataclasses.replace(recipe, summed=sums)

    return dataclasses.replace(blocks, recipes=tuple(map(with_sums, blocks.recipes)))


def test_more_fills_than_buffers_take_turns(tmp_path: Path, run: MakeLanes) -> None:
    """Starting waits for a buffer; all arrive, each in its slot."""
    blocks = write_blocks(tmp_path, ["packed"] * 6)
    running = run(blocks, num_slots=6.0)
    running.storage.gate.clear()
    fills = [a_fill(block, slot=block) for block in range(6)]
    starter = threading.Thread(target=lambda: [running.lanes.start(f) for f in fills])
    starter.start()
    wait_for(lambda: fills[2].stage == "waiting for a staging buffer")
    running.storage.gate.set()
    for fill in fills:
        fill.wait(10)
        found = running.slots.tensors(fill.block, fill.slot)
        assert all(map(torch.equal, found, blocks.expected[fill.block]))
    starter.join(10)


def test_after_closing_a_fill_fails_at_once(tmp_path: Path, run: MakeLanes) -> None:
    blocks = write_blocks(tmp_path, ["packed", "plain"])
    running = run(blocks)
    running.close()
    for block in (0, 1):
        fill = a_fill(block)
        running.lanes.start(fill)
        with pytest.raises(SwapError, match="closed"):
            fill.wait(0)


# ------------------------------------------------------------------ buffers


def buffers(*num_bytes: int) -> Buffers:
    return Buffers([torch.zeros(n, dtype=torch.uint8) for n in num_bytes])


def test_the_buffer_unused_longest_is_taken_first() -> None:
    pool = buffers(8, 8, 8)
    first = [pool.take(8, 0) for _ in range(3)]
    assert len(set(first)) == 3
    for i in (1, 0, 2):
        pool.give(first[i])
    assert [pool.take(8, 0) for _ in range(3)] == [first[1], first[0], first[2]]


def test_a_buffer_that_is_too_small_is_left_alone() -> None:
    pool = buffers(8, 16)
    assert pool.take(9, 0).memory.nbytes == 16
    with pytest.raises(StorageError, match="one of 2 staging buffers"):
        pool.take(9, 0.01)
    assert pool.take(8, 0).memory.nbytes == 8


def test_giving_wakes_who_waits() -> None:
    pool = buffers(8)
    taken = pool.take(8, 0)
    threading.Timer(0.05, pool.give, [taken]).start()
    assert pool.take(8, 10) is taken


def test_a_buffer_with_a_late_read_is_not_free_before_that_has_ended(
    tmp_path: Path, run: MakeLanes
) -> None:
    blocks = write_blocks(tmp_path, ["packed"] * 2)
    running = run(blocks)
    running.storage.gate.clear()
    pool = buffers(blocks.recipes[0].file_bytes)
    buffer = pool.take(8, 0)
    ticket = running.pool.submit(
        blocks.recipes[0].extents, aligned_bytes(blocks.recipes[0].file_bytes), label="layers.0"
    )
    pool.give(buffer, late=ticket)
    with pytest.raises(StorageError, match=r"layers\.0 did not end"):
        pool.take(8, 0.01)
    threading.Timer(0.05, running.storage.gate.set).start()
    assert pool.take(8, 10) is buffer
    assert ticket.done()


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_one_tensor_alone_needs_its_own_bytes_only(kind: str, tmp_path: Path) -> None:
    """Read by hand from the extents, in both forms; alignment kept."""
    blocks = write_blocks(tmp_path, [kind] * 4)
    for recipe, expected in zip(blocks.recipes, blocks.expected, strict=True):
        for index, wanted in enumerate(expected):
            mine = alone(recipe, index, 4096)
            memory = torch.zeros(mine.file_bytes, dtype=torch.uint8)
            content = blocks.content + bytes(8192)
            for extent in mine.extents:
                assert extent.file_offset % 4096 == extent.num_bytes % 4096 == 0
                part = content[extent.file_offset : extent.file_offset + extent.num_bytes]
                place = slice(extent.buffer_offset, extent.buffer_offset + extent.num_bytes)
                memory[place] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
            found = torch.zeros(wanted.shape, dtype=wanted.dtype)
            if kind == "packed":
                for copy in mine.copies:
                    copy.run(memory, [found])
            else:
                found = mine.tensors[0].of(memory)
            assert torch.equal(found, wanted)
            assert index == 0 or mine.file_bytes <= 8192


def test_views_of_one_memory_count_their_versions_apart() -> None:
    """Autograd must not take the filling of one block for a change of another."""
    memory = aligned_bytes(256)
    views = [
        TensorView(name=str(i), dtype=torch.float32, shape=(4,), offset=16 * i).of(memory)
        for i in range(2)
    ]
    before = views[1]._version
    views[0].fill_(1)
    assert views[1]._version == before
    assert memory.view(torch.float32)[:8].tolist() == [1.0] * 4 + [0.0] * 4


def test_a_copy_slices_reshapes_permutes_casts_and_places() -> None:
    source = torch.arange(24, dtype=torch.float16)
    buffer = torch.zeros(64, dtype=torch.uint8)
    buffer[8:56] = source.view(torch.uint8)
    copy = Copy(
        source=TensorView(name="x", dtype=torch.float16, shape=(6, 4), offset=8),
        target=1,
        source_slices=((2, 6), (0, 4)),
        view=(2, 2, 4),
        permute=(1, 0, 2),
        target_slices=((1, 3), (0, 8)),
    )
    target = torch.zeros(4, 8)
    copy.run(buffer, [torch.zeros(0), target])
    expected = torch.zeros(4, 8)
    expected[1:3] = source.view(6, 4)[2:].view(2, 2, 4).permute(1, 0, 2).reshape(2, 8).float()
    assert torch.equal(target, expected)


def test_tensors_of_a_slot_are_the_same_objects_in_every_thread(tmp_path: Path) -> None:
    blocks = write_blocks(tmp_path, ["plain"] * 3)
    slots = Slots(make_small_plan(blocks, 3.0, 2), blocks.recipes, CPU)
    found: list[list[torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(slots.tensors(1, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(tensors is found[0] for tensors in found)
    assert found[0][0].shape == (ROWS, COLUMNS)
