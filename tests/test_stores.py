"""Blocks that go back from their slots: every change arrives, nothing is read or filled too early, failures stop the run."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdtune.schedule.choices import Request
from ssdtune.schedule.plan import Budgets, Direction, Kind, Lane
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.swap import engine as swap_engine
from ssdtune.swap import stores
from ssdtune.swap.engine import Engine
from ssdtune.swap.fills import Pools, SwapError
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe, TensorView
from ssdtune.swap.storage import Extent, choose_storage

NUM, BYTES = 5, 8192
F = Direction.FORWARD


def nothing() -> None:
    """Nobody wants to know."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "blocks"
    values = [torch.full((BYTES // 4,), float(100 * i)) for i in range(NUM)]
    made.write_bytes(torch.cat(values).numpy().tobytes())
    return made


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    """Five blocks through two slots, forwards only."""
    recipes = [
        BlockRecipe(
            name=f"layers.{i}",
            extents=(Extent(path, i * BYTES, BYTES, 0),),
            file_bytes=BYTES,
            tensors=(
                TensorView(name="weight", dtype=torch.float32, shape=(BYTES // 4,), offset=0),
            ),
            copies=(),
            slot_bytes=BYTES,
            is_ours=True,
        )
        for i in range(NUM)
    ]
    request = Request(
        blocks=tuple(recipe.shape for recipe in recipes),
        orders=plain_orders(NUM),
        budgets=Budgets(ram_bytes=2 * BYTES),
        prefetch=1,
    )
    pools = Pools(ReaderPool(choose_storage(path).storage, num_threads=2))
    made = Engine(make_plan(request), recipes, pools, device=torch.device("cpu"), timeout_s=5.0)
    yield made
    made.close()


def weight(engine: Engine, block: int) -> tuple[int, torch.Tensor]:
    slot = engine.enter(block, F)
    return slot, engine.slots.tensors(block, slot)[0]


def on_drive(path: Path) -> list[float]:
    """Each block's number, which all its elements must be."""
    found = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).view(NUM, -1)
    assert all(len(row.unique()) == 1 for row in found), "a block is torn"
    return [float(row[0]) for row in found]


def test_every_change_arrives_and_is_read_back(engine: Engine, path: Path) -> None:
    stored: list[int] = []
    for step in range(20):
        engine.begin_step("forward")
        for block in range(NUM):
            slot, tensor = weight(engine, block)
            engine.await_stored(block)
            assert (tensor == 100 * block + step).all()
            tensor += 1
            assert engine.store(block, slot, lambda b=block: stored.append(b))
        engine.leave()
    for block in range(NUM):
        engine.await_stored(block)
    assert on_drive(path) == [100 * block + 20 for block in range(NUM)]
    assert sorted(stored) == sorted(list(range(NUM)) * 20)
    ops = [op for op in engine.trace if op.lane is Lane.NVME_WRITE]
    assert {op.kind for op in ops} == {Kind.STORE_WEIGHTS}
    assert all(op.num_bytes == BYTES for op in ops)
    assert not any(op.is_miss for op in engine.trace)


def held_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on writes wait for it."""
    gate, write = threading.Event(), stores.write_all

    def late(*given: Any) -> None:
        assert gate.wait(10)
        write(*given)

    monkeypatch.setattr(stores, "write_all", late)
    return gate


def test_a_slot_is_not_filled_and_a_block_not_read_before_it_is_stored(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = held_writes(monkeypatch)
    engine.begin_step("forward")
    slot, tensor = weight(engine, 0)
    tensor += 1
    assert engine.store(0, slot, nothing)
    assert not engine.store(0, slot, nothing), "it is under way"
    assert weight(engine, 1)[0] != slot
    entered = threading.Event()

    def third() -> None:
        weight(engine, 2)  # into the slot that is being stored
        entered.set()

    thread = threading.Thread(target=third)
    thread.start()
    assert not entered.wait(0.3)
    gate.set()
    assert entered.wait(5)
    thread.join()
    assert on_drive(path)[0] == 1.0


def test_a_block_that_another_slot_has_is_not_stored(engine: Engine) -> None:
    """That slot would keep what the drive had before."""
    engine.begin_step("forward")
    for block in range(NUM):
        weight(engine, block)
    engine.leave()  # the next step's first blocks are read ahead now
    deadline = time.perf_counter() + 5
    while not (slots := [s for s, fill in list(engine._claims.held.items()) if fill.block == 0]):
        assert time.perf_counter() < deadline
        time.sleep(0.01)
    assert not engine.store(0, 1 - slots[0], nothing)


def test_a_store_that_fails_stops_the_visits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(stores, "write_all", full)
    engine.begin_step("forward")
    slot, _ = weight(engine, 0)
    told: list[int] = []
    engine.store(0, slot, lambda: told.append(0))
    engine.await_stored(0)
    with pytest.raises(SwapError, match=r"could not write layers\.0 .*EIO"):
        weight(engine, 1)
    assert not told


def test_what_a_failed_store_left_on_the_drive_is_not_read(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last store of a run: no visit comes after it, but the model is saved."""

    def torn(fd: int, offset: int, content: memoryview) -> None:
        os.pwrite(fd, content[: BYTES // 2], offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(stores, "write_all", torn)
    engine.begin_step("forward")
    slot, tensor = weight(engine, 0)
    tensor += 1
    assert engine.store(0, slot, nothing)
    engine.leave()
    with pytest.raises(SwapError, match=r"could not write layers\.0 .*EIO"):
        engine.read_stored(0, 0)


def test_what_was_begun_is_written_before_the_engine_is_gone(engine: Engine, path: Path) -> None:
    engine.begin_step("forward")
    slot, tensor = weight(engine, 0)
    tensor += 1
    engine.store(0, slot, nothing)
    engine.close()
    assert on_drive(path)[0] == 1.0


def test_a_store_that_outlasts_close_writes_to_no_other_file(
    engine: Engine, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow drive: a file that is opened after `close` may get a closed one's descriptor."""
    gate = held_writes(monkeypatch)
    monkeypatch.setattr(swap_engine, "CLOSING_S", 0.1)
    engine.begin_step("forward")
    slot, tensor = weight(engine, 0)
    tensor += 1
    stored = threading.Event()
    assert engine.store(0, slot, stored.set)
    engine.close()
    (tmp_path / "other").write_bytes(b"mine")
    others = [os.open(tmp_path / "other", os.O_RDWR) for _ in range(32)]
    gate.set()
    done = stored.wait(5)
    for fd in others:
        os.close(fd)
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert done
    assert on_drive(path)[0] == 1.0


# ------------------------------------------------------------------ memory for staging, on a device


def test_a_block_that_waits_too_long_for_another_to_be_written_says_so(engine: Engine) -> None:
    engine._stores._claimed_staging(3, 0.05)
    message = r"layers\.1 waited 0\.05 s to be stored, for layers\.3 to be written .*working copy"
    with pytest.raises(SwapError, match=message):
        engine._stores._claimed_staging(1, 0.05)


def test_a_block_that_was_not_staged_frees_no_staging(engine: Engine) -> None:
    """Of blocks that RAM keeps the copy is there: when one is over, another's bytes may still wait to be written."""
    engine._stores._claimed_staging(3, 5.0)
    engine.begin_step("forward")
    slot, _ = weight(engine, 0)
    assert engine.store(0, slot, nothing)
    engine.await_stored(0)
    assert not engine._stores._is_staging_free.is_set()
