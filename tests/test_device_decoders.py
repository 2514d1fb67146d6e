"""Kernels for what other libraries quantized, under Triton's interpreter: the bits of the definitions. (On a GPU:
tests/test_cuda.py.)
"""

import itertools

import pytest
import test_foreign
import torch
from test_gguf import any_bytes, blocks_of
from test_unpack_triton import compiled_for, interpreted  # noqa: F401 - a fixture, for this module too

from ssdtune.kernels import scaled_rows
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.integers import GPTQ_BITS, Awq, Gptq, PackQuantized
from ssdtune.kernels.unpack import TRITON, unpack

pytest.importorskip("triton")
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
KERNELS = [kind for kind, found in KINDS.items() if found.block > 1]
FORMATS: list[Format] = [
    *(Gptq(bits, 96, is_ordered=is_ordered) for bits in GPTQ_BITS for is_ordered in (False, True)),
    Gptq(4, 128, is_v1=False),
    Gptq(4, 136),
    Awq(96),
    Awq(100),
    *(PackQuantized(bits, 96, has_zeros=bits % 2 == 0) for bits in range(1, 9)),
    PackQuantized(4, 32, is_ordered=True),
    ScaledBytes((32, 128)),
    ScaledBytes((32, 64)),
    ScaledBytes((128, 32)),
    ScaledBytes((1, 136), codes="I8", scale="BF16"),
    ScaledBytes((8, 32), codes="I8", has_zeros=True),
    ScaledBytes((72, 7), scale="E8M0"),
]


def assert_decoded(
    format: Format,
    parts: list[torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    placed: list[torch.Tensor] | None = None,
) -> None:
    """Bit for bit; of what is no number that it is none. Nothing beside the output is written.

    placed: the parts where the kernel shall read them, if not where they are."""
    expected = torch.empty(shape, dtype=dtype)
    room = torch.full((expected.numel() + 64,), 7.0, dtype=dtype)
    found = room[32:-32].view(shape)
    format.by_torch(parts, expected)
    unpack(format, placed or parts, found, suffix=TRITON)
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~is_number)
    kind = BITS[dtype]
    assert torch.equal(found[is_number].view(kind), expected[is_number].view(kind))
    assert room[:32].eq(7).all()
    assert room[-32:].eq(7).all()


SHAPE = (72, 136)  # several tiles of rows and columns, the last ones not whole
CASES = list(zip(FORMATS, itertools.cycle(BITS), strict=False))


def random_parts(format: Format, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Any codes; among scales, one that is no number and one that is not finite."""
    parts = []
    for part in format.parts(shape):
        if part.suffix.endswith("g_idx"):
            num_groups = -(-shape[1] // format.group)  # type: ignore[attr-defined]
            parts.append(test_foreign.integers_below(num_groups, shape[1]).to(torch.int32))
        elif part.dtype == "U8":
            parts.append(test_foreign.integers_below(256, *part.shape).to(torch.uint8))
        else:
            parts.append(test_foreign.random_part(part, shape[1]))
    return parts


@pytest.mark.parametrize(("format", "dtype"), CASES, ids=str)
def test_rows_of_codes(format: Format, dtype: torch.dtype) -> None:
    assert_decoded(format, random_parts(format, SHAPE), SHAPE, dtype)


def test_matrices_of_experts_each_have_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """And few rows' scales are brought to float32 at a time."""
    monkeypatch.setattr(scaled_rows, "NUM_SCALES", 64)
    format, shape = ScaledBytes((16, 32), scale="F32"), (2, 40, 48)
    parts = [test_foreign.random_part(part, 48) for part in format.parts(shape)]
    assert_decoded(format, parts, shape, torch.bfloat16)


def test_a_column_in_no_group_reads_nothing_outside() -> None:
    """A host that looked would wait for the device; columns in known groups come out right."""
    format, shape = Gptq(4, 32, is_ordered=True), (8, 64)
    parts = [test_foreign.random_part(part, 64) for part in format.parts(shape)]
    parts[-1] = torch.arange(64, dtype=torch.int32) % 2
    expected, found = torch.empty(shape), torch.empty(shape)
    format.by_torch(parts, expected)
    parts[-1][5], parts[-1][6] = 1 << 30, -1
    unpack(format, parts, found, suffix=TRITON)
    known = [i for i in range(64) if i not in (5, 6)]
    assert torch.equal(found[:, known].nan_to_num(), expected[:, known].nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KERNELS)
def test_blocks_of_ggml(kind: str, dtype: torch.dtype) -> None:
    """Less than a program's chunks and more; any bytes at all; at any address."""
    for count, make in ((1, any_bytes), (9, any_bytes), (150, blocks_of)):
        blocks = make(kind, count, seed=count).reshape(-1)
        odd = torch.cat((blocks.new_zeros(1), blocks))[1:]
        shape = (count * KINDS[kind].block,)
        assert_decoded(Ggml(kind), [blocks], shape, dtype, [odd])


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "IQ4_XS", "MXFP4"])
def test_blocks_of_ggml_to_float16(kind: str) -> None:
    blocks = any_bytes(kind, 9).reshape(-1)
    assert_decoded(Ggml(kind), [blocks], (9 * KINDS[kind].block,), torch.float16)


def test_plain_floats_of_ggml_are_decoded_too_and_all_others_by_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    plain = Ggml.by_torch
    blocks = {kind: blocks_of(kind, 3).reshape(-1) for kind in ("BF16", *KERNELS)}
    monkeypatch.setattr(
        Ggml, "by_torch", lambda self, *given: (seen.append(self.kind), plain(self, *given))
    )
    for kind, stored in blocks.items():
        out = torch.empty(3 * KINDS[kind].block)
        unpack(Ggml(kind), [stored], out, suffix=TRITON)
    assert seen == ["BF16"]


# ------------------------------------------------------------------ compiled

LAUNCHES = """
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.integers import Awq, Gptq, PackQuantized
from ssdtune.kernels.nibbles import E2M1, NF4, NestedNibbles, Nibbles, Nvfp4
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.unpack import TRITON, unpack
from ssdtune.visit.placement import FILE_DTYPES

out = torch.empty(128, 512, dtype=torch.bfloat16)


def parts(format):
    return [torch.zeros(p.shape, dtype=FILE_DTYPES[p.dtype]) for p in format.parts(out.shape)]


results = {}
for format in (
    Gptq(4, 128), Gptq(3, 128, is_ordered=True), Awq(128), PackQuantized(3, 100), ScaledBytes((128, 128)),
    *(Ggml(kind) for kind, found in KINDS.items() if found.block > 1),
    Rotated(Affine(4, (4,), 128)), Nibbles(E2M1, 16, False, "UE5M3"), Affine(8, (4, 1, 1, 2)),
    NestedNibbles(NF4, 64, 256, 0.01), Nvfp4(is_divided=False),
):
    seen.clear()
    unpack(format, parts(format), out, suffix=TRITON)
    results[format.label] = dict(seen)
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: str(t[1])
)
def test_kernels_compile_for_devices_that_are_not_here(
    target: tuple[str, int | str, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And nothing is fused."""
    compiled = compiled_for(target, LAUNCHES, tmp_path_factory)
    assert len(compiled) == 23
    for name, kernels in compiled.items():
        assert kernels, name
        for seen in kernels.values():
            assert not [op for op in seen if op.startswith("fma")], name
