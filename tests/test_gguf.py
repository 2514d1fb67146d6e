"""GGUF files read in place: ggml's equations element by element, its own package, and transformers' loader; a file that
does not hold together is refused by name."""

import importlib
import itertools
import math
import random
import struct
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers as tf

from ssdtune.kernels import decoding, ggml, ggml_moved, ggml_native, store_mode
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.ggml_moved import PairedRows
from ssdtune.kernels.native import library
from ssdtune.kernels.unpack import unpack
from ssdtune.swap import gguf as container
from ssdtune.swap.gguf import PACKED, PLAIN, Gguf, Omitted, open_gguf
from ssdtune.swap.header import CheckpointError, TensorEntry
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.gguf_config import gguf_config
from ssdtune.visit.gguf_names import hf_checkpoint
from ssdtune.visit.placement import fill, place

QUANTIZED = [kind for kind, described in KINDS.items() if described.block > 1]
NUMBERS = {kind: number for number, kind in (PACKED | PLAIN).items()}
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def package(name: str) -> types.ModuleType:
    """A library to compare with; skips where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported here: {error!r}")


def blocks_of(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    """Random bytes, uint8 [count, bytes of a block], all float16 in them small numbers."""
    made = np.random.default_rng(seed).integers(0, 256, (count, KINDS[kind].num_bytes), np.uint8)
    for at in HALVES[kind]:
        made[:, at + 1] = made[:, at + 1] & 0x83 | 0x20  # of any sign; float16 below 2^-4
    return torch.from_numpy(made)


# Where float16 numbers lie in a block.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "F32": (2,), "F16": (0,), "BF16": (0,),
}  # fmt: skip


def decoded(format: Format, blocks: torch.Tensor, out: torch.Tensor, suffix: str = "") -> Any:
    """`out`, filled."""
    unpack(format, [blocks.reshape(-1)], out, suffix=suffix)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


# ------------------------------------------------------- the equations, one element at a time


def half(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block[at : at + 2], np.float16)[0])


def nibble(block: bytes, at: int, run: int, i: int) -> int:
    """Element i of nibbles from `at` on: of each `run` bytes, the lower ones first."""
    byte = block[at + i // (2 * run) * run + i % run]
    return byte >> 4 if i // run % 2 else byte & 15


def six_bits(block: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum j of Q4_K and Q5_K."""
    s = block[4:16]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4


