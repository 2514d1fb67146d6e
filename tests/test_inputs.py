"""Block inputs wait elsewhere than on the device: the same bits back, bounded memory, nothing left behind."""

import errno
import gc
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import Pair, accumulate, assert_equal, assert_same_training, cut, make_pair

from ssdtune.schedule.plan import Kind, Lane, Tier
from ssdtune.schedule.trace import TraceOp
from ssdtune.swap.inputs import make_input_store
from ssdtune.swap.kept import InputsError, RamInputs
from ssdtune.swap.ring import NvmeInputs
from ssdtune.swap.scratch import ScratchError, ScratchFile, Space

CPU = torch.device("cpu")
CHUNK = 16 * 1024


class Nvme(NvmeInputs):
    """With small chunks, few of them, and all that it did."""

    def __init__(self, folder: Path, *, num_chunks: int = 3, timeout_s: float = 20.0) -> None:
        self.ops: list[TraceOp] = []
        super().__init__(
            ScratchFile(folder),
            device=CPU,
            trace=self.ops.append,
            timeout_s=timeout_s,
            min_bytes=64,
            chunk_bytes=CHUNK,
            num_chunks=num_chunks,
        )


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Nvme]:
    store = Nvme(tmp_path)
    yield store
    store.close()


@pytest.fixture(params=["nvme", "ram"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Both tiers; the RAM tier works without a device, where it only costs a copy."""
    made: Any = (
        Nvme(tmp_path)
        if request.param == "nvme"
        else RamInputs(device=CPU, timeout_s=20.0, min_bytes=64)
    )
    yield made
    made.close()


def hidden(num_bytes: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 256, (num_bytes,), generator=random, dtype=torch.uint8)
    return numbers.view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------ tensors in and out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_bits_come_back_in_reverse_order(store: Any, dtype: torch.dtype) -> None:
    """NaNs with payloads and infinities among them; sizes below, at and above a chunk and the ring."""
    sizes = [64, 1000, 4096, CHUNK - 8, CHUNK, CHUNK + 8, 5 * CHUNK, 7 * CHUNK + 24]
    tensors = [hidden(n, dtype, seed=i) for i, n in enumerate(sizes)]
    kept = [store.keep(t) for t in tensors]
    assert None not in kept
    for place, tensor in zip(reversed(kept), reversed(tensors), strict=True):
        taken = place.take()
        assert same_bits(taken, tensor)
        assert taken.dtype == dtype
        assert taken.data_ptr() != tensor.data_ptr()


def test_order_does_not_matter_for_what_comes_back(store: Any) -> None:
    tensors = [hidden(CHUNK * (1 + i % 3), seed=i) for i in range(9)]
    kept = [store.keep(t) for t in tensors]
    for i in [4, 0, 8, 1, 7, 2, 2, 6, 3, 5, 0]:
        assert same_bits(kept[i].take(), tensors[i])


def test_strides_are_kept(store: Any) -> None:
    base = torch.randn(6, 10, 32)
    views = {
        "transposed": base.transpose(0, 1),
        "cut": base[1:5, :, 4:20],
        "expanded": base[:1].expand(6, 10, 32),
        "offset": base[2:],
    }
    for name, view in views.items():
        taken = store.keep(view).take()
        assert torch.equal(taken, view), name
        assert taken.stride() == view.stride(), name


def test_what_is_better_left_with_autograd_is_not_kept(store: Any, tmp_path: Path) -> None:
    assert store.keep(torch.randn(8)) is None  # 32 bytes
    assert store.keep(torch.arange(1000)) is None
    assert store.keep(torch.nn.Parameter(torch.randn(1000))) is None
    assert store.keep(torch.randn(1000, device="meta")) is None
    assert store.keep(torch.randn(100, 1000)[:, :10]) is None  # spans ten times its bytes
    assert store.used_bytes == 0


def test_a_later_change_in_place_does_not_reach_what_is_kept(store: Any) -> None:
    tensor = torch.randn(1000)
    before = tensor.clone()
    first = store.keep(tensor)
    tensor.zero_()
    second = store.keep(tensor)
    assert torch.equal(second.take(), tensor)
    assert torch.equal(first.take(), before)


def test_a_tensor_kept_twice_is_stored_once(store: Any) -> None:
    tensor = torch.randn(3000)
    first, second = store.keep(tensor), store.keep(tensor)
    assert first is second
    assert store.used_bytes < 2 * tensor.nbytes
    assert torch.equal(first.take(), tensor)
    assert torch.equal(second.take(), tensor)


# ------------------------------------------------------------------ space


def test_space_is_free_again_when_nobody_can_take(store: Any) -> None:
    kept = [store.keep(hidden(CHUNK, seed=i)) for i in range(10)]
    assert store.used_bytes == 10 * CHUNK
    del kept[3:]
    assert store.used_bytes == 3 * CHUNK


def test_space_is_free_again_in_the_next_step(store: Any) -> None:
    kept = [store.keep(hidden(CHUNK, seed=i)) for i in range(4)]
    for place in kept[1:]:
        place.take()
    store.begin_step(2)
    assert store.used_bytes == CHUNK  # a forward whose backward is still to come
    assert same_bits(kept[0].take(), hidden(CHUNK, seed=0))


def test_taking_again_works_in_the_same_step_and_is_refused_later(store: Any) -> None:
    tensor = hidden(2 * CHUNK)
    kept = store.keep(tensor, "layers.3")
    assert same_bits(kept.take(), tensor)
    assert same_bits(kept.take(), tensor)
    store.begin_step(2)
    with pytest.raises(InputsError, match=r"layers\.3 was taken back by an earlier backward"):
        kept.take()


def test_steps_of_any_lengths_do_not_grow_the_store(store: Any) -> None:
    """After the longest step nothing is reserved any more, and nothing leaks."""
    reserved = []
    for step in range(12):
        store.begin_step(step)
        length = CHUNK * 6 if step == 2 else CHUNK // 4 * (1 + step % 7)
        kept = [store.keep(hidden(length, seed=i)) for i in range(8)]
        while kept:
            kept.pop().take()
        reserved.append(store.reserved_bytes)
    store.begin_step(99)
    assert store.used_bytes == 0
    assert reserved[2:] == reserved[2:3] * 10


def test_free_neighbours_become_one() -> None:
    space = Space(limit=100)
    starts = [space.take(20) for _ in range(5)]
    assert starts == [0, 20, 40, 60, 80]
    assert space.take(1) is None
    for start in (20, 60, 40):
        space.give(start, 20)
    assert space.take(60) == 20
    space.give(20, 60)
    assert space.take(10) == 20
    space.give(0, 20)
    space.give(80, 20)
    assert (space.used, space.end) == (10, 30)
    space.give(20, 10)
    assert (space.used, space.end) == (0, 0)


# ------------------------------------------------------------------ the scratch file


def test_nothing_is_left_in_the_folder_even_while_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for it"
    store = Nvme(folder)
    kept = store.keep(hidden(CHUNK))
    assert os.listdir(folder) == []
    assert kept is not None
    mode = os.fstat(store.file._plain)
    assert stat.S_IMODE(mode.st_mode) == 0o600
    assert mode.st_nlink == 0
    assert mode.st_blocks * 512 >= store.reserved_bytes, "reserved, not sparse"
    store.close()
    assert os.listdir(folder) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(ScratchError, match=r"(?s)file.*offload\.path"):
        make_input_store(Tier.NVME, device=CPU, folder=file / "below")
    with pytest.raises(InputsError, match=r"offload\.path"):
        make_input_store(Tier.NVME, device=CPU)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no file system in RAM at /dev/shm")
def test_a_folder_in_ram_is_refused() -> None:
    with pytest.raises(InputsError, match=r"lies in RAM \(tmpfs\)"):
        make_input_store(Tier.NVME, device=CPU, folder=Path("/dev/shm/not/there"))
    assert not os.path.exists("/dev/shm/not")


def test_where_autograd_keeps_them_there_is_no_store(tmp_path: Path) -> None:
    assert make_input_store(Tier.DEVICE, device=CPU) is None
    assert make_input_store(Tier.RAM, device=CPU) is None, "the same memory"


def test_a_full_drive_is_an_error_before_anything_is_written(
    nvme: Nvme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names the bytes, the folder and the way out; the step before and the one after are fine."""
    first = nvme.keep(hidden(CHUNK))
    reserved = nvme.reserved_bytes

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ScratchError, match=r"(?s)\(1,000,001,536 bytes\).*ENOSPC") as caught:
        nvme.reserve(10**9)
    assert "offload.path" in str(caught.value)
    assert str(nvme.file.folder) in str(caught.value)
    monkeypatch.undo()
    assert nvme.reserved_bytes == reserved
    assert first is not None
    assert same_bits(first.take(), hidden(CHUNK))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_on_a_drive_that_is_really_full(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=2m tmpfs '{folder}' 2>/dev/null"):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        store: Any = Nvme(folder)
        kept = [store.keep(hidden(CHUNK, seed=i)) for i in range(100)]
        with pytest.raises(ScratchError, match="ENOSPC"):
            kept += [store.keep(hidden(CHUNK, seed=i)) for i in range(100)]
        assert same_bits(kept[99].take(), hidden(CHUNK, seed=99))
        kept.clear()
        store.begin_step(2)
        assert store.used_bytes == 0
        assert store.keep(hidden(CHUNK)) is not None
        store.close()
    finally:
        os.system(f"umount '{folder}'")


def test_without_direct_io_it_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def without_direct(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", without_direct)
    store = Nvme(tmp_path)
    assert not store.file.is_direct
    tensors = [hidden(3 * CHUNK + 40, seed=i) for i in range(4)]
    kept = [store.keep(t) for t in tensors]
    assert all(same_bits(k.take(), t) for k, t in zip(kept, tensors, strict=True) if k)
    store.close()


# ------------------------------------------------------------------ the ring and its thread


class SlowDrive(ScratchFile):
    """Waits before every request until it is let go on."""

    def __init__(self, folder: Path) -> None:
        self.may_go = threading.Event()
        self.may_go.set()
        self.fails_with: int | None = None
        self.num_written = 0
        super().__init__(folder)
        self.num_written = 0  # what it tried itself was none of a store's

    def write(self, offset: int, content: memoryview) -> None:
        self.may_go.wait()
        if self.fails_with is not None:
            raise OSError(self.fails_with, os.strerror(self.fails_with))
        super().write(offset, content)
        self.num_written += 1

    def read(self, offset: int, buffer: memoryview) -> None:
        self.may_go.wait()
        if self.fails_with is not None:
            raise OSError(self.fails_with, os.strerror(self.fails_with))
        super().read(offset, buffer)


def slow_store(folder: Path, timeout_s: float) -> tuple[NvmeInputs, SlowDrive]:
    file = SlowDrive(folder)
    store = NvmeInputs(
        file, device=CPU, timeout_s=timeout_s, min_bytes=64, chunk_bytes=CHUNK, num_chunks=3
    )
    return store, file


def test_a_full_ring_waits_for_the_drive_and_not_for_ever(tmp_path: Path) -> None:
    store, file = slow_store(tmp_path, timeout_s=0.2)
    file.may_go.clear()
    kept = [store.keep(hidden(CHUNK, seed=i)) for i in range(3)]
    start = time.perf_counter()
    with pytest.raises(InputsError, match=r"(?s)waited 0 s.*scratch file"):
        store.keep(hidden(CHUNK))
    assert 0.1 < time.perf_counter() - start < 5
    file.may_go.set()
    store.timeout_s = 20  # its thread has yet to be given a core
    kept.append(store.keep(hidden(CHUNK, seed=3)))
    assert all(same_bits(k.take(), hidden(CHUNK, seed=i)) for i, k in enumerate(kept) if k)
    assert store.waited_s > 0.1
    store.close()


def test_a_failed_write_reaches_the_caller_and_the_next_step_is_free_of_it(tmp_path: Path) -> None:
    store, file = slow_store(tmp_path, timeout_s=5)
    file.fails_with = errno.EIO
    kept = store.keep(hidden(CHUNK), "layers.7")
    assert kept is not None
    while store._error is None:
        time.sleep(0.01)
    with pytest.raises(InputsError, match=rf"(?s)layers\.7.*{tmp_path}.*errno 5"):
        store.keep(hidden(CHUNK), "layers.8")
    with pytest.raises(InputsError, match=r"(?s)cannot write 16,384 bytes.*layers\.7"):
        kept.take()
    file.fails_with = None
    store.begin_step(2)
    again = store.keep(hidden(CHUNK))
    assert again is not None
    assert same_bits(again.take(), hidden(CHUNK))
    store.close()


def test_a_failed_read_reaches_the_one_who_takes(tmp_path: Path) -> None:
    store, file = slow_store(tmp_path, timeout_s=5)
    kept = [store.keep(hidden(CHUNK, seed=i), f"layers.{i}") for i in range(9)]
    while file.num_written < len(kept):
        time.sleep(0.01)
    file.fails_with = errno.EIO
    assert kept[0] is not None
    with pytest.raises(InputsError, match=r"(?s)cannot read 16,384 bytes.*layers\.0.*errno 5"):
        kept[0].take()
    store.close()


def test_what_is_still_staged_is_not_read_again_and_the_rest_is_read_ahead(nvme: Nvme) -> None:
    """Three chunks: the last three tensors come from the ring, all others by one read each."""
    tensors = [hidden(CHUNK, seed=i) for i in range(12)]
    kept = [nvme.keep(t, f"layers.{i}") for i, t in enumerate(tensors)]
    for place, tensor in zip(reversed(kept), reversed(tensors), strict=True):
        assert place is not None
        assert same_bits(place.take(), tensor)
        time.sleep(0.01)
    nvme.close()
    stored = [op for op in nvme.ops if op.kind is Kind.STORE]
    fetched = [op for op in nvme.ops if op.kind is Kind.FETCH]
    assert {op.lane for op in stored} == {Lane.NVME_WRITE}
    assert {op.lane for op in fetched} == {Lane.NVME_READ}
    assert [op.block for op in stored] == [f"layers.{i}" for i in range(12)]
    assert [op.block for op in fetched] == [f"layers.{i}" for i in reversed(range(9))]
    assert sum(op.num_bytes for op in stored) == 12 * CHUNK


def test_memory_of_the_ring_is_all_there_is(nvme: Nvme) -> None:
    """No tensor, view or job keeps another buffer alive once backward has taken everything."""
    tensors = [hidden(4 * CHUNK, seed=i) for i in range(5)]
    dead = [weakref.ref(t) for t in tensors]
    kept = [nvme.keep(t) for t in tensors]
    del tensors
    gc.collect()
    assert all(ref() is None for ref in dead)
    taken = [weakref.ref(place.take()) for place in reversed(kept) if place]
    assert all(ref() is None for ref in taken)


# ------------------------------------------------------------------ under a model


def nvme_pair(name: str, folder: Path, stream: Any, dtype: torch.dtype) -> Pair:
    """Every hidden state, small as it is, goes through a ring of three chunks."""
    pair = make_pair(name, folder / "model", stream, dtype=dtype)
    streamer = pair.streamed.get_base_model().ssdtune
    streamer.input_store = Nvme(folder / "scratch")
    return pair


@pytest.mark.parametrize("name", ["llama", "gemma3n", "bart"])
def test_training_with_inputs_on_nvme_equals_training_in_memory(
    name: str, tmp_path: Path, stream: Any
) -> None:
    pair = nvme_pair(name, tmp_path, stream, torch.bfloat16 if name == "llama" else torch.float32)
    store = pair.streamed.get_base_model().ssdtune.input_store
    batches = [tiny_models.batch(name, 8, 33 - step, seed=step) for step in range(3)]
    if name == "bart":  # the encoder's states are kept once and taken by every decoder block
        loss = pair.streamed(**batches[0]).loss
        loss.backward()
        accumulate(pair.plain, cut(batches[0], 4))
    else:
        assert_same_training(pair, batches)
    ops = store.ops
    store.begin_step(99)
    assert store.used_bytes == 0
    assert {op.kind for op in ops} >= {Kind.STORE}
    layers = {op.block for op in ops if op.kind is Kind.STORE}
    assert len(layers) >= 4


def test_a_retained_graph_gives_the_same_gradient_again(tmp_path: Path, stream: Any) -> None:
    pair = nvme_pair("llama", tmp_path, stream, torch.float32)
    batch = tiny_models.batch("llama", 4, 33)
    loss = pair.streamed(**batch).loss
    named = [(n, p) for n, p in pair.streamed.named_parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True)
    second = torch.autograd.grad(loss, [p for _, p in named])
    assert_equal(
        {n: g for (n, _), g in zip(named, first, strict=True)},
        {n: g for (n, _), g in zip(named, second, strict=True)},
    )


def test_a_lost_loss_and_a_failed_forward_leave_no_space_taken(tmp_path: Path, stream: Any) -> None:
    pair = nvme_pair("llama", tmp_path, stream, torch.float32)
    streamer = pair.streamed.get_base_model().ssdtune
    store, batch = streamer.input_store, tiny_models.batch("llama", 8, 33)
    loss = pair.streamed(**batch).loss
    assert store.used_bytes > 0
    del loss
    assert store.used_bytes == 0
    layer = pair.streamed.get_base_model().model.layers[2].mlp
    real, calls = layer.forward, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken on purpose")
        return real(*args, **kwargs)

    layer.forward = breaks
    with pytest.raises(RuntimeError, match="broken on purpose"):
        pair.streamed(**batch)
    layer.forward = real
    gc.collect()  # the traceback's frames
    assert store.used_bytes == 0
    assert_same_training(pair, [batch])


@pytest.mark.parametrize("tier", ["device", "nvme"])
def test_no_block_input_is_alive_after_backward_while_the_loss_is(
    tier: str, tmp_path: Path, stream: Any
) -> None:
    """With NVMe none is alive after forward either, but for those on their way between blocks."""
    pair = make_pair("llama", tmp_path / "model", stream)
    streamer = pair.streamed.get_base_model().ssdtune
    if tier == "nvme":
        streamer.input_store = Nvme(tmp_path / "scratch")
    seen: list[weakref.ref[Any]] = []
    for meeting in streamer.meetings[1:-1]:  # the layers
        inner = meeting.inner

        def noted(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            seen.append(weakref.ref(args[0].untyped_storage()))
            return _inner(*args, **kwargs)

        meeting.inner = noted
    loss = pair.streamed(**tiny_models.batch("llama", 8, 33)).loss
    gc.collect()
    alive = sum(ref() is not None for ref in seen)
    num_layers, num_micro = 4, 4
    assert len(seen) == num_layers * num_micro
    if tier == "nvme":
        assert alive <= num_micro, "what the model itself holds: the embeddings"
    else:
        assert alive == len(seen), "or this test sees nothing"
    loss.backward()
    assert len(seen) == 2 * num_layers * num_micro
    assert [i for i, ref in enumerate(seen) if ref() is not None] == []
    assert torch.isfinite(loss)


# ------------------------------------------------------------------ with a device (not run without one)


@pytest.mark.gpu
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.NVME])
def test_device_tensors_come_back_whole_while_compute_goes_on(tier: Tier, tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    store = make_input_store(tier, device=device, folder=tmp_path, timeout_s=30.0)
    assert store is not None
    for step in range(3):
        store.begin_step(step)
        x = torch.randn(1024, 1024, device=device)
        kept, sums = [], []
        for _ in range(20):
            x = torch.nn.functional.normalize(x @ x)
            kept.append(store.keep(x))
            sums.append(x.double().sum())
        del x
        for place, expected in zip(reversed(kept), reversed(sums), strict=True):
            assert place is not None
            assert torch.equal(place.take().double().sum(), expected)
    store.close()
