"""Kernels that decode packed tensors, under Triton's interpreter: the bits of the formats' definitions.

That they also compile for devices that are not here is checked in a process of its own, which asks for no interpreter.
(On a GPU: tests/test_cuda.py.)
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pairs
import pytest
import torch

from ssdtune import kernels
from ssdtune.kernels import noise
from ssdtune.kernels.affine import ORDERS, TILE, Affine, widths
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import E2M1, NF4, SCALE_DTYPES, NestedNibbles, Nibbles, Nvfp4
from ssdtune.kernels.noise import GAUSSIAN, RADEMACHER, Direction
from ssdtune.kernels.requantize import requantize
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.unpack import TRITON, unpack
from ssdtune.kernels.unpack_add import Move, unpack_add

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import unpack_device

pytest.importorskip("triton")
MODULES = (
    "noise_triton",
    "unpack_triton",
    "matmul_triton",
    "rotated_triton",
    "integers_triton",
    "ggml_triton",
    "requantize_triton",
)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = (torch.float32, torch.bfloat16)
IDS = ("fp32", "bf16")
SIZES = (1, TILE - 1, 17 * TILE + 77)
TWO_LEVELS = {  # of scales
    "nested": NestedNibbles(NF4, 64, 3, 0.0123456789),
    "NVFP4": Nvfp4(is_divided=False, num_stored=16),
    "NVFP4, divided": Nvfp4(is_divided=True),
}
READ_ORDERS = (*ORDERS.values(), (2, 1, 1, 2, 2), (8,), (1,) * 5)


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[dict[str, Any]]:
    """The kernels, decorated while the interpreter is asked for."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    forget()
    try:
        yield {name: importlib.import_module(f"ssdtune.kernels.{name}") for name in MODULES}
    finally:
        patch.undo()
        forget()


def forget() -> None:
    """Whoever imports the modules next decorates anew."""
    for name in MODULES:
        sys.modules.pop(f"ssdtune.kernels.{name}", None)
        if hasattr(kernels, name):
            delattr(kernels, name)


@pytest.fixture
def small(interpreted: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of one tile, so that a small tensor needs several."""
    monkeypatch.setattr(interpreted["unpack_triton"], "TILES", dict.fromkeys(BITS, 1))


def stored(format: Format, num_elements: int) -> list[torch.Tensor]:
    """What a file may hold for so many elements: any codes, scales that are numbers."""
    generator = torch.Generator().manual_seed(num_elements)
    made = []
    for part in format.parts((num_elements,)):
        found = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
        if part.suffix == "scales" and part.dtype == "U8":  # e8m0: 2^-27 to 2^36
            found = found // 4 + 100
        elif part.dtype != "U8":
            found = torch.randn(part.shape, generator=generator).to(SCALE_DTYPES[part.dtype])
        made.append(found)
    return made


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; of what is no number that it is none, and in bfloat16 which one."""
    bits = BITS[found.dtype]
    is_number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~is_number)
    assert torch.equal(found.view(bits)[is_number], expected.view(bits)[is_number])
    if found.dtype == torch.bfloat16:
        assert (found.view(bits)[~is_number] == 0x7FC0).all()


def check(
    format: Format, parts: Sequence[torch.Tensor], num_elements: int, dtype: torch.dtype
) -> torch.Tensor:
    found, expected = (torch.empty(num_elements, dtype=dtype) for _ in range(2))
    unpack(format, parts, found, suffix=TRITON)
    format.by_torch(parts, expected)
    assert_same(found, expected)
    return found


