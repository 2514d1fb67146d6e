"""Stores past the caches or through them: whichever a short test finds faster, or what is asked for; the same bits."""

import ctypes
from pathlib import Path

import pytest
import torch
from test_foreign import random_part
from test_gguf import blocks_of
from test_unpack import SUFFIXES, native, packed

from ssdtune import doctor
from ssdtune.kernels import decoding, store_mode
from ssdtune.kernels.affine import ORDERS, Affine
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import Ggml
from ssdtune.kernels.integers import Awq, Gptq, PackQuantized
from ssdtune.kernels.nibbles import E2M1, NF4, Nibbles, Nvfp4
from ssdtune.kernels.store_mode import StoreModeError, are_past_caches
from ssdtune.kernels.unpack import unpack
from ssdtune.probe import files

SHAPE = (256, 512)
FORMATS: tuple[Format, ...] = (
    *(Affine(bits, order) for bits, order in ORDERS.items()),
    Affine(4, (4,), 32),
    Nibbles(NF4, 64, is_high_first=True),
    Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"),
    Nvfp4(is_divided=False),
    Gptq(4, 128),
    Awq(128),
    PackQuantized(3, 64),
    ScaledBytes((128, 128)),
    ScaledBytes((1, 512), codes="I8"),
    Ggml("Q4_K"),
    Ggml("Q6_K"),
)


