"""Engines over files of a few kilobytes: blocks without a model, their recipes, what they hold.

Three kinds of block: "plain" ones are used in place, "packed" ones pass a buffer (their pieces are
transposed, cast and put together), "copied" ones too, as they are. Tensors have random contents,
different in every block.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssdtune.schedule.choices import Order, Request
from ssdtune.schedule.plan import Budgets, Direction, Plan
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.swap.engine import Engine
from ssdtune.swap.fills import Pools
from ssdtune.swap.gds import REQUEST_BYTES, GdsPool
from ssdtune.swap.header import TensorEntry
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.recipe import BlockRecipe, Copy, TensorView
from ssdtune.swap.source import merge_extents
from ssdtune.swap.storage import Storage, choose_storage

CPU = torch.device("cpu")
PAGE = 4096
ROWS, COLUMNS = 64, 80  # five pages and a bit: all blocks are of one class
F, B = Direction.FORWARD, Direction.BACKWARD


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Returns when it holds, which takes as long as threads of a busy machine make it."""
    deadline = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < deadline, "it did not come about"
        time.sleep(0.002)


def be_patient(engine: Engine) -> None:
    """Once the drive answers, a busy machine may still take longer than the test's wait for one that does not."""
    engine.timeout_s = engine._lanes.timeout_s = 30.0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Recipes, and the tensors that each must give."""

    path: Path
    recipes: tuple[BlockRecipe, ...]
    expected: tuple[tuple[torch.Tensor, ...], ...]
    content: bytes

    def restore(self) -> None:
        """The file as it was, in place."""
        with self.path.open("r+b") as file:
            file.write(self.content)


def write_blocks(folder: Path, kinds: Sequence[str]) -> Blocks:
    """One file of blocks; kinds: "plain", "packed" or "copied" for each."""
    path = folder / "weights.bin"
    random = torch.Generator().manual_seed(len(kinds))
    content = bytearray(b"\0" * 8)  # so that nothing lies on a page by chance
    made = []
    for i, kind in enumerate(kinds):
        weight = torch.randn(ROWS, COLUMNS, generator=random)
        other = torch.randint(-9, 9, (7,), generator=random)
        if kind == "packed":
            weight = weight.to(torch.bfloat16)
        entries = []
        for name, tensor in ((f"{i}.weight", weight), (f"{i}.other", other)):
            content += b"\0" * (-len(content) % 8)
            raw = tensor.view(torch.uint8).numpy().tobytes()
            entries.append(
                TensorEntry(name, path, "U8", tuple(tensor.shape), len(content), len(raw))
            )
            content += raw
        made.append((kind, weight, other, entries))
    path.write_bytes(content)
    alignment = choose_storage(path).storage.alignment
    built = [_recipe(f"layers.{i}", alignment, *parts) for i, parts in enumerate(made)]
    return Blocks(path, tuple(b[0] for b in built), tuple(b[1] for b in built), bytes(content))


def _recipe(
    name: str,
    alignment: int,
    kind: str,
    weight: torch.Tensor,
    other: torch.Tensor,
    entries: Sequence[TensorEntry],
) -> tuple[BlockRecipe, tuple[torch.Tensor, ...]]:
    where = merge_extents(entries, alignment=alignment, max_gap_bytes=4096)
    sources = [
        TensorView(name=e.name, dtype=t.dtype, shape=e.shape, offset=where.offsets[e.name])
        for e, t in zip(entries, (weight, other), strict=True)
    ]
    if kind == "plain":
        recipe = BlockRecipe(
            name=name,
            extents=where.extents,
            file_bytes=where.num_bytes,
            tensors=tuple(sources),
            copies=(),
            slot_bytes=where.num_bytes,
        )
        return recipe, (weight, other)
    if kind == "copied":
        end = 4 * ROWS * COLUMNS  # a multiple of 256
        recipe = BlockRecipe(
            name=name,
            extents=where.extents,
            file_bytes=where.num_bytes,
            tensors=tuple(
                dataclasses.replace(source, offset=offset)
                for source, offset in zip(sources, (0, end), strict=True)
            ),
            copies=tuple(Copy(source=source, target=i) for i, source in enumerate(sources)),
            slot_bytes=end + 256,
        )
        return recipe, (weight, other)
    # The weight's halves change places, transposed and cast to fp32; the other is copied as it is.
    half = ROWS // 2
    tensors = (
        TensorView(name=f"{name}.joined", dtype=torch.float32, shape=(COLUMNS, ROWS), offset=0),
        TensorView(name=f"{name}.other", dtype=torch.int64, shape=(7,), offset=4 * ROWS * COLUMNS),
    )
    columns = (0, COLUMNS)
    copies = tuple(
        Copy(
            source=sources[0],
            target=0,
            source_slices=((begin, begin + half), columns),
            permute=(1, 0),
            target_slices=(columns, (half - begin, ROWS - begin)),
        )
        for begin in (0, half)
    )
    recipe = BlockRecipe(
        name=name,
        extents=where.extents,
        file_bytes=where.num_bytes,
        tensors=tensors,
        copies=(*copies, Copy(source=sources[1], target=1)),
        slot_bytes=4 * ROWS * COLUMNS + 256,
    )
    joined = torch.cat([weight[half:], weight[:half]]).T.to(torch.float32)
    return recipe, (joined, other)


def make_engine(
    blocks: Blocks,
    *,
    num_slots: float = 2.0,
    prefetch: int = 2,
    orders: Mapping[str, Order] | None = None,
    storage: Storage | None = None,
    timeout_s: float = 20.0,
    device_slots: float | None = None,
    device: torch.device = CPU,
    kvikio: Any = None,
) -> Engine:
    """An engine with RAM for `num_slots` of the largest slot, beside its buffers.

    device_slots: makes the plan that of a device with memory for so many slots; `num_slots` is then
    the blocks that RAM may keep. Such a plan runs on the CPU as well. kvikio: that module, or a
    `FakeKvikio`: reads into buffers on the device, for which there is memory beside its slots.
    """
    plan = make_small_plan(
        blocks, num_slots, prefetch, orders, device_slots, buffers_on_device=kvikio is not None
    )
    request_bytes = 2 * PAGE if isinstance(kvikio, FakeKvikio) else REQUEST_BYTES
    return Engine(
        plan,
        blocks.recipes,
        Pools(
            ReaderPool(storage or choose_storage(blocks.path).storage),
            None if kvikio is None else GdsPool(kvikio, request_bytes=request_bytes),
        ),
        device=device,
        timeout_s=timeout_s,
    )


def make_small_plan(
    blocks: Blocks,
    num_slots: float,
    prefetch: int,
    orders: Mapping[str, Order] | None = None,
    device_slots: float | None = None,
    *,
    buffers_on_device: bool = False,
) -> Plan:
    shapes = tuple(recipe.shape for recipe in blocks.recipes)
    slot = max(shape.slot_bytes for shape in shapes)
    on_device = device_slots is not None
    passing = [s.file_bytes for s in shapes if s.is_staged or on_device]
    buffers = max(passing, default=0) * max(1, min(prefetch, len(passing)))
    size = max(s.file_bytes for s in shapes) if on_device else slot
    return make_plan(
        Request(
            blocks=shapes,
            orders=orders or plain_orders(len(shapes)),
            budgets=Budgets(
                ram_bytes=int(num_slots * size) + (0 if buffers_on_device else buffers),
                device_bytes=int((device_slots or 0) * slot) + buffers * buffers_on_device,
            ),
            on_device=on_device,
            buffers_on_device=buffers_on_device,
            prefetch=prefetch,
        )
    )


def check_slot(engine: Engine, blocks: Blocks, block: int, slot: int) -> None:
    """The slot holds the block, bit for bit."""
    found = engine.slots.tensors(block, slot)
    for view, tensor, wanted in zip(
        engine.recipes[block].tensors, found, blocks.expected[block], strict=True
    ):
        assert torch.equal(tensor.cpu(), wanted), f"{view.name} in slot {slot} is not what it was"


def run_step(engine: Engine, blocks: Blocks, kind: str = "train") -> None:
    """All visits of the plan in their order, the slots' contents checked at each."""
    engine.begin_step(kind)
    for visit in engine.plan.sequences[kind].visits:
        slot = engine.enter(visit.block, visit.direction)
        assert slot == visit.slot
        check_slot(engine, blocks, visit.block, slot)
    engine.leave()