# ------------------------------------------------------------------ unpack


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", READ_ORDERS, ids=str)
def test_affine_codes_at_every_width(order: tuple[int, ...]) -> None:
    for bits in widths(order):
        format = Affine(bits, order)
        check(format, stored(format, TILE + 77), TILE + 77, torch.float32)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine_groups_of_every_size(group: int, dtype: torch.dtype) -> None:
    format = Affine(8, (4, 1, 1, 2), group)
    check(format, stored(format, 2 * TILE + 45), 2 * TILE + 45, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rotated_groups(group: int, dtype: torch.dtype) -> None:
    format = Rotated(Affine(3, (2, 1), group))
    for size in (group - 1, 2048 + group + 5):
        check(format, stored(format, size), size, dtype)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("is_high_first", "kind", "dtype"),
    pairs.pairwise(
        {"low first": False, "high first": True}, {k: k for k in SCALE_DTYPES}, pairs.DTYPES
    ),
)
def test_nibbles_with_scales_of_every_kind(
    is_high_first: bool, kind: str, dtype: torch.dtype
) -> None:
    format = Nibbles(E2M1, 16, is_high_first, kind)
    check(format, stored(format, TILE + 77), TILE + 77, dtype)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("block", [1, 7, 24, 32, 100, 128, 4096])
def test_nibbles_in_blocks_of_any_size(block: int) -> None:
    format = Nibbles(NF4, block, is_high_first=True)
    check(format, stored(format, 2 * TILE + 77), 2 * TILE + 77, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    "format",
    [Affine(5, (4, 1)), Nibbles(NF4, 64, True), *TWO_LEVELS.values()],
    ids=["affine", "nibbles", *TWO_LEVELS],
)
def test_tensors_of_every_length(format: Format, dtype: torch.dtype) -> None:
    for size in SIZES:
        check(format, stored(format, size), size, dtype)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "format",
    [Affine(5, (4, 1)), Rotated(Affine(3, (2, 1))), Nibbles(E2M1, 32, False, "E8M0")],
    ids=lambda format: format.label,
)
def test_float16_is_rounded_as_torch_rounds_it(format: Format) -> None:
    """With scales from below its normal numbers to beyond its largest."""
    size = 2 * TILE + 77
    parts = stored(format, size)
    if not isinstance(format, Nibbles):
        parts[-2] = 2.0 ** torch.linspace(-30, 20, len(parts[-2])).bfloat16()
    found = check(format, parts, size, torch.float16)
    assert found.isinf().any()
    assert (found.abs() < 2**-14).logical_and(found != 0).any()


@pytest.mark.parametrize(
    "format",
    [Affine(6, (4, 1, 1)), Nibbles(E2M1, 32, False, "E8M0"), *TWO_LEVELS.values()],
    ids=["affine", "nibbles", *TWO_LEVELS],
)
def test_parts_lie_anywhere_and_nothing_beside_the_output_is_written(format: Format) -> None:
    size = TILE + 33
    parts = []
    for part in stored(format, size):
        offset = 3 if part.itemsize == 1 else 1
        parts.append(torch.cat((part.new_zeros(offset), part))[offset:])
    assert any(part.data_ptr() % 2 for part in parts)
    room = torch.full((size + 64,), 7.0).bfloat16()
    unpack(format, parts, room[31 : 31 + size], suffix=TRITON)
    expected = torch.empty(size).bfloat16()
    format.by_torch(parts, expected)
    assert_same(room[31 : 31 + size], expected)
    assert (room[:31] == 7).all()
    assert (room[31 + size :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_awkward_scales_of_affine_codes(dtype: torch.dtype) -> None:
    """Zeros of both signs, numbers below the normal ones, overflow, infinity (0 x inf too), NaN."""
    format = Affine(8, (8,))
    codes, _, zeros = stored(format, TILE)
    awkward = torch.tensor([0x0000, 0x8000, 0x0001, 0x00FF, 0x7F7F, 0x7F80, 0xFF80, 0x7FC1])
    scales = awkward.to(torch.int16).view(torch.bfloat16)
    zeros[5:7] = codes[::2] = 7
    found = check(format, (codes, scales, zeros), TILE, dtype)
    assert found[256:320].isinf().any()
    assert found[320:448:2].isnan().all()
    assert found[448:].isnan().all()


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_every_scale_beneath_another(name: str) -> None:
    """No number and not finite among them; of NVFP4 every one there is, over and under one that is below float32's
    normal numbers."""
    format, size = TWO_LEVELS[name], 16 * 256
    codes, scales, *others = stored(format, size)
    if name == "nested":
        meanings, nested = others
        meanings[::5] = torch.inf
        nested[1], nested[2], nested[3] = torch.nan, 0.0, 2.0**-140
        scales[3:12] = torch.arange(9)
    else:
        scales = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
        others[0][0] = 2.0**-130
    found = check(format, (codes, scales, *others), size, torch.float32)
    assert found.isnan().any()
    assert found.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("kind", ["F8_E4M3", "E8M0", "UE5M3"])
def test_every_scale_of_eight_bits(kind: str, dtype: torch.dtype) -> None:
    format = Nibbles(E2M1, 16, is_high_first=False, scale=kind)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(SCALE_DTYPES[kind])
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]).to(torch.uint8)
    found = check(format, (codes.repeat(256), scales), 16 * 256, dtype)
    assert found.isnan().sum() == 16 * (2 if kind == "F8_E4M3" else 1)


