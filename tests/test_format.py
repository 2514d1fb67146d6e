"""docs/format.md says all that a reader of packed models needs: one written from it alone reads the library's bits."""

import re
from pathlib import Path

import format_reader
import numpy as np
import pytest
import tiny_models
import torch
from test_packing import decoded, packed

from ssdtune.packing.wanted import NESTED, Wanted
from ssdtune.swap.pack_header import VERSION
from ssdtune.visit.build import build_meta

FORMATS = {
    "affine, 1 bit": (Wanted(bits=1), [None]),
    "affine, 7 bits": (Wanted(bits=7, group=128), [None, 4, 5]),
    "affine, nested": (Wanted(bits=8, order=NESTED["4/8"]), [None, 4, 5, 6]),
    "affine, nested from 2": (Wanted(bits=8, order=NESTED["3/8"], group=32), [None, 2, 3, 4]),
    "rotated": (Wanted(bits=8, order=NESTED["4/8"], is_rotated=True), [None, 4]),
    "nf4": (Wanted("nf4"), [None]),
    "nf4, odd blocks": (Wanted("nf4", group=37), [None]),
    "mxfp4": (Wanted("mxfp4"), [None]),
    "nvfp4": (Wanted("nvfp4"), [None]),
    "fp4-ue5m3": (Wanted("fp4-ue5m3"), [None]),
    "fp8": (Wanted("fp8"), [None]),
    "lossless": (Wanted("lossless"), [None]),
    "lossless, 3 bits": (Wanted("lossless", bits=3), [None]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of odd sizes, experts in stacks, and weights of very different sizes."""
    folder = tmp_path_factory.mktemp("format") / "source"
    model = tiny_models.build("qwen3_moe", dtype=torch.bfloat16)
    with torch.no_grad():
        for number, weights in enumerate(model.parameters()):
            weights.mul_(10.0 ** (number % 7 - 4))
    tiny_models.save(model, folder)
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stranger_reads_the_same_bits(kind: str, source: Path, tmp_path: Path) -> None:
    wanted, widths = FORMATS[kind]
    folder = packed(source, tmp_path / "packed", wanted)
    for bits in widths:
        checkpoint = build_meta(folder, bits=bits).checkpoint
        found = decoded(checkpoint, torch.float32)
        read = {name: (dtype, v) for name, dtype, v in format_reader.read_folder(folder, bits)}
        assert read.keys() == found.keys()
        for name, (dtype, values) in read.items():
            assert dtype == checkpoint.tensors[name].dtype
            same = values if values.dtype != np.uint16 else format_reader.bfloat16(values)
            assert same.dtype == np.float32
            again = torch.from_numpy(same.copy()).view_as(found[name])
            assert torch.equal(again.view(torch.int32), found[name].view(torch.int32)), name


def test_the_document_has_the_version_and_the_tables() -> None:
    document = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    assert document.startswith(f"# Packed models, version {VERSION}\n")
    assert format_reader.NEWEST == VERSION
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", document)]
    for table in format_reader.TABLES.values():
        assert any(numbers[i : i + 16] == table for i in range(len(numbers)))
