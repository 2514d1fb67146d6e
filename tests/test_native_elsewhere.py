"""Native code on a processor that is no x86: no flags, no intrinsics, the bits of the formats' definitions."""

from collections.abc import Iterator

import pytest
import torch

from ssdtune.kernels import lossless, native
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.kernels.native import Library, library
from ssdtune.kernels.nibbles import NF4, Nibbles
from ssdtune.kernels.quantize import quantize_affine, quantize_nibbles
from ssdtune.kernels.unpack import unpack


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """The library as another kind of processor would build and load it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(native.platform, "machine", lambda: "aarch64")
        patch.setattr(native, "FLAGS", (*native.FLAGS, "-U__SSE2__"))
        library.cache_clear()
        found = library()
        if found is None:
            pytest.skip("there is no compiler here")
        yield found
    library.cache_clear()


def packed() -> Iterator[tuple[Format, list[torch.Tensor]]]:
    """Formats with parts for 24 x 512 values."""
    torch.manual_seed(0)
    values = torch.randn(24, 512).bfloat16()
    for order in ((4,), (4, 1, 1, 2)):
        format = Affine(sum(order), order, 64)
        made = quantize_affine(values, order, 64)
        yield format, [made[part.suffix] for part in format.parts((24, 512))]
    codes = quantize_nibbles(values, NF4, 64, "BF16")
    yield Nibbles(NF4, 64, False, "BF16"), [codes["codes"], codes["scales"]]
    found = lossless.encode(values)
    assert found is not None
    yield found
    for kind in ("Q4_0", "Q8_0", "Q6_K", "IQ4_XS"):
        blocks = torch.randint(0, 60, (24 * 512 // KINDS[kind].block, KINDS[kind].num_bytes))
        yield Ggml(kind), [blocks.to(torch.uint8).view(-1)]


@pytest.mark.slow  # compiles all sources
def test_plain_code_is_built_loaded_and_right(plain: Library) -> None:
    assert plain.suffixes == ("_plain",)
    for format, parts in packed():
        for dtype in (torch.bfloat16, torch.float32):
            if isinstance(format, lossless.Lossless) and dtype == torch.float32:
                continue
            expected, found = torch.empty(24, 512, dtype=dtype), torch.empty(24, 512, dtype=dtype)
            format.by_torch(parts, expected)
            unpack(format, parts, found)
            assert torch.equal(found, expected), format.label
    content = torch.arange(100_003).to(torch.uint8)
    assert checksum(content) == checksum(content, suffix="")