class GatedStorage:
    """A real storage whose reads wait at a gate; `asked` lists their offsets."""

    def __init__(self, inner: Storage) -> None:
        self.name, self.alignment, self._inner = inner.name, inner.alignment, inner
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[int] = []

    def open(self, path: Path) -> int:
        return self._inner.open(path)

    def read(self, fd: int, offset: int, buffer: memoryview) -> int:
        self.asked.append(offset)
        assert self.gate.wait(30)
        return self._inner.read(fd, offset, buffer)

    def close(self, fd: int) -> None:
        self._inner.close(fd)


def gated(blocks: Blocks) -> GatedStorage:
    return GatedStorage(choose_storage(blocks.path).storage)


class FakeKvikio:
    """Stands for the kvikio module: really reads, in threads of its own, into memory that the CPU reaches.

    Reads wait at `gate`; `asked` lists their (file, offset, bytes); `failing` is raised by those at its offsets;
    `closed` lists the files that were closed.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[tuple[Path, int, int]] = []
        self.failing: dict[int, Exception] = {}
        self.closed: list[Path] = []
        self.num_open = 0

    def CuFile(self, path: Path, flags: str) -> "FakeCuFile":
        return FakeCuFile(self, path, flags)


class FakeCuFile:
    """As kvikio's: what it cannot do at once comes out of the future."""

    def __init__(self, kvikio: FakeKvikio, path: Path, flags: str) -> None:
        assert flags == "r"
        self._kvikio, self._path = kvikio, path
        self._fd = os.open(path, os.O_RDONLY)
        kvikio.num_open += 1

    def pread(self, buf: torch.Tensor, size: int, file_offset: int, task_size: int) -> "FakeFuture":
        assert task_size >= size, "of several tasks some may write after the future is done"
        assert (buf.dtype, buf.nbytes) == (torch.uint8, size)
        assert buf.data_ptr() % PAGE == file_offset % PAGE == 0, "cuFile would take a slower road"
        self._kvikio.asked.append((self._path, file_offset, size))
        return FakeFuture(lambda: self._read(buf, file_offset))

    def _read(self, buf: torch.Tensor, file_offset: int) -> int:
        assert self._kvikio.gate.wait(30)
        if file_offset in self._kvikio.failing:
            raise self._kvikio.failing[file_offset]
        return os.preadv(self._fd, [buf.numpy().data], file_offset)

    def close(self) -> None:
        os.close(self._fd)
        self._kvikio.num_open -= 1
        self._kvikio.closed.append(self._path)


class FakeFuture:
    """As kvikio's: one get(), after which get() and done() raise."""

    def __init__(self, work: Callable[[], int]) -> None:
        self._work, self._is_valid = work, True
        self._result: list[Any] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except Exception as error:
            self._result.append(error)

    def done(self) -> bool:
        assert self._is_valid, "the future has no shared state"
        return not self._thread.is_alive()

    def get(self) -> int:
        assert self._is_valid, "the future has no shared state"
        self._is_valid = False
        self._thread.join()
        if isinstance(self._result[0], Exception):
            raise self._result[0]
        return self._result[0]


def engine_threads() -> list[Any]:
    return [t for t in threading.enumerate() if t.name.startswith("ssdtune-")]
