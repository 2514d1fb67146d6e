"""Lossless packing: every bit comes back, on every path; damaged parts are refused and touch nothing else."""

import ctypes
import itertools
import json
import mmap
import multiprocessing
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssdtune.kernels import decoding, lossless, lossless_native, store_mode
from ssdtune.kernels.affine import TILE
from ssdtune.kernels.lossless import CHUNK, DamagedError, Lossless, encode, pack
from ssdtune.kernels.lossless_native import decode_lossless
from ssdtune.kernels.native import library

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import lossless as benchmark

SIZES = (0, 1, 63, 64, 65, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 777)
BITS = (3, 4)
DTYPES = {torch.uint8: "U8", torch.int32: "I32"}
PROT_NONE = 0  # of mprotect(2), on Linux


def native_suffixes() -> list[str]:
    found = library()
    return [] if found is None else list(found.suffixes)


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    """bfloat16 from integers of 16 bits."""
    return bits.to(torch.int16).view(torch.bfloat16)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def widened(values: torch.Tensor) -> torch.Tensor:
    """The float32 with the bits of a bfloat16 and sixteen zeros."""
    return (bits_of(values).int() << 16).view(torch.float32)


def trained(size: int) -> torch.Tensor:
    """Normal values, each row of 64 with a scale of its own."""
    scales = torch.exp(0.5 * torch.randn(-(-size // 64), 1))
    return (0.02 * scales * torch.randn(len(scales), 64)).view(-1)[:size].bfloat16()


def every_pattern(size: int) -> torch.Tensor:
    """All 65536 patterns, shuffled, as often as they fit: NaNs with any payload, denormals, -0."""
    repeated = torch.arange(size).remainder(65536)
    return of_bits(repeated[torch.randperm(size)])


def many_exponents(size: int) -> torch.Tensor:
    """Each upper byte as often as the others, in runs."""
    return of_bits(torch.arange(size) * 256 // 7)


def escapes_at_borders(size: int) -> torch.Tensor:
    """On both sides of each border of tiles and chunks, and at the very end; with 4 bits nowhere else."""
    number = torch.arange(size)
    values = 2.0 ** (number % 13)
    is_border = (number % TILE == 0) | (number % TILE == TILE - 1) | (number == size - 1)
    rare = torch.where(number % 2 == 0, -(2.0**60), 2.0**-60)
    return torch.where(is_border, rare, values).bfloat16()


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "trained": trained,
    "every pattern": every_pattern,
    "many exponents": many_exponents,
    "borders": escapes_at_borders,
    "one value": lambda size: torch.full((size,), -0.0).bfloat16(),
}
Decode = Callable[[Lossless, Sequence[torch.Tensor], torch.Tensor], None]


def by_torch(format: Lossless, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    format.by_torch(parts, out)


def natively(
    suffix: str, format: Lossless, parts: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    decode_lossless(format, parts, out, suffix)


DECODERS: dict[str, Decode] = {"torch": by_torch}
DECODERS.update({suffix: partial(natively, suffix) for suffix in native_suffixes()})


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_comes_back(kind: str, bits: int, decoder: str) -> None:
    for size in SIZES:
        values = KINDS[kind](size)
        format, parts = pack(values, bits)
        for expected in (values, widened(values)):
            out = torch.full((size,), 77.0, dtype=expected.dtype)
            DECODERS[decoder](format, parts, out)
            assert torch.equal(bits_of(out), bits_of(expected)), (size, out.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_borders_and_patterns_have_escapes(kind: str) -> None:
    """Else the test above would show less than it seems to."""
    format, _ = pack(KINDS[kind](5 * CHUNK + 777), 3)
    assert (format.num_escapes > 0) == (kind != "one value")


@pytest.mark.parametrize("bits", BITS)
def test_parts_are_as_the_header_will_say(bits: int) -> None:
    for shape in ((), (0,), (3, 5), (2, CHUNK // 2), (CHUNK + 1,)):
        format, parts = pack(torch.randn(shape).bfloat16(), bits)
        described = format.parts(shape)
        assert [(DTYPES[part.dtype], tuple(part.shape)) for part in parts] == [
            (part.dtype, part.shape) for part in described
        ]
        assert len({part.suffix for part in described}) == len(parts)
        assert format.num_bytes(shape) == sum(part.nbytes for part in parts)


def test_an_element_lies_where_the_format_says() -> None:
    """By the document's words alone, an element at a time."""
    values = trained(CHUNK + 700)
    for bits in BITS:
        format, (lower, *slices, dictionary, escapes, offsets) = pack(values, bits)
        num_before = 0
        for number, pattern in enumerate((bits_of(values).int() & 0xFFFF).tolist()):
            tile, within = divmod(number, 512)
            code = 0
            for packed, width in zip(slices, (4,) if bits == 4 else (2, 1), strict=True):
                group, lane = divmod(within, 64)
                vector, field = divmod(group, 8 // width)
                byte = int(packed[(tile * width + vector) * 64 + lane])
                code = code << width | byte >> field * width & (1 << width) - 1
            if number % 4096 == 0:
                assert int(offsets[number // 4096]) == num_before
            if code == 2**bits - 1:
                upper = int(escapes[num_before])
                num_before += 1
            else:
                upper = int(dictionary[code])
            assert upper << 8 | int(lower[number]) == pattern
        assert num_before == format.num_escapes == int(offsets[-1])


@pytest.mark.parametrize("decoder", DECODERS)
def test_outputs_are_streamed_or_not_with_the_same_bits(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores past the caches; and from an address that those cannot have."""
    monkeypatch.setattr(decoding, "STREAM_BYTES", 0)
    monkeypatch.setenv(store_mode.VARIABLE, "streamed")
    values = trained(9 * CHUNK + 333)
    for bits in BITS:
        format, parts = pack(values, bits)
        room = torch.zeros(values.numel() + 1, dtype=torch.bfloat16)
        for out in (room[:-1], room[1:]):
            DECODERS[decoder](format, parts, out)
            assert torch.equal(bits_of(out), bits_of(values))


@pytest.mark.parametrize("decoder", DECODERS)
def test_pieces_that_threads_take_in_turn_make_the_whole(
    decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = trained(7 * CHUNK + 5)
    whole = pack(values, 3)
    monkeypatch.setattr(lossless, "PIECE", 2 * CHUNK)
    monkeypatch.setattr(lossless_native, "NATIVE_PART", 2)
    monkeypatch.setattr(decoding, "_threads", decoding.Threads(3))
    format, parts = pack(values, 3)
    assert format == whole[0]
    assert all(torch.equal(a, b) for a, b in zip(parts, whole[1], strict=True))
    out = torch.empty_like(values)
    DECODERS[decoder](format, parts, out)
    assert torch.equal(bits_of(out), bits_of(values))


def test_other_dtypes_are_conversions() -> None:
    values = trained(CHUNK + 3)
    format, parts = pack(values)
    half = torch.empty(values.shape, dtype=torch.float16)
    format.by_torch(parts, half)
    assert torch.equal(half, values.half())


def test_the_most_frequent_bytes_are_in_the_dictionary() -> None:
    values = torch.tensor([1.0] * 300 + [-4.0] * 200 + [0.25]).bfloat16()
    format, parts = pack(values)
    assert format.num_escapes == 0
    assert parts[2][:3].tolist() == [0x3F, 0xC0, 0x3E]
    assert parts[2].numel() == 15


@pytest.mark.parametrize(("bits", "at_most"), [(4, 12.05), (3, 11.75)])
def test_trained_weights_take_the_bits_that_are_stated(bits: int, at_most: float) -> None:
    scales = torch.exp(0.3 * torch.randn(512, 1))
    values = (0.02 * scales * torch.randn(512, 1024)).bfloat16()
    made = encode(values, bits)
    assert made is not None
    format, parts = made
    per_weight = 8 * sum(part.nbytes for part in parts) / values.numel()
    assert 8 + bits < per_weight < at_most
    assert 8 * format.num_bytes(tuple(values.shape)) / values.numel() == per_weight


def test_what_gains_nothing_is_left_as_it_is() -> None:
    assert encode(every_pattern(1 << 17)) is None
    assert encode(torch.ones(64).bfloat16()) is None  # a tile of codes is longer
    assert encode(torch.ones(0).bfloat16()) is None
    assert encode(torch.ones(1024).bfloat16()) is not None


def test_strides_do_not_matter() -> None:
    values = trained(96 * 128).view(96, 128)
    turned = values.t()
    assert not turned.is_contiguous()
    format, parts = pack(turned)
    out = torch.empty(turned.shape, dtype=torch.bfloat16)
    format.by_torch(parts, out)
    assert torch.equal(out, turned)


# ------------------------------------------------------------------ damage


def outcome(
    decode: Decode, format: Lossless, parts: Sequence[torch.Tensor], size: int
) -> torch.Tensor | None:
    """What comes out; None where the parts are refused."""
    out = torch.zeros(size, dtype=torch.bfloat16)
    try:
        decode(format, parts, out)
    except DamagedError:
        return None
    return bits_of(out)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_code_that_becomes_an_escape_is_caught(decoder: str) -> None:
    values = trained(2 * CHUNK)
    format, parts = pack(values)
    found = next(at for at, byte in enumerate(parts[1].tolist()) if byte & 15 != 15)
    parts[1][found] |= 15
    with pytest.raises(DamagedError, match="damaged"):
        DECODERS[decoder](format, parts, torch.empty_like(values))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda offsets: offsets + 1, id="shifted up"),
        pytest.param(lambda offsets: offsets - 1, id="shifted down"),
        pytest.param(lambda offsets: offsets + torch.tensor([0, 1, 0]), id="one moved"),
        pytest.param(lambda offsets: offsets * 0 - 2**31, id="the least number"),
        pytest.param(lambda offsets: offsets.flip(0), id="backwards"),
        pytest.param(lambda offsets: offsets + 2**31 - 1, id="around the end of 32 bits"),
    ],
)
def test_offsets_that_lie_are_caught(
    change: Callable[[torch.Tensor], torch.Tensor], decoder: str
) -> None:
    values = trained(2 * CHUNK)
    format, parts = pack(values, 3)
    parts[-1] = change(parts[-1].long()).to(torch.int32)
    assert outcome(DECODERS[decoder], format, parts, values.numel()) is None


def test_nothing_after_the_end_is_an_escape() -> None:
    """Codes that fill up the last tile are not looked at."""
    values = trained(TILE + 3)
    format, parts = pack(values)
    packed = parts[1].view(2, 4, 64)
    packed[1, 0, 3:] |= 0x0F
    packed[1, 1:] = 0xFF
    for decode in DECODERS.values():
        found = outcome(decode, format, parts, len(values))
        assert found is not None
        assert torch.equal(found, bits_of(values))


def changed(parts: Sequence[torch.Tensor], dice: random.Random) -> list[torch.Tensor]:
    """One part with some bytes changed, or with nothing but random ones."""
    made = [part.clone() for part in parts]
    part = made[dice.choice([i for i, part in enumerate(made) if part.numel()])]
    raw = part.view(torch.uint8)
    count = raw.numel() if dice.random() < 0.3 else dice.randint(1, 3)
    for at in range(count) if count == raw.numel() else dice.choices(range(raw.numel()), k=count):
        raw[at] = dice.randrange(256)
    return made


@pytest.mark.skipif(library() is None, reason="there is no compiler here")
def test_all_paths_refuse_the_same_parts() -> None:
    dice = random.Random(1)
    num_refused = 0
    for trial in range(60):
        values = trained(dice.choice([1, 700, CHUNK, 2 * CHUNK + 50]))
        format, parts = pack(values, dice.choice(BITS))
        broken = changed(parts, dice)
        expected = outcome(by_torch, format, broken, len(values))
        num_refused += expected is None
        for name, decode in DECODERS.items():
            found = outcome(decode, format, broken, len(values))
            if found is None or expected is None:
                assert found is expected, (trial, name)
            else:
                assert torch.equal(found, expected), (trial, name)
    assert 10 < num_refused < 50  # both happen


class Guarded:
    """Memory between two pages that nobody may touch; tensors in it begin or end at one of them."""

    def __init__(self, num_bytes: int) -> None:
        page = mmap.PAGESIZE
        self._room = -(-num_bytes // page) * page
        self._map = mmap.mmap(-1, self._room + 2 * page)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + page
        for border in (self._start - page, self._start + self._room):
            failed = ctypes.CDLL(None, use_errno=True).mprotect(
                ctypes.c_void_p(border), ctypes.c_size_t(page), PROT_NONE
            )
            assert not failed

    def place(self, values: torch.Tensor, *, at_end: bool) -> torch.Tensor:
        """A copy."""
        if not values.numel():
            return values.clone()
        start = self._start + (self._room - values.nbytes if at_end else 0)
        raw = (ctypes.c_uint8 * values.nbytes).from_address(start)
        placed = torch.frombuffer(raw, dtype=values.dtype)
        placed.copy_(values)
        return placed


def decode_between_guards(seed: int, num_trials: int) -> None:
    """Whatever the parts hold; a byte read or written outside them ends the process."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    guards = [Guarded(4 * 5 * CHUNK) for _ in range(7)]
    for _ in range(num_trials):
        size = dice.choice([1, 64, 511, 512, 513, CHUNK, CHUNK + 1, 3 * CHUNK + 600])
        values = dice.choice(list(KINDS.values()))(size)
        format, parts = pack(values, dice.choice(BITS))
        is_whole, at_end = dice.random() < 0.2, dice.random() < 0.7
        given = parts if is_whole else changed(parts, dice)
        placed = [
            guard.place(part, at_end=at_end) for guard, part in zip(guards, given, strict=False)
        ]
        dtype = dice.choice([torch.bfloat16, torch.float32])
        out = guards[-1].place(torch.zeros(size, dtype=dtype), at_end=at_end)
        decoding.STREAM_BYTES = dice.choice([0, 1 << 20])
        for suffix in native_suffixes():
            try:
                decode_lossless(format, placed, out, suffix)
            except DamagedError:
                continue
            if is_whole:
                expected = values if dtype == torch.bfloat16 else widened(values)
                assert torch.equal(bits_of(out), bits_of(expected))


def exit_code_of(function: Callable[..., None], *arguments: object) -> int | None:
    """Of a process of its own: what it does wrong may end it. None after four minutes."""
    child = multiprocessing.get_context("spawn").Process(
        target=function, args=arguments, daemon=True
    )
    child.start()
    child.join(240)
    return child.exitcode


@pytest.mark.skipif(library() is None, reason="there is no compiler here")
def test_nothing_outside_is_read_or_written() -> None:
    assert exit_code_of(decode_between_guards, 7, 300) == 0


def test_a_tensor_whose_escapes_cannot_be_counted_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lossless, "MOST_ESCAPES", 10)
    with pytest.raises(ValueError, match="Write it as it is"):
        pack(every_pattern(4096))
    assert encode(every_pattern(4096)) is None
    assert pack(torch.ones(4096).bfloat16())[0].num_escapes == 0


# ------------------------------------------------------------------ the kernel for GPUs, interpreted


def check_kernel() -> None:
    """Where TRITON_INTERPRET is set before Triton is imported: what its own library is made of is interpreted too."""
    from ssdtune.kernels.lossless_triton import decode_lossless as by_triton

    for make, bits in itertools.product(KINDS.values(), BITS):
        for size in (1, 513, CHUNK, CHUNK + 700):
            values = make(size)
            format, parts = pack(values, bits)
            for expected in (values, widened(values)):
                out = torch.zeros(size, dtype=expected.dtype)
                by_triton(format, parts, out)
                assert torch.equal(bits_of(out), bits_of(expected)), (make, bits, size, out.dtype)
            half = torch.zeros(size, dtype=torch.float16)
            by_triton(format, parts, half)
            assert torch.equal(half.nan_to_num(5), values.half().nan_to_num(5)), (make, bits, size)
    values = many_exponents(2 * CHUNK)
    format, parts = pack(values, 3)
    *others, escapes, offsets = parts
    guard = Guarded(escapes.nbytes)
    for first in (-(2**31), -7, format.num_escapes - 7, 2**31 - 1):
        guarded = guard.place(escapes, at_end=first > 0)
        astray = [*others, guarded, torch.full_like(offsets, first)]
        by_triton(format, astray, torch.empty_like(values))


def test_the_kernel_has_every_bit_and_keeps_to_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert exit_code_of(check_kernel) == 0


# ------------------------------------------------------------------ the benchmark


def test_the_benchmark_measures_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_threads", decoding.Threads(1))
    (tmp_path / "model").mkdir()
    save_file(
        {"of_interest": trained(1 << 17).float(), "small": torch.ones(8)},
        tmp_path / "model" / "model.safetensors",
    )
    benchmark.main(["--megabytes", "1", "--rounds", "1", "--model", str(tmp_path / "model")])
    told = capsys.readouterr().out.splitlines()
    result = json.loads(told[-1])
    assert result["sizes"]["model"]["numel"] == 1 << 17
    for row in result["sizes"].values():
        assert row["bound"] < row["bits_a_weight"]["3"] < row["bits_a_weight"]["4"] < 12.2
    assert [row["contestant"] for row in result["times"]] == [
        "memcpy",
        *(f"{bits} bits, {name}" for bits in (4, 3) for name in decoder_names()),
    ]
    assert all(row["bytes_per_s"] > 0 for row in result["times"])
    assert sum(line.startswith("| 4 bits") for line in told) == len(DECODERS)


def decoder_names() -> list[str]:
    """As the benchmark calls them."""
    return [*(suffix[1:] for suffix in native_suffixes()), "torch"]
