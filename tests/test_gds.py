"""Reading straight into buffers on a device: the pool and its tickets, and the engine that uses them.

kvikio is a stand-in that really reads, into memory that the CPU reaches; what it demands of its caller, and where its
futures are less than they seem, is as in kvikio.
"""

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    COLUMNS,
    PAGE,
    ROWS,
    B,
    Blocks,
    F,
    FakeCuFile,
    FakeKvikio,
    be_patient,
    check_slot,
    engine_threads,
    gated,
    make_engine,
    run_step,
    wait_for,
    write_blocks,
)

from ssdtune.schedule.plan import Kind, Lane, Tier
from ssdtune.schedule.planner import plain_orders
from ssdtune.swap import engine as engine_module
from ssdtune.swap.engine import Engine
from ssdtune.swap.fills import Pools, SwapError
from ssdtune.swap.gds import GdsPool, GdsTicket
from ssdtune.swap.recipe import TensorView
from ssdtune.swap.slots import page_aligned
from ssdtune.swap.storage import Extent, StorageError, StorageTimeout

CPU = torch.device("cpu")
FILE_BYTES = 10 * PAGE + 123
KINDS = {
    "packed": ["packed"] * 7,
    "copied": ["copied"] * 7,
    "mixed": ["packed", "copied", "copied", "packed", "copied", "packed", "packed"],
    "some in place": [
        "packed",
        "plain",
        "copied",
        "plain",
        "plain",
        "packed",
        "packed",
    ],  # no buffer
}
ONE_SLOT = {"num_slots": 0.0, "device_slots": 1.0, "prefetch": 0}
MakeEngine = Callable[..., tuple[Engine, Blocks, FakeKvikio]]


# ------------------------------------------------------------------ the pool


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(FILE_BYTES))
    return path


@pytest.fixture
def kvikio() -> Iterator[FakeKvikio]:
    fake = FakeKvikio()
    yield fake
    fake.gate.set()


def whole(path: Path) -> Extent:
    return Extent(path, 0, 11 * PAGE, 0, FILE_BYTES)


def submitted(kvikio: FakeKvikio, file: Path) -> tuple[GdsPool, GdsTicket, torch.Tensor]:
    pool = GdsPool(kvikio, request_bytes=4 * PAGE)
    memory = page_aligned(11 * PAGE, CPU).zero_()
    return pool, pool.submit([whole(file)], memory, label="layers.0"), memory


def test_bytes_arrive_and_no_request_passes_the_end(file: Path, kvikio: FakeKvikio) -> None:
    pool, ticket, memory = submitted(kvikio, file)
    ticket.wait(10)
    assert bytes(memory[:FILE_BYTES].numpy()) == file.read_bytes()
    assert not memory[FILE_BYTES:].any()
    assert kvikio.asked == [(file, 0, 4 * PAGE), (file, 4 * PAGE, 4 * PAGE), (file, 8 * PAGE, 8315)]
    assert 0 < ticket.started <= ticket.finished
    assert ticket.seconds == ticket.finished - ticket.started
    pool.close()


def test_a_file_is_opened_once_and_closed_with_the_pool(file: Path, kvikio: FakeKvikio) -> None:
    pool, ticket, memory = submitted(kvikio, file)
    for _ in range(3):
        ticket.wait(10)
        ticket = pool.submit([whole(file)], memory, label="layers.0")
    ticket.wait(10)
    assert (kvikio.num_open, kvikio.closed) == (1, [])
    pool.close()
    pool.close()
    assert (kvikio.num_open, kvikio.closed) == (0, [file])


def test_waiting_and_asking_again_is_allowed(file: Path, kvikio: FakeKvikio) -> None:
    """Though a future of kvikio's is good for one result."""
    pool, ticket, _ = submitted(kvikio, file)
    for _ in range(3):
        ticket.wait(10)
        assert ticket.done()
    pool.close()


