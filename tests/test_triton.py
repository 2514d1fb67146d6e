"""The kernels for GPUs under Triton's interpreter: the same bits as their definition. (On a GPU: tests/test_cuda.py.)"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pairs import DTYPES, pairwise

from ssdtune.kernels import noise, philox
from ssdtune.kernels.noise import GAUSSIAN, KINDS, TRITON, Direction

pytest.importorskip("triton")
MODULE = "ssdtune.kernels.noise_triton"
SIZES = (1, 513, 8192 + 77)


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[Any]:
    """The kernels, decorated while the interpreter is asked for."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(MODULE, None)
    try:
        yield importlib.import_module(MODULE)
    finally:
        patch.undo()
        sys.modules.pop(MODULE, None)


def same(base: torch.Tensor, directions: list[Direction], **more: Any) -> None:
    found = []
    for suffix in ("", TRITON):
        to = torch.empty_like(base)
        noise.add_directions(to, base, directions, suffix=suffix, **more)
        found.append(to)
    kind = torch.int32 if base.dtype == torch.float32 else torch.int16
    assert torch.equal(found[0].view(kind), found[1].view(kind))


@pytest.mark.parametrize(
    ("dtype", "kind", "num"), pairwise(DTYPES, {kind: kind for kind in KINDS}, {"1": 1, "3": 3})
)
def test_kernels_have_the_bits_of_their_definition(dtype: torch.dtype, kind: str, num: int) -> None:
    directions = [Direction(0x0123456789ABCDEF + j, 1e-3 * (j - 1.5), kind) for j in range(num)]
    for size in SIZES:
        base = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        for more in ({}, {"rounding_key": 99, "decay": 1 - 1e-4}):
            same(base, directions, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_counters_go_on_beyond_32_bits(kind: str) -> None:
    """Across the place where a counter's low word is 0 again, and where its high word is not 0."""
    edge = philox.tile_size(noise.FIELD_BITS[kind]) * (2**32 // philox.LANES)
    directions = [Direction(7, 1e-3, kind)]
    same(torch.randn(8192 + 77), directions, first=edge - 8192)
    same(torch.randn(513).bfloat16(), directions, rounding_key=99, first=4 * edge)


def test_parts_make_the_whole(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, "CHUNK", 8192)
    base = torch.randn(3 * 8192 + 5).bfloat16()
    same(base, [Direction(1, 0.5), Direction(2, -0.25)], rounding_key=3)


def test_what_is_no_number_stays_so() -> None:
    base = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.3e38, -3.3e38]).bfloat16()
    for key in (None, 1):
        to = torch.empty_like(base)
        noise.add_directions(
            to, base, [Direction(5, 1e-3, GAUSSIAN)], rounding_key=key, suffix=TRITON
        )
        assert to[0].isnan()
        assert to[1] == torch.inf
        assert to[2] == -torch.inf