def test_shapes_do_not_matter() -> None:
    format = Nibbles(E2M1, 32, is_high_first=False, scale="E8M0")
    codes, scales = stored(format, 4 * 96)
    flat = check(format, (codes, scales), 4 * 96, torch.bfloat16)
    matrix = torch.empty(4, 96).bfloat16()
    unpack(format, (codes.view(4, 3, 16), scales.view(4, 3)), matrix, suffix=TRITON)
    assert torch.equal(matrix.view(-1), flat)


# ------------------------------------------------------------------ with directions


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("format", "dtype", "num"),
    pairs.pairwise(
        {"affine": Affine(5, (4, 1), 32), "nibbles": Nibbles(NF4, 64, True), **TWO_LEVELS},
        pairs.DTYPES,
        {"1": 1, "2": 2},
    ),
)
def test_gaussian_directions_are_added_as_to_what_was_unpacked(
    format: Format, dtype: torch.dtype, num: int, interpreted: dict[str, Any]
) -> None:
    directions = [Direction(2**63 + 2**31 + 1, 0.03), Direction(1, -0.5)][:num]
    compare_moved(interpreted, format, directions, 2 * TILE + 77, dtype)


@pytest.mark.parametrize(
    ("format", "num"),
    [(Affine(4, (4,)), 2), (Nibbles(E2M1, 32, False, "E8M0"), 1)],
    ids=["affine", "nibbles"],
)
def test_signs_are_added_as_to_what_was_unpacked(
    format: Format, num: int, interpreted: dict[str, Any]
) -> None:
    keys = (2**63 + 2**31 + 1, 1)
    directions = [Direction(key, 0.03, RADEMACHER) for key in keys[:num]]
    compare_moved(interpreted, format, directions, 8192 + 77, torch.bfloat16)


def test_directions_of_two_kinds(interpreted: dict[str, Any]) -> None:
    directions = [Direction(5, 0.03, RADEMACHER), Direction(6, -0.5, GAUSSIAN)]
    compare_moved(interpreted, Affine(4, (4,)), directions, 700, torch.bfloat16)


