"""Native code on a processor that is no x86: no intrinsics, the bits of what torch's operators define."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import torch

from ssdtune.kernels import compiling, lossless, native
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.compiling import compile_into
from ssdtune.kernels.decoding import run
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.integers import PackQuantized
from ssdtune.kernels.native import Library, library
from ssdtune.kernels.nibbles import NF4, Nibbles
from ssdtune.kernels.noise import KINDS as KINDS_OF_NOISE
from ssdtune.kernels.noise import Direction, add_directions
from ssdtune.kernels.quantize_affine import quantize_affine
from ssdtune.kernels.quantize_nibbles import quantize_nibbles
from ssdtune.kernels.requantize import requantize
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.unpack import unpack
from ssdtune.kernels.unpack_add import Move


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """The library as another kind of processor would build and load it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(compiling.platform, "machine", lambda: "riscv64")
        patch.setattr(compiling, "FLAGS", (*compiling.FLAGS, "-U__SSE2__"))
        patch.setattr(native, "_found", functools.cache(native._found.__wrapped__))
        found = library()
        if found is None:
            pytest.skip("there is no compiler here")
        yield found


def packed() -> Iterator[tuple[Format, list[torch.Tensor]]]:
    """Formats with parts for 24 x 512 values."""
    torch.manual_seed(0)
    values = torch.randn(24, 512).bfloat16()
    for order in ((4,), (4, 1, 1, 2)):
        format = Affine(sum(order), order, 64)
        made = quantize_affine(values, order, 64)
        parts = [made[part.suffix] for part in format.parts((24, 512))]
        yield format, parts
        yield Rotated(format), parts
    codes = quantize_nibbles(values, NF4, 64, "BF16")
    yield Nibbles(NF4, 64, False, "BF16"), [codes["codes"], codes["scales"]]
    found = lossless.encode(values)
    assert found is not None
    yield found
    words = torch.randint(-(2**31), 2**31, (24, 64)).to(torch.int32)
    yield PackQuantized(4, 64), [words, torch.randn(24, 8).bfloat16()]
    for kind in (name for name, described in KINDS.items() if described.block > 1):
        blocks = torch.randint(0, 60, (24 * 512 // KINDS[kind].block, KINDS[kind].num_bytes))
        yield Ggml(kind), [blocks.to(torch.uint8).view(-1)]


def check_bits(suffix: str | None) -> None:
    """Of all that is decoded, float32 and bfloat16; of checksums, directions, and codes that take a step."""
    for format, parts in packed():
        for dtype in (torch.bfloat16, torch.float32):
            if isinstance(format, lossless.Lossless) and dtype == torch.float32:
                continue
            expected, found = torch.empty(24, 512, dtype=dtype), torch.empty(24, 512, dtype=dtype)
            format.by_torch(parts, expected)
            unpack(format, parts, found, suffix=suffix)
            kind = torch.int16 if dtype == torch.bfloat16 else torch.int32
            assert torch.equal(found.view(kind), expected.view(kind)), format.label
    content = torch.arange(100_003).to(torch.uint8)
    assert checksum(content) == checksum(content, suffix="")
    directions = [
        Direction(key=5 + i, scale=0.5, kind=kind) for i, kind in enumerate(KINDS_OF_NOISE)
    ]
    for dtype, key in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 9)):
        base = torch.randn(20_000).to(dtype)
        expected, found = torch.empty_like(base), torch.empty_like(base)
        add_directions(expected, base, directions, decay=0.9, rounding_key=key, suffix="")
        add_directions(found, base, directions, decay=0.9, rounding_key=key, suffix=suffix)
        assert torch.equal(found, expected)
    affine, parts = next(packed())
    assert isinstance(affine, Affine)
    moved = {by: [part.clone() for part in parts] for by in (suffix, "")}
    for by, codes in moved.items():
        requantize(affine, codes, (24, 512), Move(tuple(directions), 0.9, 77), suffix=by)
    assert torch.equal(moved[suffix][0], moved[""][0])
    assert not torch.equal(moved[""][0], parts[0])


@pytest.mark.slow  # compiles all sources
def test_plain_code_is_built_loaded_and_right(plain: Library) -> None:
    assert plain.suffixes == ("_plain",)
    check_bits(None)


@pytest.mark.slow  # compiles all sources, and each call starts an emulator
def test_arm_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = emulated.arm_tools()
    if tools is None:
        pytest.skip("no aarch64-linux-gnu-gcc, or no qemu-aarch64 (Debian: qemu-user)")
    compiler, command = tools
    monkeypatch.setattr(compiling.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(compiling, "COMPILERS", (compiler,))
    [suffix] = compiling.variants()
    arm = emulated.Emulated(
        compile_into(tmp_path), tmp_path, compiler=compiler, command=command, suffix=suffix
    )
    for function in (run, checksum, add_directions, requantize):
        monkeypatch.setattr(sys.modules[function.__module__], "library", lambda: arm)
    check_bits(suffix)
    assert arm.names == set(emulated.JOBS)