def bit(block: bytes, at: int, number: int) -> int:
    """Bit `number` of a word of many bytes."""
    return block[at + number // 8] >> number % 8 & 1


def element(kind: str, b: bytes, i: int) -> np.float32:  # noqa: C901 - a table
    """Element i of a block: every product and sum of float32 rounded, as ggml's C has it."""
    f = np.float32
    match kind:
        case "Q4_0":
            return f(nibble(b, 2, 16, i) - 8) * half(b, 0)
        case "Q4_1":
            return f(nibble(b, 4, 16, i)) * half(b, 0) + half(b, 2)
        case "Q5_0":
            return f((nibble(b, 6, 16, i) | bit(b, 2, i) << 4) - 16) * half(b, 0)
        case "Q5_1":
            return f(nibble(b, 8, 16, i) | bit(b, 4, i) << 4) * half(b, 0) + half(b, 2)
        case "Q8_0":
            return f(struct.unpack("b", b[2 + i : 3 + i])[0]) * half(b, 0)
        case "Q2_K":
            q = b[16 + i // 128 * 32 + i % 32] >> (i // 32 % 4 * 2) & 3
            scales = b[i // 16]
            return half(b, 80) * f(scales & 15) * f(q) - half(b, 82) * f(scales >> 4)
        case "Q3_K":
            q = b[32 + i // 128 * 32 + i % 32] >> (i // 32 % 4 * 2) & 3
            q -= 0 if b[i % 32] >> i // 32 & 1 else 4
            j = i // 16
            low = b[96 + j % 8] >> (j // 8 * 4) & 15
            high = b[104 + j % 4] >> (j // 4 * 2) & 3
            return half(b, 108) * f((low | high << 4) - 32) * f(q)
        case "Q4_K":
            scale, minimum = six_bits(b, i // 32)
            return half(b, 0) * f(scale) * f(nibble(b, 16, 32, i)) - half(b, 2) * f(minimum)
        case "Q5_K":
            scale, minimum = six_bits(b, i // 32)
            q = nibble(b, 48, 32, i) | (b[16 + i % 32] >> i // 32 & 1) << 4
            return half(b, 0) * f(scale) * f(q) - half(b, 2) * f(minimum)
        case "Q6_K":
            high = b[128 + i // 128 * 32 + i % 32] >> (i // 32 % 4 * 2) & 3
            scale = struct.unpack("b", b[192 + i // 16 : 193 + i // 16])[0]
            return half(b, 208) * f(scale) * f((nibble(b, 0, 64, i) | high << 4) - 32)
        case "IQ4_NL":
            return half(b, 0) * f(ggml.IQ4[nibble(b, 2, 16, i)])
        case "IQ4_XS":
            j = i // 32
            low = b[4 + j // 2] >> (j % 2 * 4) & 15
            high = struct.unpack("<H", b[2:4])[0] >> 2 * j & 3
            return half(b, 0) * f((low | high << 4) - 32) * f(ggml.IQ4[nibble(b, 8, 16, i)])
        case "MXFP4":
            e2m1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
            q = nibble(b, 1, 16, i)
            return f(math.ldexp(e2m1[q & 7] * (-1 if q & 8 else 1), b[0] - 127))
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_are_those_of_the_equations(kind: str) -> None:
    blocks = blocks_of(kind, 3)
    if kind == "MXFP4":
        blocks[:, 0] = torch.tensor([0, 1, 250])  # below float32's normal numbers, too
    expected = [
        element(kind, bytes(block.tolist()), i)
        for block in blocks
        for i in range(KINDS[kind].block)
    ]
    exact = torch.tensor(np.array(expected))
    assert exact.unique().numel() > 8
    for dtype in OUTPUTS:
        out = torch.full((exact.numel(),), math.nan, dtype=dtype)
        assert torch.equal(decoded(Ggml(kind), blocks, out), exact.to(dtype))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_are_those_of_the_package(kind: str) -> None:
    """Any bytes: scales that are no numbers stay so, all else has the same bits."""
    theirs = package("gguf.quants")
    types_ = package("gguf").GGMLQuantizationType
    for seed, make in itertools.product(range(3), (blocks_of, any_bytes)):
        blocks = make(kind, 40, seed=seed)
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(theirs.dequantize(blocks.numpy(), types_[kind]))
        found = decoded(Ggml(kind), blocks, torch.empty(expected.shape))
        is_number = ~expected.isnan()
        assert torch.equal(found.isnan(), ~is_number)
        assert same_bits(found[is_number], expected[is_number])


def any_bytes(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    made = np.random.default_rng(seed).integers(0, 256, (count, KINDS[kind].num_bytes), np.uint8)
    return torch.from_numpy(made)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_decoded_some_blocks_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = KINDS[kind].block
    blocks, out = blocks_of(kind, 11), torch.empty(11 * block)
    whole = decoded(Ggml(kind), blocks, out.clone())
    monkeypatch.setattr(ggml, "CHUNK", 3 * block)
    assert same_bits(decoded(Ggml(kind), blocks, out), whole)


def native_suffixes() -> list[str]:
    found = library()
    return [] if found is None else list(found.suffixes)


@pytest.mark.parametrize("suffix", native_suffixes())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_code_has_the_bits_of_its_definition(
    dtype: torch.dtype, kind: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles and less, several parts of a tensor, outputs that are stored past the caches, any bytes at all."""
    monkeypatch.setattr(ggml_native, "PART", 1024)
    monkeypatch.setenv(store_mode.VARIABLE, "streamed")
    block = KINDS[kind].block
    for count, make in itertools.product((1, 2, 7, 8, 41, 300), (blocks_of, any_bytes)):
        blocks = make(kind, count, seed=count)
        expected = decoded(Ggml(kind), blocks, torch.empty(count * block, dtype=dtype))
        for bound, offset in ((0, 0), (1 << 40, 0), (0, 4)):
            monkeypatch.setattr(decoding, "STREAM_BYTES", bound)
            room = torch.full((count * block + 8,), math.nan, dtype=dtype)
            found = room[offset : offset + count * block]
            decoded(Ggml(kind), blocks, found, suffix)
            assert room[offset + count * block :].isnan().all()
            # In float32, of what is no number only that it is none.
            numbers = ~expected.isnan() if dtype == torch.float32 else slice(None)
            assert torch.equal(found.isnan(), expected.isnan())
            assert same_bits(found[numbers], expected[numbers])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_values_may_lie_anywhere(kind: str) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    values = torch.randn(9).to(dtype)
    raw = torch.cat((torch.zeros(1, dtype=torch.uint8), values.view(torch.uint8)))
    assert torch.equal(decoded(Ggml(kind), raw[1:], torch.empty(9)), values.float())


@pytest.mark.parametrize(("kind", "shape"), [("Q4_0", (24, 64)), ("F16", (24, 64)), ("F32", (24,))])
def test_paired_rows_are_brought_apart(
    kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 2 i + j of a head is row i + 4 j; of a bias, too."""
    blocks = blocks_of(kind, math.prod(shape) // KINDS[kind].block)
    stored = decoded(Ggml(kind), blocks, torch.empty(shape))
    order = [head * 8 + 2 * i + j for head in range(3) for j in range(2) for i in range(4)]
    for chunk in (32, 2 * 8 * math.prod(shape[1:]), ggml_moved.CHUNK):
        monkeypatch.setattr(ggml_moved, "CHUNK", chunk)
        found = torch.empty(shape)
        PairedRows(Ggml(kind), 3).by_torch([blocks.reshape(-1)], found)
        assert torch.equal(found, stored[order])


def test_every_type_of_the_container_has_the_packages_size() -> None:
    constants = package("gguf.constants")
    known = {t.value: t.name for t in constants.GGMLQuantizationType}
    for number, kind in (PACKED | PLAIN | container.UNREAD).items():
        assert known[number] == kind
    for kind in KINDS:
        sizes = constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType[kind]]
        assert sizes == (KINDS[kind].block, KINDS[kind].num_bytes)


# --------------------------------------------------------------------------- the container

Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name: (type, torch's shape, bytes)
KEYS = {"general.architecture": "llama"}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def written_value(value: Any) -> bytes:
    """Type and value of a key."""
    match value:
        case bytes():
            return value
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Iq", 11, value)
        case float():
            return struct.pack("<Id", 12, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case list():
            elements = [written_value(v) for v in value]
            kind, rest = elements[0][:4], b"".join(element[4:] for element in elements)
            return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + rest
    raise AssertionError(value)


def contents(tensors: Tensors, keys: Mapping[str, Any], alignment: int = 32) -> bytes:
    """A GGUF file, by its description."""
    infos, blob = b"", b""
    for name, (kind, shape, raw) in tensors.items():
        blob += bytes(-len(blob) % alignment)
        infos += text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", NUMBERS[kind], len(blob))
        blob += raw
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(text(key) + written_value(value) for key, value in keys.items()) + infos
    return head + bytes(-len(head) % alignment) + blob + bytes(-len(blob) % alignment)


def write(path: Path, tensors: Tensors, keys: Mapping[str, Any] = KEYS, **more: Any) -> Path:
    path.write_bytes(contents(tensors, keys, **more))
    return path


def tensor(kind: str, *shape: int, seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    """A random one."""
    raw = blocks_of(kind, math.prod(shape) // KINDS[kind].block, seed)
    return kind, shape, raw.numpy().tobytes()


TWO = {"a.weight": tensor("Q4_0", 3, 64), "b.weight": tensor("F32", 5)}


def test_tensors_are_where_the_file_says(tmp_path: Path) -> None:
    tensors = {kind: tensor(kind, 2, 256, seed=i) for i, kind in enumerate(KINDS)}
    path = write(tmp_path / "m.gguf", tensors)
    raw, gguf = path.read_bytes(), open_gguf(path)
    assert list(gguf.tensors) == list(KINDS)
    for kind, entry in gguf.tensors.items():
        [part] = entry.parts if isinstance(entry, PackedEntry) else [entry]
        assert raw[part.start : part.stop] == tensors[kind][2]
        assert (entry.name, entry.shape) == (kind, (2, 256))
        if isinstance(entry, PackedEntry):
            assert entry.format == Ggml(kind)
            assert (part.dtype, part.shape) == ("U8", (len(tensors[kind][2]),))
        else:
            assert entry.dtype == kind
    assert gguf.files == (path,)
    assert gguf.states[0].num_bytes == len(raw)


def test_values_of_keys_are_read(tmp_path: Path) -> None:
    keys = {
        "general.architecture": "llama",
        "general.alignment": 64,
        "yes": True,
        "some": [1, 2, 3],
        "half": 0.5,
        "words": ["a", "ü"],
        "many": ["token"] * (container.MAX_KEPT + 1),
        "scores": [0.5] * (container.MAX_KEPT + 1),
        "last": -1,
    }
    gguf = open_gguf(write(tmp_path / "m.gguf", TWO, keys, alignment=64))
    expected = keys | {"some": (1, 2, 3), "words": ("a", "ü")}
    expected |= dict.fromkeys(("many", "scores"), Omitted(container.MAX_KEPT + 1))
    assert gguf.metadata == expected
    assert len(gguf.metadata["many"]) == container.MAX_KEPT + 1  # type: ignore[arg-type]
    assert gguf.architecture == "llama"


def test_a_file_of_the_package_is_read(tmp_path: Path) -> None:
    """All its types of values; a header that is read in many pieces."""
    theirs = package("gguf")
    writer = theirs.GGUFWriter(tmp_path / "m.gguf", "llama")
    numbers = {
        "uint8": 3,
        "int8": -3,
        "uint16": 4,
        "int16": -4,
        "uint32": 5,
        "int32": -5,
        "uint64": 6,
        "int64": -6,
    }
    for kind, number in numbers.items():
        getattr(writer, f"add_{kind}")(kind, number)
    writer.add_float32("float32", 0.25)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("tokens", ["x" * i for i in range(2000)])
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("w", values)
    quantized = theirs.quants.quantize(values, theirs.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantized, raw_dtype=theirs.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf = open_gguf(tmp_path / "m.gguf")
    assert {kind: gguf.metadata[kind] for kind in numbers} == numbers
    assert [gguf.metadata[key] for key in ("float32", "float64", "bool")] == [0.25, 0.1, True]
    assert gguf.metadata["tokens"] == Omitted(2000)
    assert {name: entry.shape for name, entry in gguf.tensors.items()} == {
        "w": (2, 32),
        "q": (2, 32),
    }
    found = values_of(gguf, "q")
    assert torch.equal(
        found, torch.from_numpy(theirs.dequantize(quantized, theirs.GGMLQuantizationType.Q8_0))
    )


def values_of(gguf: Gguf, name: str) -> torch.Tensor:
    return read_entry(gguf.tensors[name])


def read_entry(entry: TensorEntry | PackedEntry) -> torch.Tensor:
    """The values that an entry stands for, float32."""
    parts = entry.parts if isinstance(entry, PackedEntry) else [entry]
    raw = [read_part(part) for part in parts]
    if isinstance(entry, PackedEntry):
        out = torch.empty(entry.shape)
        unpack(entry.format, raw, out)
        return out
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.dtype]
    return raw[0].view(dtype).view(entry.shape).float()


def read_part(part: TensorEntry) -> torch.Tensor:
    """Its bytes."""
    with part.path.open("rb") as file:
        file.seek(part.start)
        return torch.frombuffer(bytearray(file.read(part.num_bytes)), dtype=torch.uint8)


def info(name: str, sizes: tuple[int, ...], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


def broken(
    infos: bytes, num_tensors: int, data: int, keys: bytes = b"", num_keys: int = 0
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + infos
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**62
BROKEN = {
    "empty": (b"", "too short"),
    "not a GGUF file": (b"GGML" + bytes(40), "does not begin with"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "more tensors than any model": (broken(b"", HUGE, 0), "tensors; 1,000,000 is the limit"),
    "more keys than any model": (broken(b"", 0, 0, num_keys=HUGE), "keys; 4,096 is the limit"),
    "more tensors than there are": (broken(b"", 3, 0), "cut short"),
    "a long key": (broken(b"", 0, 0, struct.pack("<Q", HUGE), 1), "a key takes 4,611"),
    "a key that is no text": (broken(b"", 0, 0, struct.pack("<Q", 2) + b"\xff\xfe", 1), "not UTF-8"),
    "a key twice": (broken(b"", 0, 0, (text("k") + written_value(1)) * 2, 2), '"k" appears twice'),
    "a value of no type": (broken(b"", 0, 0, text("k") + struct.pack("<I", 13), 1), "unknown type 13"),
    "a truth of two": (broken(b"", 0, 0, text("k") + struct.pack("<IB", 7, 2), 1), "neither true"),
    "a long value": (broken(b"", 0, 0, text("k") + struct.pack("<IQ", 8, HUGE), 1), 'of "k" takes'),
    "nested arrays": (broken(b"", 0, 0, text("k") + struct.pack("<IIQ", 9, 9, 1), 1), "array of arrays"),
    "an array of no type": (broken(b"", 0, 0, text("k") + struct.pack("<IIQ", 9, 99, 5000), 1), "unknown type 99"),
    "a long array": (broken(b"", 0, 0, text("k") + struct.pack("<IIQ", 9, 4, HUGE), 1), "elements; 4,194,304 is"),
    "an array past the end": (broken(b"", 0, 0, text("k") + struct.pack("<IIQ", 9, 4, 5000), 1), "cut short"),
    "strings past the end": (
        broken(b"", 0, 64, text("k") + struct.pack("<IIQQ", 9, 8, 5000, HUGE), 1), "cut short",
    ),
    "alignment of 24": (broken(b"", 0, 0, text("general.alignment") + written_value(24), 1), "power of two"),
    "alignment in words": (broken(b"", 0, 0, text("general.alignment") + written_value("x"), 1), "power of two"),
    "a long name": (broken(struct.pack("<Q", 5000), 1, 0), "the name of a tensor takes"),
    "no dimension": (broken(info("t", (), 0, 0), 1, 32), '"t": it has 0 dimensions'),
    "five dimensions": (broken(info("t", (1,) * 5, 0, 0), 1, 32), "it has 5 dimensions"),
    "an empty dimension": (broken(info("t", (4, 0), 0, 0), 1, 32), "no shape of a weight"),
    "a huge shape": (broken(info("t", (HUGE, HUGE), 0, 0), 1, 32), "no shape of a weight"),
    "a type that is not read": (broken(info("t", (256,), 16, 0), 1, 96), "it is IQ2_XXS; Q4_0"),
    "a type that does not exist": (broken(info("t", (256,), 99, 0), 1, 96), "unknown type 99"),
    "half a block": (broken(info("t", (48, 2), 2, 0), 1, 64), "row of 48 elements is not whole blocks of Q4_0"),
    "a name twice": (broken(info("t", (8,), 0, 0) + info("t", (8,), 0, 32), 2, 64), '"t": it is there twice'),
    "an overlap": (broken(info("t", (16,), 0, 0) + info("u", (8,), 0, 32), 2, 96), '"u": it overlaps'),
    "crooked": (broken(info("t", (9,), 0, 0) + info("u", (8,), 0, 40), 2, 96), "no multiple of 32"),
    "a hole": (broken(info("t", (8,), 0, 0) + info("u", (8,), 0, 64), 2, 96), "32 bytes before it belong"),
    "a hole at the beginning": (broken(info("t", (8,), 0, 32), 1, 64), "32 bytes before it belong"),
    "an offset past all": (broken(info("t", (8,), 0, 2**64 - 32), 1, 32), "bytes before it belong"),
    "cut short": (broken(info("t", (16,), 0, 0), 1, 63), "cut short"),
    "more than tensors": (broken(info("t", (16,), 0, 0), 1, 65), "1 bytes after the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_hold_together_is_refused(tmp_path: Path, case: str) -> None:
    raw, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as refused:
        open_gguf(path)
    assert message in str(refused.value)
    assert "broken.gguf" in str(refused.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    keys = KEYS | {"words": ["a", "b"], "numbers": [1, 2], "many": ["t"] * 1100}
    raw = contents(TWO, keys)
    end = len(raw) - 12  # of the last tensor, which fills 20 of 32 bytes
    for length in range(0, end, 61):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            open_gguf(path)
    path.write_bytes(raw[:end])
    assert len(open_gguf(path).tensors) == 2


def test_damaged_headers_are_refused_or_read(tmp_path: Path) -> None:
    """No byte of a header makes anything else than a message or a model."""
    raw = bytearray(contents(TWO, KEYS | {"words": ["a", "b"], "numbers": [1, 2]}))
    path, choose = tmp_path / "m.gguf", random.Random(0)
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(choose.choice((1, 1, 2))):
            damaged[choose.randrange(len(raw) - 128)] = choose.choice(
                (0, 1, 127, 255, choose.randrange(256))
            )
        path.write_bytes(damaged)
        try:
            gguf = open_gguf(path)
        except CheckpointError:
            continue
        assert all(e.num_bytes <= len(raw) for e in gguf.tensors.values())


# ------------------------------------------------------------------------- models in parts


def parts(folder: Path, count: int = 3, **changed: Any) -> list[Path]:
    """A model of `count` files, with one tensor in each but the first. changed: keys of the last one."""
    made = []
    for i in range(count):
        keys = {"split.no": i, "split.count": count, "split.tensors.count": count - 1}
        keys = {**(KEYS if i == 0 else {}), **keys, **(changed if i == count - 1 else {})}
        tensors = {f"t{i}": tensor("Q8_0", 2, 32, seed=i)} if i else {}
        made.append(write(folder / f"model-{i + 1:05d}-of-{count:05d}.gguf", tensors, keys))
    return made


def test_a_model_in_parts_is_read_as_one(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    for path in paths:
        gguf = open_gguf(path)
        assert gguf.path == paths[0]
        assert gguf.files == tuple(paths)
        assert gguf.architecture == "llama"
        assert {name: entry.path for name, entry in gguf.tensors.items()} == {
            "t1": paths[1],
            "t2": paths[2],
        }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split.no": 1}, "it says that it is part 2 of 3, its name that it is part 3 of 3"),
        ({"split.count": 4}, "it says that it is part 3 of 4"),
        ({"split.no": "x"}, "split.no is"),
        ({"split.no": -1}, "split.no is -1"),
    ],
)
def test_parts_that_contradict_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    first, *_, last = parts(tmp_path, **changed)
    with pytest.raises(CheckpointError) as refused:
        open_gguf(first)
    assert message in str(refused.value)
    assert last.name in str(refused.value)


def test_a_part_that_is_missing_or_misnamed_is_refused(tmp_path: Path) -> None:
    first, second, third = parts(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_gguf(first)
    write(second, {"t2": tensor("F32", 2)}, {"split.no": 1, "split.count": 3})
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.*has it too"):
        open_gguf(first)
    write(second, {}, {"split.no": 1, "split.count": 3})
    with pytest.raises(CheckpointError, match="2 tensors, its parts 1"):
        open_gguf(first)
    with pytest.raises(CheckpointError, match="not named so that"):
        open_gguf(third.rename(tmp_path / "other.gguf"))


# ----------------------------------------------------------------------------- names, values

ARCHITECTURES = {
    "llama": lambda: tiny_models.small(tf.LlamaConfig),
    "mistral": lambda: tiny_models.small(tf.MistralConfig, head_dim=16),
    "qwen2": lambda: tiny_models.small(tf.Qwen2Config, tie_word_embeddings=True),
    "qwen3": lambda: tiny_models.small(tf.Qwen3Config, head_dim=32),
    "phi3": lambda: tiny_models.small(tf.Phi3Config),
    "qwen2_moe": lambda: tiny_models.small(
        tf.Qwen2MoeConfig, shared_expert_intermediate_size=64, **tiny_models.EXPERTS
    ),
    "qwen3_moe": lambda: tiny_models.small(
        tf.Qwen3MoeConfig, head_dim=16, norm_topk_prob=True, **tiny_models.EXPERTS
    ),
    "mixtral": lambda: tiny_models.small(tf.MixtralConfig, head_dim=16, num_local_experts=4),
    "gemma": lambda: tiny_models.small(tf.GemmaConfig, head_dim=16),
    "gemma2": lambda: tiny_models.small(tf.Gemma2Config, head_dim=16),
    "gemma3": lambda: tiny_models.small(tf.Gemma3TextConfig, head_dim=16, **tiny_models.SLIDING),
}
UNTOLD = ("gemma2", "gemma3")  # whose files do not say all of the config
GGUF_NAMES = {
    "mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3",
}  # fmt: skip
SANDWICHED = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
LLAMA_LEAVES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
HEAD_LEAVES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_tensors(model: tf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors as llama.cpp's converter names and moves them; written from its description."""
    config, made = model.config, {}
    leaves = {leaf: name for name, leaf in LLAMA_LEAVES.items()} | {"mlp.gate_up_proj": "ffn_up"}
    is_gemma = config.model_type.startswith("gemma")
    if is_gemma and config.model_type != "gemma":
        leaves |= SANDWICHED
    for name, held in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = held + 1 if is_gemma and name.endswith("norm.weight") else held
        base, _, suffix = name.rpartition(".")
        if base in HEAD_LEAVES:
            made[f"{HEAD_LEAVES[base]}.{suffix}"] = value
            continue
        layer, leaf = base.removeprefix("model.layers.").split(".", 1)
        if leaf == "mlp.experts":
            halves = value.chunk(2, dim=1) if suffix == "gate_up_proj" else (value,)
            kinds = ("gate", "up") if suffix == "gate_up_proj" else ("down",)
            for kind, stacked in zip(kinds, halves, strict=True):
                made[f"blk.{layer}.ffn_{kind}_exps.weight"] = stacked
            continue
        stored = value.squeeze(0) if leaf == "mlp.shared_expert_gate" else value
        if config.model_type in ("llama", "mistral", "mixtral") and leaf[10:] in (
            "q_proj",
            "k_proj",
        ):
            heads = config.num_attention_heads if leaf[10] == "q" else config.num_key_value_heads
            stored = stored.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(stored.shape)
        made[f"blk.{layer}.{leaves[leaf]}.{suffix}"] = stored
    return made


def gguf_keys(config: tf.PretrainedConfig, **more: Any) -> dict[str, Any]:
    """A config's values as llama.cpp's converter writes them."""
    name = GGUF_NAMES.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": config.rope_parameters.get("rope_theta"),
        "vocab_size": config.vocab_size,
    }
    for key, value in (
        ("expert_count", "num_experts"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if hasattr(config, value):
            keys[key] = getattr(config, value)
    named = {f"{name}.{key}": value for key, value in (keys | more).items() if value is not None}
    ids = {"bos": 1, "eos": 2, "padding": 0}
    tokens = {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
    return {"general.architecture": name, "general.name": "tiny", **named, **tokens}


def quantized(name: str, value: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Random bytes of a type that the rows allow: of every layer another; norms and biases in float32."""
    kinds = ("Q8_0", "Q4_0", "Q5_1", "F16", "IQ4_NL", "BF16")
    seed = sum(name.encode())
    kind = kinds[seed % len(kinds)] if value.ndim > 1 and value.shape[-1] % 32 == 0 else "F32"
    if kind == "F32":
        return kind, tuple(value.shape), value.float().numpy().tobytes()
    return tensor(kind, *value.shape, seed=seed)


def saved(folder: Path, name: str, **more: Any) -> tuple[Path, tf.PreTrainedModel]:
    """A GGUF file of a tiny model, weights in many types; the model has other values."""
    config = ARCHITECTURES[name]()
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms: nothing that one more would round
                parameter.add_(torch.randint(-512, 512, parameter.shape) / 1024)
    tensors = {name: quantized(name, value) for name, value in gguf_tensors(model).items()}
    return write(folder / "m.gguf", tensors, gguf_keys(config, **more)), model


def placed(gguf: Gguf, config: tf.PretrainedConfig, model_class: Any) -> dict[str, torch.Tensor]:
    """All parameters as their placements fill them, float32."""
    checkpoint = hf_checkpoint(gguf, config, model_class)
    names = [
        p.name for e in checkpoint.tensors.values() if isinstance(e, PackedEntry) for p in e.parts
    ]
    assert len(set(names)) == len(names)
    with torch.device("meta"):
        meta = model_class(config)
    placements = place(meta, checkpoint.tensors)
    assert not placements.unused
    made = {}
    for name, placement in placements.items():
        made[name] = torch.full(placement.shape, math.nan)
        fill(placement, lambda source: read_entry(checkpoint.tensors[source]), made[name])
    return made


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name not in ("mistral", "mixtral", "gemma")]
)
def test_weights_are_those_that_transformers_loads(tmp_path: Path, name: str) -> None:
    """Mistral's and Mixtral's are in files that say llama, which transformers takes for one; it reads no first Gemma."""
    package("gguf")
    path, model = saved(tmp_path, name)
    theirs = type(model).from_pretrained(
        tmp_path,
        config=model.config,
        gguf_file=path.name,
        quantization_config=tf.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    expected = theirs.state_dict()
    found = placed(open_gguf(path), model.config, type(model))
    for parameter, value in found.items():
        assert torch.equal(value, expected[parameter]), parameter
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert found.keys() == expected.keys() - tied


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    """Without another loader: the model's own values, in float32."""
    package("gguf")
    path, model = saved(tmp_path, name)
    plain = {
        name: ("F32", tuple(value.shape), value.numpy().tobytes())
        for name, value in gguf_tensors(model).items()
    }
    write(path, plain, gguf_keys(model.config))
    found = placed(open_gguf(path), model.config, type(model))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert len(found) == len(expected) - model.config.tie_word_embeddings


def test_parameters_have_the_dtype_of_the_config(tmp_path: Path) -> None:
    package("gguf")
    path, model = saved(tmp_path, "llama")
    for dtype, stored in ((torch.float16, "F16"), (torch.bfloat16, "BF16"), (None, "BF16")):
        model.config.dtype = dtype
        checkpoint = hf_checkpoint(open_gguf(path), model.config, type(model))
        packed = [e for e in checkpoint.tensors.values() if isinstance(e, PackedEntry)]
        assert {e.dtype for e in packed if isinstance(e.format, Ggml)} == {stored}


def test_a_checkpoint_notices_that_the_file_was_changed(tmp_path: Path) -> None:
    package("gguf")
    path, model = saved(tmp_path, "llama")
    checkpoint = hf_checkpoint(open_gguf(path), model.config, type(model))
    checkpoint.check_unchanged()
    before = checkpoint.fingerprint()
    path.write_bytes(path.read_bytes() + bytes(1))
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        checkpoint.check_unchanged()
    assert checkpoint.fingerprint() == before  # of the state that was read


# --------------------------------------------------------------------------------- the config


@pytest.mark.parametrize("name", UNTOLD)
def test_a_file_that_does_not_say_all_of_the_config_is_refused(tmp_path: Path, name: str) -> None:
    path, _ = saved(tmp_path, name)
    with pytest.raises(CheckpointError, match=r"what queries are divided by.*\n.*config="):
        gguf_config(open_gguf(path))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in UNTOLD])
def test_the_config_is_that_of_the_model(tmp_path: Path, name: str) -> None:
    path, model = saved(tmp_path, name)
    found, expected = gguf_config(open_gguf(path)), model.config
    assert found.dtype == torch.bfloat16
    compared = set(expected.to_dict()) - {"dtype", "architectures", "use_cache", "transformers_version"}  # fmt: skip
    if name == "mistral":  # the file says llama; Mistral's layers are the same
        compared &= set(found.to_dict()) - {"model_type"}
    assert {key: getattr(found, key) for key in compared} == {
        key: getattr(expected, key) for key in compared
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_the_config_is_what_transformers_reads(tmp_path: Path, name: str) -> None:
    """But for what it leaves out: the dtype, and heads' columns that are what they would be by default."""
    package("gguf")
    path, _ = saved(tmp_path, name)
    theirs = tf.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    ours = gguf_config(open_gguf(path)).to_dict()
    differ = {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)}
    known = {"dtype", "_name_or_path", "_model_name_or_path", "unk_token_id"}
    known |= {
        "qwen2": {"head_dim"},
        "qwen3": {"head_dim"},
        "qwen3_moe": {"moe_intermediate_size"},
    }.get(name, set())
    assert differ <= known


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)  # fmt: skip
def test_the_dtype_is_that_of_the_matrices(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    tensors = {"token_embd.weight": tensor(kind, 199, 64), "output_norm.weight": tensor("F32", 64)}
    path = write(tmp_path / "m.gguf", tensors, gguf_keys(ARCHITECTURES["llama"]()))
    assert gguf_config(open_gguf(path)).dtype == dtype


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_table(**changed: float) -> torch.Tensor:
    """By what transformers divides the frequencies of Llama 3.1: its own function, against plain rotations."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, **changed}
    config = tiny_models.small(tf.LlamaConfig, head_dim=64, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return 1 / 5e5 ** (torch.arange(0, 64, 2) / 64) / scaled


def llama3(folder: Path, table: torch.Tensor, **more: Any) -> tuple[Path, tf.PretrainedConfig]:
    """A file with scaled rotations; and the config with plain ones."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = tiny_models.small(tf.LlamaConfig, head_dim=64, rope_parameters=rope)
    tensors = {
        "rope_freqs.weight": ("F32", (table.numel(),), table.float().numpy().tobytes()),
        "token_embd.weight": tensor("Q8_0", 199, 64),
    }
    return write(folder / "m.gguf", tensors, gguf_keys(config, **more)), config


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rotations_of_llama_3_are_recognised(tmp_path: Path, factor: float) -> None:
    table = rope_table(factor=factor)
    assert table.unique().numel() > 3  # some between one and the factor
    path, plain = llama3(tmp_path, table)
    gguf = open_gguf(path)
    config = gguf_config(gguf)
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": pytest.approx(factor)}
    assert config.rope_parameters == LLAMA3 | scaled
    package("gguf")
    assert "rope_freqs.weight" not in hf_checkpoint(gguf, config, tf.LlamaForCausalLM).tensors
    with pytest.raises(CheckpointError, match="the config says that they are not scaled"):
        hf_checkpoint(gguf, plain, tf.LlamaForCausalLM)


@pytest.mark.parametrize(
    "changed", [{"high_freq_factor": 3.0}, {"original_max_position_embeddings": 4096}]
)
def test_rotations_scaled_otherwise_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    path, _ = llama3(tmp_path, rope_table(**changed))
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        gguf_config(open_gguf(path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_count": None}, "llama.block_count is None, not a number"),
        ({"attention.head_count": [4, 4]}, r"head_count is \(4, 4\), not a number"),
        ({"attention.layer_norm_rms_epsilon": math.nan}, "epsilon is nan"),
        ({"embedding_length": 0}, "embedding_length is 0"),
        ({"rope.dimension_count": 8}, "rotates 8 of 16 columns"),
        ({"rope.scaling.type": "yarn"}, 'scaled by "yarn"'),
    ],
)
def test_keys_that_make_no_config_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path, _ = saved(tmp_path, "llama", **changed)
    with pytest.raises(CheckpointError, match=message):
        gguf_config(open_gguf(path))


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nemotron", "adds one to the weights of norms"),
        ("mamba", "A_log"),
        ("falcon", 'its architecture is "falcon"; llama'),
        ("", 'its architecture is ""'),
    ],
)
def test_an_architecture_that_is_not_read_is_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    gguf = open_gguf(write(tmp_path / "m.gguf", TWO, {"general.architecture": name}))
    for use in (gguf_config, lambda g: hf_checkpoint(g, tf.LlamaConfig(), tf.LlamaForCausalLM)):
        with pytest.raises(CheckpointError) as refused:
            use(gguf)
        assert message in str(refused.value)
        assert "m.gguf" in str(refused.value)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, "llama")
    other = ARCHITECTURES["qwen2"]()
    with pytest.raises(CheckpointError, match='"llama", the config is of a "qwen2"'):
        hf_checkpoint(open_gguf(path), other, tf.Qwen2ForCausalLM)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.attn_q.bias", (64,), "LlamaForCausalLM has no place for it"),
        ("blk.4.ffn_up.weight", (128, 64), "has no place for it"),
        ("blk.0.ffn_up_exps.weight", (2, 32, 64), "has no place for it"),
        ("blk.0.attn_k.weight", (34, 64), "34 rows are not 2 heads of pairs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    package("gguf")
    config = ARCHITECTURES["llama"]()
    path = write(tmp_path / "m.gguf", {name: tensor("F32", *shape)}, gguf_keys(config))
    with pytest.raises(CheckpointError, match=message) as refused:
        hf_checkpoint(open_gguf(path), config, tf.LlamaForCausalLM)
    assert name in str(refused.value)


# ------------------------------------------------------------------------------ a real model


@pytest.mark.slow
def test_smollm_is_what_transformers_loads(tmp_path: Path) -> None:
    package("gguf")
    from ssdtune.assets import AssetError, fetch_gguf

    try:
        path = fetch_gguf(tmp_path)
    except AssetError as error:
        pytest.skip(f"the model cannot be had here: {error}")
    gguf = open_gguf(path)
    found = placed(gguf, gguf_config(gguf), tf.LlamaForCausalLM)
    theirs = tf.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=tf.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    expected = theirs.state_dict()
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