class Job(ctypes.Structure):
    """What all jobs of decoders have."""

    _fields_ = [(name, ctypes.c_int64) for name in ("n", "dtype", "is_streamed", "part", "next")]


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_mode, "_found", {})
    monkeypatch.delenv(store_mode.VARIABLE, raising=False)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each job that ran after the test, whether it stored past the caches. All outputs are large."""
    seen: list[bool] = []
    monkeypatch.setattr(decoding, "STREAM_BYTES", 0)
    plain = decoding.Threads.run

    def run(self: decoding.Threads, function: object, job: ctypes.Structure, num: int) -> None:
        seen.append(bool(job.is_streamed))  # type: ignore[attr-defined]
        plain(self, function, job, num)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding.Threads, "run", run)
    return seen


def parts_of(format: Format) -> list[torch.Tensor]:
    if isinstance(format, Affine | Nibbles | Nvfp4):
        parts = packed(format, SHAPE[0] * SHAPE[1])
        return [part.view(of.shape) for part, of in zip(parts, format.parts(SHAPE), strict=True)]
    if isinstance(format, Ggml):
        [part] = format.parts(SHAPE)
        return [blocks_of(format.kind, 2048).reshape(-1)[: part.shape[0]]]
    return [random_part(part, SHAPE[1]) for part in format.parts(SHAPE)]


@pytest.mark.skipif(native is None, reason="there is no compiler here")
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.label)
def test_both_ways_have_the_same_bits(
    format: Format, suffix: str, ways: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(format)
    expected = torch.empty(SHAPE, dtype=torch.bfloat16)
    format.by_torch(parts, expected)
    for asked, is_past in store_mode.WAYS.items():
        monkeypatch.setenv(store_mode.VARIABLE, asked)
        out = torch.full(SHAPE, 7.0).bfloat16()
        unpack(format, parts, out, suffix=suffix)
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), asked
        assert ways.pop() == is_past


@pytest.mark.skipif(native is None, reason="there is no compiler here")
def test_each_kernels_first_large_output_finds_its_way() -> None:
    size = decoding.STREAM_BYTES // 2
    named = ((Affine(4, (4,)), "4 bits"), (Nibbles(NF4, 64, True), "four-bit tables"))
    for format, kernel in named:
        parts = packed(format, size)
        expected, out = torch.empty(size).bfloat16(), torch.empty(size).bfloat16()
        for _ in range(2):  # the second one finds it found
            unpack(format, parts, out)
        format.by_torch(parts, expected)
        assert torch.equal(out, expected)
        assert kernel in store_mode.found(SUFFIXES[0], decoding.DTYPES[torch.bfloat16])


# ------------------------------------------------------------------ which way, by a kernel that pretends


class Pretended:
    """A native function that takes so many seconds a part, past the caches and through them. calls: where each began,
    where it ended, and which way it went."""

    def __init__(self, past_s: float, through_s: float, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[int, int, bool]] = []
        self._costs, self._clock = {True: past_s, False: through_s}, 0.0
        patch.setattr(store_mode, "thread_time", lambda: self._clock)

    def __call__(self, address: ctypes.c_void_p) -> None:
        job = Job.from_address(address.value or 0)
        self.calls.append((job.next, job.n, bool(job.is_streamed)))
        self._clock += self._costs[bool(job.is_streamed)]
        job.next = job.n


def job_of(n: int, dtype: int = 1) -> Job:
    return Job(n=n, dtype=dtype, is_streamed=1, part=10, next=0)


@pytest.mark.parametrize(
    ("past_s", "through_s", "is_past"), [(1.0, 2.0, True), (2.0, 1.0, False), (1.1, 1.0, True)]
)
def test_the_faster_way_is_taken_and_past_the_caches_where_it_hardly_matters(
    past_s: float, through_s: float, is_past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, job = Pretended(past_s, through_s, monkeypatch), job_of(107)
    assert are_past_caches("any", "_x", kernel, job) == is_past
    assert (job.n, job.next, job.is_streamed) == (107, 0, 1), "the job is as it was"
    warm, *timed = kernel.calls
    assert warm == (0, 100, True)
    assert timed == [(10 * i, 10 * i + 10, i % 2 == 0) for i in range(10)], "no part is cut"
    assert store_mode.found("_x", 1) == {"any": is_past}
    assert store_mode.found("_x", 0) == {}


def test_it_is_found_out_once_for_each_kernel_instruction_set_and_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = Pretended(2.0, 1.0, monkeypatch)
    for kernel, suffix, dtype in (("a", "_x", 0), ("b", "_x", 0), ("a", "_y", 0), ("a", "_x", 1)):
        before = len(function.calls)
        for _ in range(2):
            assert not are_past_caches(kernel, suffix, function, job_of(1000, dtype))
        assert len(function.calls) - before == 1 + store_mode.MOST_PARTS


def test_of_few_parts_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Pretended(2.0, 1.0, monkeypatch)
    assert are_past_caches("any", "_x", kernel, job_of(39))
    assert not kernel.calls
    assert not store_mode.found("_x", 1)


def test_what_is_asked_for_is_done_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Pretended(2.0, 1.0, monkeypatch)
    for asked, is_past in store_mode.WAYS.items():
        monkeypatch.setenv(store_mode.VARIABLE, asked)
        assert are_past_caches("any", "_x", kernel, job_of(100)) == is_past
    assert not kernel.calls
    monkeypatch.setenv(store_mode.VARIABLE, "fast")
    with pytest.raises(StoreModeError, match="give streamed or plain"):
        are_past_caches("any", "_x", kernel, job_of(100))


# ------------------------------------------------------------------ the doctor


@pytest.mark.skipif(native is None, reason="there is no compiler here")
def test_the_doctor_says_how_each_kernel_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PROBE_BYTES", 1 << 20)
    for name in ("MATMUL_S", "DECODE_S", "READ_S"):
        monkeypatch.setattr(doctor, name, 1e-3)
    monkeypatch.setattr(
        store_mode, "_is_faster", lambda function, job, num: "affine" in function.__name__
    )
    doctor.print_doctor(tmp_path)
    text = capsys.readouterr().out
    assert "past the caches, faster here: 4 bits · 5 bits · 6 bits · 8 bits\n" in text
    assert (
        "through the caches, faster here: four-bit tables · FP8 · GGUF · lossless, 4 bits\n" in text
    )
    monkeypatch.setenv(store_mode.VARIABLE, "plain")
    doctor.print_doctor(tmp_path)
    assert "large outputs are stored plain, as SSDTUNE_STORE_MODE says" in capsys.readouterr().out