def test_nothing_to_read_is_read_at_once(kvikio: FakeKvikio) -> None:
    pool = GdsPool(kvikio)
    ticket = pool.submit([], torch.zeros(0, dtype=torch.uint8), label="layers.0")
    assert ticket.done()
    ticket.wait(0)
    pool.close()


def test_a_failure_names_label_file_and_offset_each_time(file: Path, kvikio: FakeKvikio) -> None:
    kvikio.failing[4 * PAGE] = OSError("cuFile error 5005")
    pool, ticket, _ = submitted(kvikio, file)
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            ticket.wait(10)
        for word in ("layers.0", str(file), "16,384", "cuFile error 5005"):
            assert word in str(caught.value)
    assert not isinstance(caught.value, StorageTimeout)
    pool.close()


def test_a_failed_ticket_is_over_only_when_no_read_writes_any_more(
    file: Path, kvikio: FakeKvikio
) -> None:
    """The first read fails at once, the others wait."""
    real = kvikio.gate
    kvikio.failing[0] = OSError("broken")
    pool = GdsPool(kvikio, request_bytes=4 * PAGE)
    memory = page_aligned(11 * PAGE, CPU)
    pool.submit([Extent(file, 0, PAGE, 0)], memory, label="opens the file").done()
    real.clear()
    ticket = pool.submit([whole(file)], memory, label="layers.0")
    with pytest.raises(StorageTimeout):
        ticket.wait(0.05)
    assert not ticket.done()
    real.set()
    with pytest.raises(StorageError, match="broken"):
        ticket.wait(10)
    pool.close()


def test_a_file_cut_short_says_so(file: Path, kvikio: FakeKvikio) -> None:
    os.truncate(file, 5 * PAGE)
    pool, ticket, _ = submitted(kvikio, file)
    with pytest.raises(StorageError, match=r"(?s)layers\.0.*4,096 of 16,384 bytes.*Restore"):
        ticket.wait(10)
    pool.close()


