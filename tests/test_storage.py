"""Bytes arrive as they are in the file, or the one who waits is told which block, file and offset."""

import ctypes
import gc
import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdtune.swap.gds import choose_gds
from ssdtune.swap.readers import ReaderPool, measure_read_rate
from ssdtune.swap.source import merge_extents
from ssdtune.swap.storage import (
    MIB,
    BufferedStorage,
    DirectStorage,
    Extent,
    StorageError,
    StorageTimeout,
    ThrottledStorage,
    aligned_bytes,
    choose_storage,
    direct_alignment,
)

PAGE = 4096
FILE_BYTES = 3 * MIB + 1234  # the tail is no multiple of anything
SLACK = (
    3  # times slower than its rate a drive may seem where others use the cores; never much faster
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("storage") / "weights.safetensors"
    file.write_bytes(random.Random(0).randbytes(FILE_BYTES))
    os.sync()
    return file


@pytest.fixture(params=["direct", "buffered"])
def storage(request, path):
    if request.param == "buffered":
        return BufferedStorage()
    choice = choose_storage(path)
    if not choice.is_direct:
        pytest.skip(f"no direct I/O here: {choice.reason}")
    return choice.storage


def whole(path: Path, needed_bytes: int | None = None) -> Extent:
    num_bytes = -(-path.stat().st_size // PAGE) * PAGE
    return Extent(path, 0, num_bytes, 0, needed_bytes or path.stat().st_size)


class GatedStorage(BufferedStorage):
    """A drive that does not answer before `gate` is set, and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.asked: list[tuple[int, int]] = []
        self.open_fds: set[int] = set()

    def open(self, path):
        fd = super().open(path)
        self.open_fds.add(fd)
        return fd

    def read(self, fd, offset, buffer):
        self.asked.append((offset, len(buffer)))
        self.gate.wait(20)
        return super().read(fd, offset, buffer)

    def close(self, fd):
        self.open_fds.remove(fd)
        super().close(fd)


# ------------------------------------------------------------------------------ reading


class Range:
    def __init__(self, name, path, start, num_bytes):
        self.name, self.path, self.start, self.num_bytes = name, path, start, num_bytes


def test_random_ranges_read_equal_the_file(storage, path):
    raw = path.read_bytes()
    rng = random.Random(1)
    with ReaderPool(storage, request_bytes=64 * 1024) as pool:
        for turn in range(20):
            ranges = []
            for i in range(rng.randrange(1, 8)):
                start = rng.randrange(FILE_BYTES)
                num_bytes = min(rng.choice([1, 100, 5000, 400_000]), FILE_BYTES - start)
                ranges.append(Range(str(i), path, start, num_bytes))
            layout = merge_extents(ranges, alignment=storage.alignment, max_gap_bytes=turn * 1000)
            buffer = aligned_bytes(layout.num_bytes)
            pool.submit(layout.extents, buffer, label=f"turn {turn}").wait(20)
            content = bytes(buffer.numpy())
            for item in ranges:
                offset = layout.offsets[item.name]
                expected = raw[item.start : item.start + item.num_bytes]
                assert content[offset : offset + item.num_bytes] == expected
    assert path.read_bytes() == raw


def test_the_short_tail_of_a_file_is_no_failure(storage, path):
    last = FILE_BYTES // PAGE * PAGE
    buffer = aligned_bytes(PAGE)
    with ReaderPool(storage) as pool:
        pool.submit([Extent(path, last, PAGE, 0, FILE_BYTES - last)], buffer, label="tail").wait(20)
    tail = path.read_bytes()[last:]
    assert bytes(buffer.numpy())[: len(tail)] == tail


def test_bytes_past_the_end_that_are_needed_are_a_failure(storage, path):
    last = FILE_BYTES // PAGE * PAGE
    with ReaderPool(storage) as pool:
        for needed in [None, FILE_BYTES - last + 1]:
            ticket = pool.submit(
                [Extent(path, last, PAGE, 0, needed)], aligned_bytes(PAGE), label="layers.7"
            )
            with pytest.raises(
                StorageError, match=r"layers\.7: .*weights\.safetensors gave 1,234 of"
            ):
                ticket.wait(20)


def test_a_file_cut_short_after_opening_is_named(storage, tmp_path):
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(bytes(20 * PAGE))
    os.sync()
    extent = whole(path)
    buffer = aligned_bytes(extent.num_bytes)
    with ReaderPool(storage, num_threads=1, request_bytes=PAGE) as pool:
        pool.submit([extent], buffer, label="layers.0").wait(20)
        os.truncate(path, 10 * PAGE + 5)
        ticket = pool.submit([extent], buffer, label="layers.1")
        with pytest.raises(StorageError) as caught:
            ticket.wait(20)
        message = str(caught.value)
        assert message.startswith("layers.1: ")
        for words in [str(path), "offset 40,960", "40,965", "Restore or download"]:
            assert words in message
        assert len(message.splitlines()) <= 4
        first_part = Extent(path, 0, 10 * PAGE, 0)
        pool.submit([first_part], buffer, label="layers.2").wait(20)  # the pool goes on


def test_an_error_of_the_drive_names_block_file_offset_and_errno(path):
    class FailingStorage(BufferedStorage):
        def read(self, fd, offset, buffer):
            if offset == 2 * PAGE:
                raise OSError(5, os.strerror(5))
            return super().read(fd, offset, buffer)

    extent = whole(path)
    with ReaderPool(FailingStorage(), request_bytes=PAGE) as pool:
        ticket = pool.submit([extent], aligned_bytes(extent.num_bytes), label="layers.7")
        with pytest.raises(StorageError) as caught:
            ticket.wait(20)
        assert ticket.done()
    assert str(caught.value) == (
        f"layers.7: cannot read 4,096 bytes at offset 8,192 of {path}: "
        "Input/output error (errno 5)."
    )
    cause = caught.value.__cause__
    assert cause is not None
    assert isinstance(cause.__cause__, OSError)


def test_a_descriptor_closed_beneath_the_readers_is_a_named_failure(storage, path):
    extent = whole(path)
    with ReaderPool(storage) as pool:
        buffer = aligned_bytes(extent.num_bytes)
        pool.submit([extent], buffer, label="layers.0").wait(20)
        fd = pool._fds[path]
        write_end = os.open(path.parent, os.O_RDONLY)  # a folder in its place: reads give EISDIR
        os.dup2(write_end, fd)
        os.close(write_end)
        with pytest.raises(StorageError, match=r"layers\.1: .*weights\.safetensors.*errno"):
            pool.submit([extent], buffer, label="layers.1").wait(20)


def test_a_file_that_is_gone_fails_where_it_is_waited_for(storage, tmp_path):
    with ReaderPool(storage) as pool:
        extent = Extent(tmp_path / "absent.safetensors", 0, PAGE, 0)
        ticket = pool.submit([extent], aligned_bytes(PAGE), label="embedding")
        with pytest.raises(StorageError, match=r"embedding: .*absent\.safetensors: No such file"):
            ticket.wait(20)


def test_a_failure_that_is_no_io_error_reaches_the_caller_too(path):
    class BrokenStorage(BufferedStorage):
        def read(self, fd, offset, buffer):
            raise RuntimeError("a bug")

    with ReaderPool(BrokenStorage()) as pool:
        ticket = pool.submit([whole(path)], aligned_bytes(4 * MIB), label="layers.3")
        with pytest.raises(StorageError, match=r"layers\.3: RuntimeError\('a bug'\)"):
            ticket.wait(20)
        with pytest.raises(StorageError):
            ticket.wait(20)  # and again


# ------------------------------------------------------------------------------ the pool


def test_requests_are_split_and_served_first_come_first_served(path):
    storage = GatedStorage()
    storage.gate.set()
    with ReaderPool(storage, num_threads=1, request_bytes=2 * PAGE) as pool:
        buffer = aligned_bytes(8 * PAGE)
        extents = [Extent(path, 16 * PAGE, 3 * PAGE, 0), Extent(path, 0, PAGE, 4 * PAGE)]
        tickets = [pool.submit(extents, buffer, label=str(i)) for i in range(2)]
        for ticket in tickets:
            ticket.wait(20)
    one = [(16 * PAGE, 2 * PAGE), (18 * PAGE, PAGE), (0, PAGE)]
    assert storage.asked == one + one
    assert tickets[0].started <= tickets[0].finished <= tickets[1].finished
    assert tickets[0].seconds == tickets[0].finished - tickets[0].started
    raw = path.read_bytes()
    content = bytes(buffer.numpy())
    assert content[: 3 * PAGE] == raw[16 * PAGE : 19 * PAGE]
    assert content[4 * PAGE : 5 * PAGE] == raw[:PAGE]
    assert content[3 * PAGE : 4 * PAGE] == bytes(PAGE), "nothing else is written"


def test_two_threads_have_two_requests_in_flight(path):
    storage = GatedStorage()
    with ReaderPool(storage, num_threads=2, request_bytes=PAGE) as pool:
        ticket = pool.submit([whole(path)], aligned_bytes(4 * MIB), label="x")
        deadline = time.perf_counter() + 10
        while len(storage.asked) < 2 and time.perf_counter() < deadline:
            time.sleep(0.001)
        assert len(storage.asked) == 2
        assert not ticket.done()
        assert ticket.seconds == 0
        storage.gate.set()
        ticket.wait(20)


def test_a_wait_has_a_deadline_that_names_what_it_waits_for(path):
    storage = GatedStorage()
    with ReaderPool(storage, num_threads=1) as pool:
        ticket = pool.submit([whole(path)], aligned_bytes(4 * MIB), label="layers.7 (backward)")
        with pytest.raises(StorageTimeout) as caught:
            ticket.wait(0.05)
        for words in ["layers.7 (backward)", "weights.safetensors", "0.05 s", "0 of 1"]:
            assert words in str(caught.value)
        storage.gate.set()
        ticket.wait(20)  # late, but it came


def test_after_a_failure_no_thread_writes_to_the_buffer(path):
    class FirstFails(GatedStorage):
        def read(self, fd, offset, buffer):
            if offset > 0:
                return super().read(fd, offset, buffer)
            while not self.asked:
                time.sleep(0.001)
            raise OSError(5, os.strerror(5))

    storage = FirstFails()
    with ReaderPool(storage, num_threads=2, request_bytes=PAGE) as pool:
        ticket = pool.submit([whole(path)], aligned_bytes(4 * MIB), label="x")
        with pytest.raises(StorageTimeout):
            ticket.wait(0.05)  # one failed, one is still in flight: not yet over
        storage.gate.set()
        with pytest.raises(StorageError, match="Input/output error"):
            ticket.wait(20)
        assert len(storage.asked) <= 3, "the rest of a failed ticket is not read"


def test_an_empty_block_is_there_at_once():
    with ReaderPool(BufferedStorage()) as pool:
        ticket = pool.submit([], aligned_bytes(0), label="x")
        assert ticket.done()
        ticket.wait(0)


def test_close_ends_threads_closes_files_and_may_be_repeated(path):
    storage = GatedStorage()
    pool = ReaderPool(storage, num_threads=2, request_bytes=PAGE)
    ticket = pool.submit([whole(path)], aligned_bytes(4 * MIB), label="layers.9")
    while len(storage.asked) < 2:
        time.sleep(0.001)
    threads = list(pool._threads)
    assert all(thread.daemon for thread in threads)
    threading.Timer(0.05, storage.gate.set).start()
    pool.close()
    pool.close()
    assert not any(thread.is_alive() for thread in threads)
    assert not storage.open_fds
    with pytest.raises(StorageError, match=r"layers\.9: the readers were closed"):
        ticket.wait(20)
    with pytest.raises(StorageError, match="closed"):
        pool.submit([whole(path)], aligned_bytes(4 * MIB), label="x")


def test_close_does_not_hang_on_a_drive_that_does(path):
    storage = GatedStorage()
    pool = ReaderPool(storage, num_threads=1)
    pool.submit([whole(path)], aligned_bytes(4 * MIB), label="x")
    while not storage.asked:
        time.sleep(0.001)
    start = time.perf_counter()
    pool.close(timeout_s=0.05)
    assert time.perf_counter() - start < 5
    assert storage.open_fds, "a descriptor in use is not closed"
    storage.gate.set()


def test_a_submit_allocates_nothing_but_small_objects(path):
    extent = whole(path)
    buffer = aligned_bytes(extent.num_bytes)
    with ReaderPool(BufferedStorage()) as pool:
        blocks: list[int] = []
        for num_submits in [50, 100]:
            for _ in range(num_submits):
                pool.submit([extent], buffer, label="x").wait(20)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        assert blocks[1] - blocks[0] < 100
        assert len(pool._fds) == 1


# ------------------------------------------------------------------------------ choice


def test_direct_io_is_chosen_where_its_bytes_are_right(path):
    choice = choose_storage(path)
    assert choice.storage.alignment >= PAGE
    assert choice.storage.alignment == max(PAGE, direct_alignment(path))
    assert choice.reason
    assert "\n" not in choice.reason
    assert choose_storage(path.parent).reason == choice.reason


@pytest.mark.parametrize("num_bytes", [0, 1, PAGE, PAGE + 1])
def test_the_probe_copes_with_small_files(num_bytes, tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(256)) * 17 * (num_bytes > 0))
    os.truncate(tmp_path / "f", num_bytes)
    assert choose_storage(tmp_path / "f").is_direct == choose_storage(tmp_path).is_direct


def test_without_direct_io_the_choice_is_buffered_with_a_reason(path, monkeypatch):
    def refuses(self, path):
        raise OSError(22, os.strerror(22))

    def lies(self, fd, offset, buffer):
        buffer[7] ^= 1
        return len(buffer)

    for attribute, replacement, words in [
        ("open", refuses, "O_DIRECT failed: Invalid argument"),
        ("read", lies, "differs from a buffered one"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(DirectStorage, attribute, replacement)
            choice = choose_storage(path)
        assert not choice.is_direct
        assert words in choice.reason


def test_a_file_that_cannot_be_read_is_an_error_not_a_choice(tmp_path):
    with pytest.raises(StorageError, match="absent"):
        choose_storage(tmp_path / "absent")
    with pytest.raises(StorageError, match="no file in it"):
        choose_storage(tmp_path)


def num_cached_pages(path: Path) -> int:
    """mincore(2) over the whole file."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        mapping = mmap.mmap(
            file.fileno(), num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    resident = (ctypes.c_ubyte * (-(-num_bytes // mmap.PAGESIZE)))()
    anchor = (ctypes.c_char * 1).from_buffer(mapping)
    address = ctypes.c_void_p(ctypes.addressof(anchor))
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(num_bytes), resident) == 0
    del anchor
    mapping.close()
    return sum(page & 1 for page in resident)


def test_reading_leaves_nothing_in_the_page_cache(storage, path):
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if num_cached_pages(path) > 0:
        pytest.skip("this file system keeps its pages (tmpfs?)")
    with ReaderPool(storage, num_threads=1) as pool:
        pool.submit([whole(path)], aligned_bytes(4 * MIB), label="x").wait(20)
        assert num_cached_pages(path) * PAGE < FILE_BYTES / 4, "readahead at most"
    assert num_cached_pages(path) == 0
    path.read_bytes()
    assert num_cached_pages(path) > 0, "or this test could not fail"


# ------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 3 * MIB + 5])
def test_a_buffer_has_exactly_its_bytes_on_a_page(num_bytes):
    buffer = aligned_bytes(num_bytes)
    assert (buffer.dtype, buffer.shape) == (torch.uint8, (num_bytes,))
    assert buffer.data_ptr() % mmap.PAGESIZE == 0
    assert not buffer.any()
    assert not aligned_bytes(num_bytes, pin=True).any()


def mapped_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def test_idle_readers_keep_no_buffer_alive(path):
    with ReaderPool(BufferedStorage(), num_threads=1) as pool:
        pool.submit([whole(path)], aligned_bytes(4 * MIB), label="x").wait(20)
        before = mapped_bytes()
        pool.submit([whole(path)], aligned_bytes(1 << 30), label="x").wait(20)
        deadline = time.perf_counter() + 5
        while mapped_bytes() - before > MIB and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert mapped_bytes() - before <= MIB


def test_a_view_keeps_a_buffer_alive_and_the_last_one_frees_it():
    before = mapped_bytes()
    buffer = aligned_bytes(1 << 30)
    view = buffer[4096:8192].view(torch.float32)
    del buffer
    assert mapped_bytes() - before > 0.9 * (1 << 30)
    view.fill_(1.0)
    assert view.sum() == 1024
    del view
    assert mapped_bytes() - before < 0.1 * (1 << 30)


def test_more_memory_than_there_is_is_refused_with_the_number():
    with pytest.raises(StorageError, match=r"offload\.ram"):
        aligned_bytes(1 << 60)


@pytest.mark.gpu
def test_a_pinned_buffer_is_pinned_until_it_is_released():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    buffer = aligned_bytes(3 * MIB + 5, pin=True)
    assert buffer.is_pinned()
    assert buffer[4096:].is_pinned()
    address = buffer.data_ptr()
    cudart: Any = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(address, buffer.nbytes, 0)) != 0, "registered already"
    del buffer
    gc.collect()
    again = aligned_bytes(3 * MIB + 5, pin=True)
    assert again.is_pinned()


# ------------------------------------------------------------------------------ rates


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_throttled_drive_gives_its_rate_to_all_threads_together(path, num_threads):
    rate = 10e6
    extent = whole(path)
    buffer = aligned_bytes(extent.num_bytes)
    storage = ThrottledStorage(BufferedStorage(), rate)
    with ReaderPool(storage, num_threads=num_threads, request_bytes=256 * 1024) as pool:
        tickets = [pool.submit([extent], buffer, label=str(i)) for i in range(2)]
        cpu = time.thread_time()
        for ticket in tickets:
            ticket.wait(20)
        assert time.thread_time() - cpu < 0.1, "waiting is asleep"
    seconds = tickets[1].finished - tickets[0].started
    assert 0.8 * 2 * FILE_BYTES / rate < seconds < SLACK * 2 * FILE_BYTES / rate
    assert bytes(buffer.numpy())[:FILE_BYTES] == path.read_bytes()


def test_an_idle_drive_saves_nothing_up(path):
    storage = ThrottledStorage(BufferedStorage(), 10e6)
    fd = storage.open(path)
    memory = memoryview(bytearray(MIB))
    time.sleep(0.2)
    start = time.perf_counter()
    for _ in range(2):
        storage.read(fd, 0, memory)
    assert 0.8 * 2 * MIB / 10e6 < time.perf_counter() - start < SLACK * 2 * MIB / 10e6
    storage.close(fd)


def test_the_measured_rate_is_that_of_the_drive(path):
    slow = ThrottledStorage(choose_storage(path).storage, 50e6)
    assert 0.05 / SLACK < measure_read_rate(slow, path, seconds=0.5) < 1.25 * 0.05
    plain = [measure_read_rate(BufferedStorage(), path, seconds=0.05) for _ in range(5)]
    assert max(plain) > 0.05, "where it has a core for a moment"


def test_measuring_an_absent_or_empty_file_is_no_crash(tmp_path):
    (tmp_path / "empty").touch()
    assert measure_read_rate(BufferedStorage(), tmp_path / "empty") == 0.0
    with pytest.raises(StorageError, match="absent"):
        measure_read_rate(BufferedStorage(), tmp_path / "absent")


# ------------------------------------------------------------------------------ kvikio


def test_kvikio_is_offered_with_a_reason_or_not_at_all(path):
    choice = choose_gds(path)
    assert choice.reason
    assert "\n" not in choice.reason
    if not torch.cuda.is_available():
        assert choice.open_pool is None
        assert "no CUDA device" in choice.reason


@pytest.mark.gpu
def test_kvikio_reads_what_is_in_the_file(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    file = tmp_path / "f"
    file.write_bytes(random.Random(0).randbytes(32 * MIB + 77))
    os.sync()
    choice = choose_gds(file)
    if choice.open_pool is None:
        pytest.skip(choice.reason)
    pool = choice.open_pool()
    layout = merge_extents([Range("r", file, 4_097, 32 * MIB - 5_000)], alignment=PAGE)
    slot = torch.zeros(layout.num_bytes, dtype=torch.uint8, device="cuda")
    pool.submit(layout.extents, slot, label="layers.0").wait(20)
    offset = layout.offsets["r"]
    got = bytes(slot[offset : offset + 32 * MIB - 5_000].cpu().numpy())
    assert got == file.read_bytes()[4_097 : 32 * MIB - 903]
    pool.close()