def compare_moved(
    interpreted: dict[str, Any],
    format: Format,
    directions: list[Direction],
    num_elements: int,
    dtype: torch.dtype,
) -> None:
    parts = stored(format, num_elements)
    found, expected = (torch.empty(num_elements, dtype=dtype) for _ in range(2))
    interpreted["unpack_triton"].unpack_add_triton(format, parts, found, directions)
    format.by_torch(parts, expected)
    noise.add_directions(expected, expected, directions, suffix="")
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("format", "moves", "is_fused"),
    [
        (Affine(4, (4,)), [Move((Direction(5, 0.03),))], True),
        (Nibbles(NF4, 64, True), [Move((Direction(5, 0.03),)), Move((Direction(6, 0.1),))], True),
        (TWO_LEVELS["nested"], [Move((Direction(5, 0.03),))], True),
        (TWO_LEVELS["NVFP4"], [Move((Direction(5, 0.03),))], True),
        (Affine(8, (4, 1, 1, 2)), [Move((Direction(5, 0.1),), 0.9, 7), Move((), 0.5, 8)], False),
        (Affine(4, (4,)), [], False),
    ],
    ids=["shift", "two", "nested", "NVFP4", "update", "none"],
)
def test_moves_that_only_add_are_made_while_decoding(
    format: Format,
    moves: list[Move],
    is_fused: bool,
    interpreted: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, seen = interpreted["unpack_triton"], []
    plain = module.unpack_add_triton
    monkeypatch.setattr(
        module, "unpack_add_triton", lambda *given: (seen.append(given[-1]), plain(*given))
    )
    parts = stored(format, 2 * TILE + 77)
    found, expected = (torch.empty(2 * TILE + 77, dtype=torch.bfloat16) for _ in range(2))
    unpack_add(format, parts, found, moves, suffix=TRITON)
    unpack_add(format, parts, expected, moves, suffix="")
    assert_same(found, expected)
    assert seen == [m.directions for m in moves[:1] if is_fused]


# ------------------------------------------------------------------ codes that move


@pytest.mark.parametrize(
    "format",
    [Affine(4, (4,)), Affine(8, (4, 1, 1, 2), 32), Affine(3, (2, 1), 128), Affine(1, (1,))],
    ids=lambda format: format.label,
)
def test_codes_move_as_by_the_definition(
    format: Affine, interpreted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, and with programs that are not full."""
    monkeypatch.setattr(interpreted["requantize_triton"], "CHUNK", 1024)
    size = 1024 + TILE + 77
    moves = [Move((Direction(5, 0.3), Direction(2**63 + 6, 0.1)), 0.9, 2**63 + 7), Move((), 0.5, 1)]
    for move in moves:
        parts = stored(format, size)
        parts[-2][3], parts[-2][4] = 0.0, float("nan")
        expected = [part.clone() for part in parts]
        before = parts[0].clone()
        requantize(format, expected, (size,), move, suffix="")
        requantize(format, parts, (size,), move, suffix=TRITON)
        assert not torch.equal(parts[0], before)
        for found, wanted in zip(parts, expected, strict=True):
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


# ------------------------------------------------------------------ matrix product


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("format", "rows", "columns", "tokens"),
    [
        (Affine(4, (4, 1, 1, 2), 64), 33, 192, 16),  # rows begin within a tile
        (Affine(5, (4, 1), 32), 3, 576, 2),  # a part of 512 columns and one of 64
        (Affine(3, (2, 1), 128), 5, 1088, 1),  # groups go from row to row
    ],
    ids=["4 bits", "5 bits", "3 bits"],
)
def test_a_product_with_packed_weights_is_that_with_unpacked_ones(
    format: Affine,
    rows: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    interpreted: dict[str, Any],
) -> None:
    """Within the error that the sums of float32 may have."""
    parts = stored(format, rows * columns)
    x = torch.randn(tokens, columns).to(dtype)
    found = interpreted["matmul_triton"].matmul_triton(format, parts, x, rows)
    weights = torch.empty(rows, columns, dtype=dtype)
    format.by_torch(parts, weights)
    exact = x.double() @ weights.double().t()
    allowed = columns * 2**-23 * (x.double().abs() @ weights.double().abs().t())
    assert found.dtype == torch.float32
    assert found.shape == (tokens, rows)
    assert ((found - exact).abs() <= allowed).all()


def test_the_benchmark_tells_right_products_from_wrong_ones(
    interpreted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only work of it that no processor can do without a GPU."""
    monkeypatch.setattr(unpack_device, "WIDTH", 128)
    work = unpack_device.multiplying(Affine(4, (4,)), 8, "cpu")
    assert work.is_right()
    assert work.num_bytes == 8 * 64 + 16 * (2 + 1) + 16 * 128 * 2 + 16 * 8 * 4
    module = interpreted["matmul_triton"]
    plain = module.matmul_triton
    monkeypatch.setattr(module, "matmul_triton", lambda *given: plain(*given) * 1.01)
    assert not unpack_device.multiplying(Affine(4, (4,)), 8, "cpu").is_right()


# ------------------------------------------------------------------ compiled

# Launches that compile for a device and go no further; what each kernel's assembly does with memory, and how it adds.
PRELUDE = """
import json, re, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget(*json.loads(sys.argv[1])))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


driver.set_active(Driver())
run, seen = JITFunction.run, {}


def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    # A product to which -0 is added is a product.
    text = re.sub(r"v_fma_mix_f32.*neg\\(0\\)", "", text)
    found = re.findall(r"(?:ld|st)\\.global[.\\w]*|fma[.\\w]*|mma\\.sync|bar\\.sync", text)
    seen[self.__name__] = {name: found.count(name) for name in found}


JITFunction.run = compile_only
"""
COMPILE = """
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.matmul_triton import matmul_triton
from ssdtune.kernels.nibbles import NF4, Nibbles, Nvfp4
from ssdtune.kernels.noise import Direction
from ssdtune.kernels.requantize import requantize
from ssdtune.kernels.transfer import pack
from ssdtune.kernels.unpack import TRITON, unpack
from ssdtune.kernels.unpack_add import Move
from ssdtune.kernels.unpack_triton import unpack_add_triton

out = torch.empty(1 << 14, dtype=torch.bfloat16)
MOVE = Move((Direction(1, 0.1),), 1.0, 2)
dtypes = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
NVFP4 = Nvfp4(is_divided=True)


def parts(format):
    return [torch.empty(p.shape, dtype=dtypes[p.dtype]) for p in format.parts(out.shape)]


results = {}
for name, launch in {
    "affine": lambda: unpack(Affine(6, (4, 2)), parts(Affine(6, (4, 2))), out, suffix=TRITON),
    "nibbles": lambda: unpack(Nibbles(NF4, 64, True), parts(Nibbles(NF4, 64, True)), out, suffix=TRITON),
    "nvfp4": lambda: unpack(NVFP4, parts(NVFP4), out, suffix=TRITON),
    "moved": lambda: unpack_add_triton(Affine(4, (4,)), parts(Affine(4, (4,))), out, [Direction(1, 0.1)]),
    "codes": lambda: requantize(Affine(5, (4, 1)), parts(Affine(5, (4, 1))), out.shape, MOVE, suffix=TRITON),
    "packed": lambda: pack(out.view(128, -1), key=3, suffix=TRITON),
    "product": lambda: matmul_triton(Affine(4, (4,)), parts(Affine(4, (4,))), out[:2048].view(1, -1), 8),
}.items():
    seen.clear()
    launch()
    results[name] = dict(seen)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, int]]]:
    """Of each launch and kernel, how often its assembly for an A100 has which instruction."""
    return compiled_for(("cuda", 80, 32), COMPILE, tmp_path_factory)


def compiled_for(
    target: tuple[str, int | str, int], launches: str, factory: pytest.TempPathFactory
) -> dict[str, dict[str, dict[str, int]]]:
    """What launches compile to. target: backend, architecture, threads of a warp."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(factory.mktemp("triton")))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + launches, json.dumps(target)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kernels_compile_and_nothing_is_fused(compiled: dict[str, Any]) -> None:
    assert [list(seen) for seen in compiled.values()] == [
        ["_affine"],
        ["_nibbles"],
        ["_nibbles"],
        ["_affine"],
        ["_affine", "_add", "_requantize"],
        ["_pack"],
        ["_multiply", "_add_parts"],
    ]
    for name in compiled.keys() - {"product"}:
        for seen in compiled[name].values():
            assert not [op for op in seen if op.startswith("fma")], name


def test_memory_is_taken_in_the_widest_accesses(compiled: dict[str, Any]) -> None:
    """Of a thread, 8 vectors x 16 bytes are stored; of slices of 4 and 2 bits, 4 + 2 vectors x 8 bytes are loaded."""
    affine = compiled["affine"]["_affine"]
    assert affine["st.global.v4.b32"] == 8
    assert affine["ld.global.v2.b32"] == 6
    assert "bar.sync" not in affine
    assert compiled["nibbles"]["_nibbles"]["st.global.v4.b32"] == 8
    assert compiled["moved"]["_affine"]["st.global.v4.b32"] == 8
    assert compiled["product"]["_multiply"]["mma.sync"]