@pytest.mark.parametrize("num_begun", [0, 2])
def test_what_cannot_begin_fails_after_what_has_begun_is_over(
    num_begun: int, file: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised by the ticket: whoever submits must not take the memory back before."""
    begin, count = FakeCuFile.pread, iter(range(10))

    def refuse(*args: Any) -> Any:
        if next(count) == num_begun:
            raise RuntimeError("no more handles")
        return begin(*args)

    monkeypatch.setattr(FakeCuFile, "pread", refuse)
    kvikio.gate.clear()
    pool, ticket, _ = submitted(kvikio, file)
    assert ticket.done() == (num_begun == 0)
    kvikio.gate.set()
    with pytest.raises(StorageError, match=r"layers\.0: .*cannot begin .*no more handles"):
        ticket.wait(10)
    assert len(kvikio.asked) == num_begun
    pool.close()


def test_a_file_that_is_gone_is_named(tmp_path: Path, kvikio: FakeKvikio) -> None:
    pool, ticket, _ = submitted(kvikio, tmp_path / "gone.safetensors")
    with pytest.raises(StorageError, match=r"gone\.safetensors"):
        ticket.wait(10)
    pool.close()


def test_a_wait_that_is_too_long_says_what_for_and_may_be_repeated(
    file: Path, kvikio: FakeKvikio
) -> None:
    kvikio.gate.clear()
    pool, ticket, memory = submitted(kvikio, file)
    with pytest.raises(StorageTimeout, match=r"layers\.0: .*0 of 3 reads done.*weights\.safet"):
        ticket.wait(0.05)
    kvikio.gate.set()
    ticket.wait(10)
    assert bytes(memory[:FILE_BYTES].numpy()) == file.read_bytes()
    pool.close()


def test_closing_waits_for_what_has_begun(file: Path, kvikio: FakeKvikio) -> None:
    """Nothing is written after it."""
    kvikio.gate.clear()
    pool, ticket, memory = submitted(kvikio, file)
    threading.Timer(0.1, kvikio.gate.set).start()
    pool.close()
    assert ticket.done()
    assert kvikio.num_open == 0
    assert bytes(memory[:FILE_BYTES].numpy()) == file.read_bytes()
    ticket.wait(0)
    with pytest.raises(StorageError, match="closed"):
        pool.submit([whole(file)], memory, label="layers.1")


def test_reads_that_outlast_closing_keep_their_memory_and_files(
    file: Path, kvikio: FakeKvikio
) -> None:
    """Who waits for them is told at once; the ticket says when they are over."""
    kvikio.gate.clear()
    pool, ticket, memory = submitted(kvikio, file)
    raised: list[Exception] = []

    def wait(ticket: GdsTicket) -> None:
        try:
            ticket.wait(60)
        except StorageTimeout as error:
            raised.append(error)

    waiting = threading.Thread(target=wait, args=(ticket,))
    waiting.start()
    pool.close(0.05)
    waiting.join(10)
    assert "layers.0" in str(raised.pop())
    assert not ticket.done()
    assert kvikio.num_open == 1
    kept = weakref.ref(ticket)
    del ticket, memory, pool
    gc.collect()
    assert kept() is not None, "it holds what is still written"
    kvikio.gate.set()
    wait_for(lambda: kvikio.num_open == 0)
    wait_for(lambda: not engine_threads())


def test_closing_does_not_wait_for_a_read_that_is_long_in_beginning(
    file: Path, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvikio waits for compute first. Its file is closed after it; the reads that were to follow don't begin."""
    begin, may_begin, has_come = FakeCuFile.pread, threading.Event(), threading.Event()

    def hesitate(*args: Any) -> Any:
        has_come.set()
        assert may_begin.wait(30)
        return begin(*args)

    monkeypatch.setattr(FakeCuFile, "pread", hesitate)
    pool = GdsPool(kvikio, request_bytes=4 * PAGE)
    tickets: list[GdsTicket] = []
    memory = page_aligned(11 * PAGE, CPU)
    submitting = threading.Thread(
        target=lambda: tickets.append(pool.submit([whole(file)], memory, label="layers.0"))
    )
    submitting.start()
    assert has_come.wait(10)
    start = time.perf_counter()
    pool.close(0.05)
    assert time.perf_counter() - start < 5
    assert kvikio.num_open == 1
    may_begin.set()
    submitting.join(10)
    wait_for(tickets[0].done)
    with pytest.raises(StorageError, match="closed before"):
        tickets[0].wait(10)
    assert len(kvikio.asked) == 1
    wait_for(lambda: kvikio.num_open == 0)


# ------------------------------------------------------------------ buffers


@pytest.mark.parametrize("num_bytes", [1, 4096, 12345])
def test_a_buffer_starts_on_a_page_and_views_find_their_place(num_bytes: int) -> None:
    memory = page_aligned(num_bytes, CPU)
    assert memory.data_ptr() % PAGE == 0
    assert memory.nbytes == num_bytes
    if num_bytes > 16:
        view = TensorView(name="x", dtype=torch.float32, shape=(2,), offset=8).of(memory)
        view.fill_(1)
        assert memory[8:16].view(torch.float32).tolist() == [1.0, 1.0]
        assert view.data_ptr() == memory.data_ptr() + 8


# ------------------------------------------------------------------ the engine


@pytest.fixture
def make(tmp_path: Path, kvikio: FakeKvikio) -> Iterator[MakeEngine]:
    """An engine with buffers on the device; closed after the test."""
    made: list[Engine] = []

    def make_one(kinds: str = "packed", **options: Any) -> tuple[Engine, Blocks, FakeKvikio]:
        blocks = write_blocks(tmp_path, KINDS[kinds])
        options = {"num_slots": 0.0, "device_slots": 3.0, "storage": gated(blocks), **options}
        made.append(make_engine(blocks, kvikio=kvikio, **options))
        return made[-1], blocks, kvikio

    yield make_one
    kvikio.gate.set()
    for engine in made:
        engine.close()


TIED = {"train": [*((i % 7, F) for i in range(8)), *((i, B) for i in reversed(range(7)))]}
ORDERS = {"plain": None, "tied": {**plain_orders(7), **TIED}}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("num_in_ram", [0.0, 3.0])
def test_blocks_are_those_of_the_file(
    num_in_ram: float, orders: str, kinds: str, make: MakeEngine
) -> None:
    """Staged and in place, tied, some kept in RAM: as on the way through RAM."""
    if num_in_ram and kinds == "some in place":
        pytest.skip("what RAM keeps is always copied into its slot")
    engine, blocks, kvikio = make(kinds, num_slots=num_in_ram, orders=ORDERS[orders])
    for _ in range(3):
        run_step(engine, blocks)
    assert kvikio.asked
    assert not any(op.is_miss for op in engine.trace)
    assert (Tier.RAM in engine.plan.tiers) == bool(num_in_ram)


@pytest.mark.parametrize("num_in_ram", [0.0, 3.0])
def test_what_ram_keeps_and_single_tensors_pass_no_buffer(
    num_in_ram: float, make: MakeEngine
) -> None:
    """They are read by the host's readers; all else by cuFile alone."""
    engine, blocks, kvikio = make(num_slots=num_in_ram, device_slots=2.0, prefetch=1)
    read = engine.pool.storage.asked  # type: ignore[attr-defined]
    for _ in range(3):
        run_step(engine, blocks)
    in_ram = [i for i, tier in enumerate(engine.plan.tiers) if tier is Tier.RAM]
    assert len(read) == len(in_ram)
    assert bool(in_ram) == bool(num_in_ram)
    starts = {i: recipe.extents[0].file_offset for i, recipe in enumerate(blocks.recipes)}
    directly = {offset for _, offset, _ in kvikio.asked}
    assert {starts[i] for i in range(7) if i not in in_ram} <= directly
    for op in engine.trace:
        if op.kind is Kind.UNPACK:
            lane = Lane.CPU if int(op.block.removeprefix("layers.")) in in_ram else Lane.DEVICE_COPY
            assert op.lane is lane
    num_asked = len(kvikio.asked)
    assert torch.equal(engine.read(3, 1), blocks.expected[3][1])
    assert len(read) == len(in_ram) + 1
    assert len(kvikio.asked) == num_asked


def test_buffers_are_as_planned_and_on_a_page(make: MakeEngine) -> None:
    engine, _, _ = make()
    buffers = [buffer.memory for buffer in engine.slots.buffers._buffers]
    assert [memory.nbytes for memory in buffers] == list(engine.plan.buffers)
    assert all(memory.data_ptr() % PAGE == 0 for memory in buffers)
    assert engine.plan.device_bytes == sum(engine.plan.slots) + sum(engine.plan.buffers)
    assert engine.plan.ram_bytes == 0
    assert engine.recipes[0].tensors[0].shape == (COLUMNS, ROWS)


def test_a_failed_read_names_block_and_file_and_a_restored_file_is_read(make: MakeEngine) -> None:
    engine, blocks, _ = make(device_slots=2.0, prefetch=1)
    run_step(engine, blocks)
    os.truncate(blocks.path, len(blocks.content) // 2)
    engine.begin_step("train")

    def go_on() -> None:
        for block in range(7):
            check_slot(engine, blocks, block, engine.enter(block, F))

    with pytest.raises(SwapError, match=r"layers\.\d") as caught:
        go_on()
    assert str(blocks.path) in str(caught.value)
    assert "Restore" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4
    blocks.restore()
    for _ in range(2):
        run_step(engine, blocks)


def test_a_read_that_cufile_refuses_may_be_tried_again(
    make: MakeEngine, kvikio: FakeKvikio
) -> None:
    kvikio.failing[0] = RuntimeError("cuFile error 5030")
    engine, blocks, _ = make(**ONE_SLOT)
    engine.begin_step("train")
    with pytest.raises(SwapError, match=r"layers\.0.*weights\.bin.*5030"):
        engine.enter(0, F)
    del kvikio.failing[0]
    check_slot(engine, blocks, 0, engine.enter(0, F))
    run_step(engine, blocks)


def test_a_buffer_that_a_late_read_may_write_is_not_used_again(
    make: MakeEngine, kvikio: FakeKvikio
) -> None:
    """A read that timed out ends while another block would be in the only buffer."""
    kvikio.gate.clear()
    engine, blocks, _ = make(**ONE_SLOT, timeout_s=0.3)
    engine.begin_step("train")
    with pytest.raises(SwapError, match=r"layers\.0"):
        engine.enter(0, F)
    wait_for(lambda: all(fill.is_issued() for fill in engine._claims.held.values()))
    engine.begin_step("train")
    with pytest.raises(SwapError, match=r"layers\.3"):
        engine.enter(3, F)
    begun = {offset for _, offset, _ in kvikio.asked}
    last = blocks.recipes[0].extents[0]
    assert max(begun) < last.file_offset + last.num_bytes, "nothing more is read into it"
    kvikio.gate.set()
    be_patient(engine)
    engine.begin_step("train")
    slot = engine.enter(3, F)
    check_slot(engine, blocks, 3, slot)
    time.sleep(0.05)
    check_slot(engine, blocks, 3, slot)
    run_step(engine, blocks)


@pytest.mark.parametrize("answers", [True, False])
def test_closing_while_reads_are_in_flight(
    answers: bool, make: MakeEngine, kvikio: FakeKvikio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has begun ends before the memory is given back; where the drive does not answer, closing does not wait
    for it, and the memory is kept until it does."""
    if not answers:
        monkeypatch.setattr(engine_module, "CLOSING_S", 0.2)
    kvikio.gate.clear()
    engine, _, _ = make()
    engine.begin_step("train")
    raised: list[SwapError] = []

    def visit() -> None:
        try:
            engine.enter(0, F)
        except SwapError as error:
            raised.append(error)

    visiting = threading.Thread(target=visit)
    visiting.start()
    wait_for(lambda: bool(kvikio.asked))
    if answers:
        threading.Timer(0.1, kvikio.gate.set).start()
    begin = time.perf_counter()
    engine.close()
    visiting.join(10)
    assert not visiting.is_alive()
    assert time.perf_counter() - begin < 5
    if not answers:
        assert len(raised) == 1
        assert kvikio.num_open == 1
        kvikio.gate.set()
    wait_for(lambda: kvikio.num_open == 0)
    wait_for(lambda: not engine_threads())
    with pytest.raises(SwapError, match="closed"):
        engine.enter(1, F)


def test_a_slow_direct_read_does_not_hold_up_what_ram_keeps(make: MakeEngine) -> None:
    """The host's readers are other threads."""
    engine, blocks, kvikio = make(num_slots=3.0, device_slots=2.0, prefetch=1)
    for _ in range(2):
        run_step(engine, blocks)
    kept = next(i for i, tier in enumerate(engine.plan.tiers) if tier is Tier.RAM)
    wait_for(lambda: all(fill.is_issued() for fill in engine._claims.held.values()))
    kvikio.gate.clear()
    assert torch.equal(engine.read(kept, 0), blocks.expected[kept][0])


def test_a_plan_without_its_pool_is_refused(make: MakeEngine, tmp_path: Path) -> None:
    """And a pool without such a plan: one of both would not be used."""
    engine, blocks, kvikio = make()
    storage = gated(blocks)
    with pytest.raises(AssertionError):
        Engine(engine.plan, blocks.recipes, Pools(type(engine.pool)(storage)), device=CPU)
    on_host = make_engine(blocks, num_slots=0.0, device_slots=3.0, storage=storage)
    on_host.close()
    with pytest.raises(AssertionError):
        Engine(
            on_host.plan,
            blocks.recipes,
            Pools(type(engine.pool)(storage), GdsPool(kvikio)),
            device=CPU,
        )
