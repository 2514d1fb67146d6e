"""Checkpoints that other libraries quantized: values by the published equations, and what does not hold together is
refused by name. What the libraries themselves make of their files: test_foreign_golden.py."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ssdtune.kernels import integers, integers_native, nibbles, scaled_rows
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format, Part
from ssdtune.kernels.integers import GPTQ_BITS, Awq, Gptq, PackQuantized
from ssdtune.kernels.native import library
from ssdtune.kernels.nibbles import BNB_FP4, E2M1, NF4
from ssdtune.kernels.unpack import unpack
from ssdtune.swap.foreign import READERS, recognise
from ssdtune.swap.header import CheckpointError, TensorEntry
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import open_checkpoint

READ_AS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
BASE = "model.layers.0.mlp.up_proj"
WEIGHT = BASE + ".weight"
Tensors = dict[str, torch.Tensor]


def found(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> dict[str, TensorEntry | PackedEntry]:
    """What is recognised of tensors that lie in a file, under names after BASE."""
    named = {BASE + name if name.startswith((".", "_")) else name: t for name, t in tensors.items()}
    named["model.norm.weight"] = torch.ones(3)
    save_file({name: t.contiguous() for name, t in named.items()}, folder / "model.safetensors")
    return recognise(config, open_checkpoint(folder).tensors, folder / "config.json")


def only(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> PackedEntry:
    """The one weight that is recognised; nothing else may be left but the norm."""
    entries = found(folder, config, tensors)
    assert isinstance(entries.pop("model.norm.weight"), TensorEntry)
    [entry] = entries.values()
    assert isinstance(entry, PackedEntry)
    assert [(p.dtype, p.shape) for p in entry.parts] == [
        (p.dtype, p.shape) for p in entry.format.parts(entry.shape)
    ]
    return entry


def decoded(entry: PackedEntry, dtype: torch.dtype) -> torch.Tensor:
    """The weight, by the format's definition and by what is fastest: both have the same bits."""
    raw = entry.path.read_bytes()
    parts = [
        torch.frombuffer(bytearray(raw[p.start : p.stop]), dtype=READ_AS[p.dtype]).view(p.shape)
        for p in entry.parts
    ]
    before = [p.clone() for p in parts]
    out = torch.full(entry.shape, math.nan, dtype=dtype)
    entry.format.by_torch(parts, out)
    assert all(same_bits(a, b) for a, b in zip(parts, before, strict=True))
    fast = torch.full(entry.shape, math.nan, dtype=dtype)
    unpack(entry.format, parts, fast)
    assert same_bits(out, fast)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(kind), b.contiguous().view(kind)
    )


def agrees(entry: PackedEntry, exact: torch.Tensor) -> None:
    """exact: the values in float32, or float64 where they fit it."""
    for dtype in OUTPUTS:
        assert same_bits(decoded(entry, dtype), exact.float().to(dtype)), dtype


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers_below(top: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, top, shape, generator=seeded(seed))


def floats(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return (torch.rand(shape, generator=seeded(seed)) * 0.1 + 1e-3).to(dtype)


def words_of(codes: Iterable[int], bits: int) -> list[int]:
    """A stream of codes as signed words: one long number, cut. Another route than the code under test."""
    whole = sum(code << bits * i for i, code in enumerate(codes))
    num = -(-len(list(codes)) * bits // 32)
    words = ((whole >> 32 * k) & 0xFFFFFFFF for k in range(num))
    return [word - (word >> 31 << 32) for word in words]


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] of streams along rows."""
    return torch.tensor([words_of(row, bits) for row in codes.tolist()], dtype=torch.int32)


@pytest.fixture(params=[False, True], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, once with pieces so small that a tensor has several."""
    if request.param:
        monkeypatch.setattr(integers, "CHUNK", 1 << 10)
        monkeypatch.setattr(nibbles, "CHUNK", 1 << 8)
        monkeypatch.setattr(nibbles, "SLAB", 1 << 8)


# --------------------------------------------------------------------------------------- GPTQ


def gptq_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, **more}


def gptq(
    bits: int, group: int, *, rows: int = 96, width: int = 128, v1: bool = True, order: Any = None
) -> tuple[Tensors, torch.Tensor]:
    """A file's tensors and the values that were put in them. order: group of each column."""
    num_groups = -(-width // group)
    numbers = torch.arange(width) // group if order is None else order
    codes = integers_below(2**bits, rows, width)
    # 0 is among the zeros: what v1 writes for it borrows from its neighbour, except with 3 bits.
    zeros = integers_below(2**bits, num_groups, rows, seed=1)
    scales = floats(num_groups, rows)
    if not v1:
        zero_words = packed(zeros, bits)
    elif bits == 3:
        zero_words = packed((zeros - 1) % 8, bits)
    else:
        ones = sum(1 << k for k in range(0, 32, bits))
        zero_words = (packed(zeros, bits).long() - ones).to(torch.int32)
    exact = (codes - zeros.t()[:, numbers]) * scales.t()[:, numbers].double()
    return {
        ".qweight": packed(codes, bits).t(),
        ".qzeros": zero_words,
        ".scales": scales,
        ".g_idx": numbers.to(torch.int32),
    }, exact


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("v1", [True, False], ids=["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_has_the_values_that_were_written(tmp_path: Path, bits: int, v1: bool) -> None:
    tensors, exact = gptq(bits, 32, v1=v1)
    layout = "gptq" if v1 else "gptq_v2"
    entry = only(tmp_path, gptq_config(bits=bits, checkpoint_format=layout), tensors)
    assert (entry.name, entry.dtype, entry.shape) == (WEIGHT, "F16", (96, 128))
    assert len(entry.parts) == 3  # the g_idx says nothing
    agrees(entry, exact)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_in_an_order_of_its_own_keeps_the_g_idx(tmp_path: Path, bits: int) -> None:
    order = (torch.arange(128) // 32)[torch.randperm(128, generator=seeded())]
    tensors, exact = gptq(bits, 32, order=order)
    entry = only(tmp_path, gptq_config(bits=bits, desc_act=True), tensors)
    assert len(entry.parts) == 4
    agrees(entry, exact)


def test_gptq_with_one_scale_a_row_or_a_short_last_group(tmp_path: Path) -> None:
    for group, config in ((128, -1), (48, 48)):
        tensors, exact = gptq(4, group)
        agrees(only(tmp_path, gptq_config(group_size=config), tensors), exact)


def test_gptq_whose_last_words_are_not_full(tmp_path: Path) -> None:
    tensors, exact = gptq(4, 32, rows=33, width=100)
    agrees(only(tmp_path, gptq_config(), tensors), exact)


def test_gptq_modules_may_have_bits_of_their_own(tmp_path: Path) -> None:
    tensors, exact = gptq(8, 64)
    dynamic = {
        r"-:.*q_proj": {},
        r"+:.*\.up_proj": {"bits": 8, "group_size": 64},
        ".*": {"bits": 2},
    }
    agrees(only(tmp_path, gptq_config(dynamic=dynamic), tensors), exact)


def test_scales_say_the_dtype_unless_the_config_does(tmp_path: Path) -> None:
    tensors, _ = gptq(4, 32)
    for scale, stated, expected in (
        ("float16", None, "F16"),
        ("bfloat16", None, "BF16"),
        ("float32", None, "BF16"),
        ("float16", "bfloat16", "BF16"),
    ):
        tensors[".scales"] = tensors[".scales"].to(getattr(torch, scale))
        config = gptq_config() | ({"torch_dtype": stated} if stated else {})
        assert only(tmp_path, config, tensors).dtype == expected


# ---------------------------------------------------------------------------------------- AWQ


def awq_words(values: torch.Tensor) -> torch.Tensor:
    """[rows, n] to words [n, rows / 8], each of eight rows; they lie in it as 0, 2, 4, 6, 1, 3, 5, 7."""
    by_word = values.t().reshape(values.shape[1], -1, 8)
    return packed(by_word[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)


def awq(group: int = 32, rows: int = 72, width: int = 96) -> tuple[Tensors, torch.Tensor]:
    codes, zeros = integers_below(16, rows, width), integers_below(16, rows, width // group, seed=1)
    scales = floats(width // group, rows)

    number = torch.arange(width) // group
    exact = (codes - zeros[:, number]) * scales.t()[:, number].double()
    return {".qweight": awq_words(codes), ".qzeros": awq_words(zeros), ".scales": scales}, exact


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.usefixtures("pieces")
def test_awq_has_the_values_that_were_written(tmp_path: Path) -> None:
    tensors, exact = awq()
    entry = only(tmp_path, AWQ, tensors)
    assert (entry.name, entry.dtype, entry.shape) == (WEIGHT, "F16", (72, 96))
    agrees(entry, exact)
    tensors, exact = awq(group=96)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"}
    agrees(only(tmp_path, old, tensors), exact)


# --------------------------------------------------------------------------- compressed-tensors


def compressed_config(layout: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **weights}
    if described["strategy"] == "group":
        described.setdefault("group_size", 32)
    groups = {"group_0": {"targets": ["Linear"], "weights": described, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


def pack_quantized(
    bits: int,
    group: int,
    *,
    rows: int = 40,
    width: int = 96,
    symmetric: bool = True,
    order: Any = None,
) -> tuple[Tensors, torch.Tensor]:
    numbers = torch.arange(width) // group if order is None else order
    num_groups = -(-width // group)
    codes = integers_below(2**bits, rows, width)
    zeros = torch.full((rows, num_groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = integers_below(2**bits, rows, num_groups, seed=1)
    scales = floats(rows, num_groups, dtype=torch.bfloat16)
    tensors = {
        ".weight_packed": packed(codes, bits),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([rows, width]),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = packed(zeros.t(), bits).t()
    if order is not None:
        tensors[".weight_g_idx"] = order.to(torch.int32)
    exact = (codes - zeros[:, numbers]) * scales[:, numbers].double()
    return tensors, exact


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_pack_quantized_has_the_values_that_were_written(
    tmp_path: Path, bits: int, symmetric: bool
) -> None:
    tensors, exact = pack_quantized(bits, 32, symmetric=symmetric)
    entry = only(tmp_path, compressed_config(num_bits=bits, symmetric=symmetric), tensors)
    assert (entry.name, entry.dtype, entry.shape) == (WEIGHT, "BF16", (40, 96))
    agrees(entry, exact)


def test_pack_quantized_by_channel_with_words_that_are_not_full(tmp_path: Path) -> None:
    tensors, exact = pack_quantized(4, 99, width=99, symmetric=False)
    agrees(only(tmp_path, compressed_config(strategy="channel", symmetric=False), tensors), exact)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_pack_quantized_in_an_order_of_its_own(tmp_path: Path, symmetric: bool) -> None:
    order = (torch.arange(96) // 32)[torch.randperm(96, generator=seeded())]
    tensors, exact = pack_quantized(4, 32, symmetric=symmetric, order=order)
    config = compressed_config(actorder="group", symmetric=symmetric)
    entry = only(tmp_path, config, tensors)
    assert entry.parts[-1].name.endswith("weight_g_idx")
    agrees(entry, exact)
    for says_nothing in (torch.arange(96) // 32, torch.full((96,), -1)):
        tensors, exact = pack_quantized(4, 32, symmetric=symmetric)
        tensors[".weight_g_idx"] = says_nothing.to(torch.int32)
        agrees(only(tmp_path, config, tensors), exact)


def test_weights_of_several_schemes_find_their_own(tmp_path: Path) -> None:
    tensors, exact = pack_quantized(8, 96)
    config = compressed_config(layout="mixed-precision")
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config["config_groups"]["group_1"] = {"targets": ["re:.*up_proj"], "weights": eight}
    config["config_groups"]["group_2"] = {"targets": ["Attention"], "weights": None}
    agrees(only(tmp_path, config, tensors), exact)


def test_of_schemes_that_differ_in_zeros_only_the_one_with_zeros_has_them(tmp_path: Path) -> None:
    config = compressed_config()
    weights = config["config_groups"]["group_0"]["weights"]
    config["config_groups"]["group_1"] = {"weights": weights | {"symmetric": False}}
    for symmetric in (True, False):
        tensors, exact = pack_quantized(4, 32, symmetric=symmetric)
        agrees(only(tmp_path, config, tensors), exact)
    tensors, exact = pack_quantized(4, 32)
    tensors[".weight_zero_point"] = torch.zeros(40, 3, dtype=torch.int8)  # says nothing
    agrees(only(tmp_path, compressed_config(), tensors), exact)


def in_blocks(of_blocks: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """To [rows, width], of blocks that are whole."""
    tall = of_blocks.repeat_interleave(rows // of_blocks.shape[0], 0)
    return tall.repeat_interleave(width // of_blocks.shape[1], 1)


def int8_with_zeros(*shape: int) -> tuple[Tensors, torch.Tensor]:
    """[40, 96], zeros and scales of this shape, and its values."""
    codes, zeros = (integers_below(256, *s, seed=s[1]) - 128 for s in ((40, 96), shape))
    zeros[0, 0] = 0  # that the others are none is not told by the first
    scales = floats(*shape, dtype=torch.bfloat16)
    zero, scale = (in_blocks(x, 40, 96) for x in (zeros, scales.double()))
    tensors = {".weight": codes.to(torch.int8), ".weight_scale": scales}
    return tensors | {".weight_zero_point": zeros.to(torch.int8)}, (codes - zero) * scale


@pytest.mark.usefixtures("pieces")
def test_int8_with_zeros_is_told_by_the_zeros_and_decoded_with_them(tmp_path: Path) -> None:
    """In a file with schemes of both kinds, which fit it alike."""
    for strategy, shape, more in (
        ("channel", (40, 1), {}),
        ("group", (40, 3), {"group_size": 32}),
        ("block", (5, 3), {"block_structure": [8, 32]}),
        ("tensor", (1, 1), {}),
    ):
        config = compressed_config("int-quantized", num_bits=8, strategy=strategy, **more)
        symmetric = config["config_groups"]["group_0"]["weights"]
        config["config_groups"]["group_1"] = {"weights": symmetric | {"symmetric": False}}
        tensors, exact = int8_with_zeros(*shape)
        if shape == (1, 1):  # the only zero, which must not be 0 to be one
            tensors[".weight_zero_point"] += 3
            exact = (tensors[".weight"] - 3.0) * tensors[".weight_scale"].double()
        entry = only(tmp_path, config, tensors)
        assert len(entry.parts) == 3
        agrees(entry, exact)
        tensors[".weight_zero_point"] = torch.zeros(shape, dtype=torch.int8)
        for none in (tensors, changed(tensors, weight_zero_point=None)):
            wide = in_blocks(tensors[".weight_scale"].double(), 40, 96)
            agrees(only(tmp_path, config, none), tensors[".weight"] * wide)


# -------------------------------------------------------------------------------- bitsandbytes

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def in_state(state: Mapping[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def bnb(kind: str = "nf4", *, nested: bool = False, **more: Any) -> tuple[Tensors, torch.Tensor]:
    """[37, 70] in blocks of 64 with nested ones of 16, and its values by the equation, an element at a time."""
    shape, n, block, nested_block = (37, 70), 2590, 64, 16
    codes, table = integers_below(16, n), {"nf4": NF4, "fp4": BNB_FP4}[kind]
    num_blocks = -(-n // block)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": shape}
    tensors = {
        ".weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        ".weight.quant_map": torch.tensor(table),
    }
    if nested:
        stored = integers_below(256, num_blocks, seed=1).to(torch.uint8)
        meanings = torch.rand(256, generator=seeded(2))
        outer = torch.rand(-(-num_blocks // nested_block), generator=seeded(3))
        tensors[".weight.nested_quant_map"], tensors[".weight.nested_absmax"] = meanings, outer
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32"}
        state |= {"nested_offset": 0.1376953125}
        absmax = [
            np.float32(meanings[int(stored[b])].item())
            * np.float32(outer[b // nested_block].item())
            + np.float32(0.1376953125)
            for b in range(num_blocks)
        ]
    else:
        stored = torch.rand(num_blocks, generator=seeded(1))
        absmax = [np.float32(a) for a in stored.tolist()]
    tensors[".weight.absmax"] = stored
    tensors[f".weight.quant_state.bitsandbytes__{kind}"] = in_state(state | more)
    exact = [np.float32(table[q]) * absmax[i // block] for i, q in enumerate(codes.tolist())]
    return tensors, torch.tensor(np.array(exact, dtype=np.float32)).view(shape)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_has_the_values_of_its_equation(
    tmp_path: Path, kind: str, nested: bool
) -> None:
    tensors, exact = bnb(kind, nested=nested)
    entry = only(tmp_path, BNB, tensors)
    assert (entry.name, entry.dtype, entry.shape) == (WEIGHT, "BF16", (37, 70))
    agrees(entry, exact)


def test_bitsandbytes_codes_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    tensors, exact = bnb(shape=[2590], nested=True)
    tensors[".weight"] = torch.cat([tensors[".weight"].view(-1), torch.zeros(1, dtype=torch.uint8)])
    tensors[".weight"] = tensors[".weight"].view(torch.bfloat16)
    with pytest.raises(CheckpointError, match="needs U8"):
        found(tmp_path, BNB, tensors)  # a byte too many
    tensors, exact = bnb(shape=[2588], nested=True)
    tensors[".weight"] = tensors[".weight"].view(-1)[:1294].view(torch.bfloat16)[:, None]
    agrees(only(tmp_path, {"load_in_4bit": True}, tensors), exact.view(-1)[:2588])


# ------------------------------------------------------------------------- FP8, NVFP4, MXFP4


def fp8_codes(*shape: int) -> torch.Tensor:
    """Every code but the two that are no number."""
    codes = integers_below(256, *shape).to(torch.uint8)
    return codes.masked_fill_((codes & 127) == 127, 0).view(torch.float8_e4m3fn)


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 64]}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_multiplied_by_what_is_called_their_inverse(
    tmp_path: Path, scale: torch.dtype
) -> None:
    """Blocks at the edges are cut, as those of DeepSeek's kv_a_proj are."""
    codes, scales = fp8_codes(72, 100), floats(3, 2, dtype=scale)
    entry = only(tmp_path, FP8, {".weight": codes, ".weight_scale_inv": scales})
    assert (entry.dtype, entry.shape) == ("BF16", (72, 100))
    rows, columns = torch.arange(72) // 32, torch.arange(100) // 64
    agrees(entry, codes.float() * scales.float()[rows][:, columns])


def test_fp8_is_what_transformers_computes(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = fp8_codes(64, 128), floats(2, 2, dtype=torch.float32)
    entry = only(tmp_path, FP8, {".weight": codes, ".weight_scale_inv": scales})
    for dtype in OUTPUTS:
        expected = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
        assert same_bits(decoded(entry, dtype), expected)


def test_fp8_scales_of_rows_tensors_experts_and_powers_of_two(tmp_path: Path) -> None:
    codes = fp8_codes(40, 96)
    for shape in ((), (1,), (40,), (40, 1)):
        scales = floats(*shape, dtype=torch.float32)
        tensors = {".weight": codes, ".weight_scale": scales, ".input_scale": torch.ones(1)}
        config = FP8 | {"weight_block_size": None}
        wide = scales if scales.numel() == 1 else scales.view(40, 1)
        agrees(only(tmp_path, config, tensors), codes.float() * wide)
    codes = fp8_codes(3, 192)  # a scale for each of 3 rows, or for each 64 of 192 columns
    for shape in ((3, 1), (1, 3)):
        scales = floats(*shape, dtype=torch.float32)
        wide = scales if shape[1] == 1 else scales.repeat_interleave(64, 1)
        agrees(
            only(tmp_path, FP8, {".weight": codes, ".weight_scale": scales}), codes.float() * wide
        )
    codes = fp8_codes(40, 96)
    experts, scales = fp8_codes(3, 64, 128), floats(3, 2, 2, dtype=torch.float32)
    tensors = {"_experts.gate_up_proj": experts, "_experts.gate_up_proj_scale_inv": scales}
    wide = scales.repeat_interleave(32, 1).repeat_interleave(64, 2)
    agrees(only(tmp_path, FP8, tensors), experts.float() * wide)
    powers = integers_below(20, 2, 2).to(torch.uint8) + 117
    tensors = {".weight": codes, ".weight_scale_inv": powers}
    wide = (powers.float() - 127).exp2().repeat_interleave(32, 0).repeat_interleave(64, 1)
    agrees(only(tmp_path, FP8, tensors), codes.float() * wide[:40, :96])


def test_modelopt_nvfp4_multiplies_by_the_second_scale(tmp_path: Path) -> None:
    codes, second = integers_below(256, 40, 48).to(torch.uint8), torch.tensor(0.00317)
    scales = (fp8_codes(40, 6).view(torch.uint8) & 127).view(torch.float8_e4m3fn)
    tensors = {".weight": codes, ".weight_scale": scales, ".weight_scale_2": second}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    entry = only(
        tmp_path, config, tensors | {".input_scale": torch.ones(1), ".k_scale": torch.ones(2)}
    )
    halves = torch.stack((codes & 15, codes >> 4), -1).view(40, 96).long()
    wide = (scales.float() * second).repeat_interleave(16, 1)
    agrees(entry, torch.tensor(E2M1)[halves] * wide)


def test_modelopt_fp8_has_a_scale_for_a_tensor(tmp_path: Path) -> None:
    codes, scale = fp8_codes(40, 96), torch.tensor(0.3)
    config = {"quant_method": "modelopt", "quant_algo": "FP8"}
    agrees(only(tmp_path, config, {".weight": codes, ".weight_scale": scale}), codes.float() * 0.3)


@pytest.mark.usefixtures("pieces")
def test_mxfp4_is_what_transformers_computes(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = integers_below(256, 3, 20, 4, 16).to(torch.uint8)
    scales = integers_below(254, 3, 20, 4).to(torch.uint8)
    scales[0, 0] = torch.tensor([0, 1, 128, 253])
    tensors = {".experts.gate_up_proj_blocks": blocks, ".experts.gate_up_proj_scales": scales}
    tensors[".experts.gate_up_proj_bias"] = torch.ones(3, 20)
    entries = found(tmp_path, {"quant_method": "mxfp4"}, tensors)
    assert isinstance(entries[BASE + ".experts.gate_up_proj_bias"], TensorEntry)
    entry = entries[BASE + ".experts.gate_up_proj"]
    assert isinstance(entry, PackedEntry)
    assert (entry.dtype, entry.shape) == ("BF16", (3, 128, 20))
    for dtype in (torch.bfloat16, torch.float32):
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert same_bits(decoded(entry, dtype), expected)


# ---------------------------------------------------------------------------------- native code

NATIVE: list[Format] = [
    *(Gptq(bits, 96, is_ordered=is_ordered) for bits in GPTQ_BITS for is_ordered in (False, True)),
    Gptq(4, 100, is_v1=False),
    Awq(96),
    *(PackQuantized(bits, 96, has_zeros=bits % 2 == 0) for bits in range(1, 9)),
    PackQuantized(4, 96, is_ordered=True),
    ScaledBytes((32, 96)),
    ScaledBytes((1, 2100), codes="I8", scale="BF16"),
    ScaledBytes((1, 96), codes="I8", has_zeros=True),
]


def random_part(part: Part, width: int) -> torch.Tensor:
    """What a part may hold; among scales, one that is no number and one that is not finite."""
    if part.suffix.endswith("g_idx"):
        return integers_below(-(-width // 96), width).to(torch.int32)
    if part.dtype == "I32":
        return (integers_below(1 << 32, *part.shape) - (1 << 31)).to(torch.int32)
    if part.dtype in ("I8", "F8_E4M3"):
        return integers_below(256, *part.shape).to(torch.uint8).view(READ_AS[part.dtype])
    scales = floats(*part.shape, dtype=READ_AS[part.dtype])
    scales.view(-1)[0], scales.view(-1)[-1] = math.nan, -math.inf
    return scales


@pytest.mark.parametrize("suffix", [] if library() is None else library().suffixes)  # type: ignore[union-attr]
@pytest.mark.parametrize("format", NATIVE, ids=str)
def test_native_code_has_the_bits_of_its_definition(
    monkeypatch: pytest.MonkeyPatch, format: Format, suffix: str
) -> None:
    """Several parts for threads, several slices of rows, tiles of columns; neither whole."""
    monkeypatch.setattr(integers_native, "PART", 1 << 16)
    monkeypatch.setattr(scaled_rows, "NUM_SCALES", 1 << 10)
    shape = (136, 2100)
    parts = [random_part(part, shape[1]) for part in format.parts(shape)]
    for dtype in OUTPUTS:
        expected, out = torch.empty(shape, dtype=dtype), torch.full(shape, 7, dtype=dtype)
        format.by_torch(parts, expected)
        unpack(format, parts, out, suffix=suffix)
        assert torch.equal(expected.isnan(), out.isnan())
        assert same_bits(expected.nan_to_num(5), out.nan_to_num(5))


@pytest.mark.skipif(library() is None, reason="there is no compiler here")
@pytest.mark.parametrize("bits", [4, 8])
def test_float16_outputs_are_rounded_as_torch_rounds_them(bits: int) -> None:
    """Scales of every power of two: ties, numbers below the normal ones, overflow to infinity, zeros of both signs."""
    format = PackQuantized(bits, 32, scale="F32")
    exponents = torch.arange(-40, 24, dtype=torch.float32)
    factors = torch.tensor([1.0, -1.0, 1 + 2**-11, 1 + 2**-12, 1.5, 1 / 3])
    scales = (factors.unsqueeze(1) * 2.0**exponents).view(-1, 1)
    shape = (len(scales), 32)
    words = random_part(format.parts(shape)[0], 32)
    expected, out = (torch.empty(shape, dtype=torch.float16) for _ in range(2))
    format.by_torch((words, scales), expected)
    for suffix in library().suffixes:  # type: ignore[union-attr]
        unpack(format, (words, scales), out, suffix=suffix)
        assert same_bits(out, expected), suffix
    assert expected.isinf().any()
    assert expected.abs().lt(2**-14).logical_and(expected != 0).any()


@pytest.mark.skipif(library() is None, reason="there is no compiler here")
@pytest.mark.parametrize("dtype", OUTPUTS)
def test_every_code_of_fp8_times_scales_of_every_kind(dtype: torch.dtype) -> None:
    """That rows share, and that each has alone; in rows long enough for a table and too short for one."""
    kinds = [1.0, -0.7, 0.0, -0.0, 1e-41, 2**-120, -3e38, 3e4, math.inf, math.nan]
    for rows, repeats in ((4, 1), (1, 1), (1, 3)):
        format = ScaledBytes((rows, 256 * repeats))
        scales = torch.tensor(kinds).unsqueeze(1)
        codes = torch.arange(256).to(torch.uint8).repeat(rows * len(kinds), repeats)
        parts = [codes.view(torch.float8_e4m3fn), scales]
        expected, out = (torch.empty(codes.shape, dtype=dtype) for _ in range(2))
        format.by_torch(parts, expected)
        for suffix in library().suffixes:  # type: ignore[union-attr]
            unpack(format, parts, out, suffix=suffix)
            assert torch.equal(expected.isnan(), out.isnan())
            assert same_bits(expected.nan_to_num(5), out.nan_to_num(5)), (rows, repeats, suffix)
            if dtype == torch.bfloat16:
                assert same_bits(expected, out)


def test_native_code_does_not_look_beyond_its_scales() -> None:
    format = Gptq(4, 32, is_ordered=True)
    parts = [torch.zeros(p.shape, dtype=READ_AS[p.dtype]) for p in format.parts((8, 64))]
    parts[-1][5] = 2
    with pytest.raises((IndexError, RuntimeError)):
        unpack(format, parts, torch.empty(8, 64))


# ------------------------------------------------------------------------------------- refusals


def changed(tensors: Tensors, **changes: torch.Tensor | None) -> Tensors:
    """Other tensors under names without their dots; None takes one away."""
    made = dict(tensors)
    for name, tensor in changes.items():
        made.pop("." + name)
        if tensor is not None:
            made["." + name] = tensor
    return made


def fp8() -> Tensors:
    return {".weight": fp8_codes(64, 128), ".weight_scale_inv": torch.ones(2, 2)}


GPTQ_4, AWQ_4 = gptq(4, 32)[0], awq()[0]
PACKED_4 = pack_quantized(4, 32)[0]
ASYM_4 = pack_quantized(4, 32, symmetric=False)[0]
NF4_4, NESTED = bnb()[0], bnb(nested=True)[0]
STATE = ".weight.quant_state.bitsandbytes__nf4"
LIES: dict[str, tuple[Mapping[str, Any], Tensors, str]] = {
    "another method": ({"quant_method": "hqq"}, {}, '"hqq": not supported.*bitsandbytes, gptq'),
    "no method": ({}, {}, "None: not supported"),
    "a method that is no name": ({"quant_method": ["gptq"]}, {}, "not supported"),
    "LLM.int8()": ({"load_in_8bit": True}, {}, "LLM.int8"),
    "GPTQ: 5 bits": (gptq_config(bits=5), GPTQ_4, "bits 5; 2, 3, 4, 8"),
    "GPTQ: no bits": ({"quant_method": "gptq"}, GPTQ_4, "bits None"),
    "GPTQ: bits that are not": (gptq_config(bits=8), GPTQ_4, "g_idx.*each of 64 columns"),
    "GPTQ: other groups": (gptq_config(group_size=64), GPTQ_4, "qzeros.*needs I32"),
    "GPTQ: groups of nothing": (gptq_config(group_size=0), GPTQ_4, "group_size 0"),
    "GPTQ: marlin": (gptq_config(checkpoint_format="marlin"), GPTQ_4, '"marlin"; gptq and'),
    "GPTQ: a rule that is no pattern": (gptq_config(dynamic={"(": {}}), GPTQ_4, "no pattern"),
    "GPTQ: no zeros": (gptq_config(), changed(GPTQ_4, qzeros=None), 'qzeros" is missing'),
    "GPTQ: zeros alone": (gptq_config(), changed(GPTQ_4, qweight=None), "belongs to is not there"),
    "GPTQ: a group too many": (
        gptq_config(),
        changed(GPTQ_4, g_idx=torch.full((128,), 4, dtype=torch.int32)),
        "g_idx.*not one of 4",
    ),
    "GPTQ: a short g_idx": (
        gptq_config(),
        changed(GPTQ_4, g_idx=torch.zeros(64, dtype=torch.int32)),
        "g_idx.*each of 128 columns",
    ),
    "GPTQ: words of 16 bits": (
        gptq_config(),
        changed(GPTQ_4, qweight=GPTQ_4[".qweight"].to(torch.int16)),
        "needs I32",
    ),
    "GPTQ: integer scales": (
        gptq_config(),
        changed(GPTQ_4, scales=GPTQ_4[".scales"].to(torch.int32)),
        "it is I32, not BF16",
    ),
    "GPTQ: there twice": (gptq_config(), GPTQ_4 | {".weight": torch.ones(2)}, "both quantized"),
    "AWQ: gemv": (AWQ | {"version": "gemv"}, AWQ_4, '"gemv"; AutoAWQ'),
    "AWQ: 3 bits": (AWQ | {"bits": 3}, AWQ_4, "bits 3; 4 is"),
    "AWQ: groups that fill no row": (AWQ | {"group_size": 40}, AWQ_4, "40.*96 columns, not a mul"),
    "AWQ: other groups": (AWQ | {"group_size": 48}, AWQ_4, "needs I32"),
    "compressed: another layout": (compressed_config("marlin-24"), PACKED_4, "marlin-24"),
    "compressed: sparse": (
        compressed_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        PACKED_4,
        "sparsity_config: not supported",
    ),
    "compressed: rotated": (
        compressed_config() | {"transform_config": {"config_groups": {"u": {}}}},
        PACKED_4,
        "transform_config: not supported",
    ),
    "compressed: groups by name": (
        compressed_config() | {"config_groups": {"W4A16": ["Linear"]}},
        PACKED_4,
        "do not describe weights",
    ),
    "compressed: 9 bits": (compressed_config(num_bits=9), PACKED_4, "num_bits 9"),
    "compressed: bits that are not": (
        compressed_config(num_bits=8),
        PACKED_4,
        "none of the config",
    ),
    "compressed: groups that fill no row": (
        compressed_config(group_size=40),
        PACKED_4,
        "none of the config's schemes",
    ),
    "compressed: other groups": (
        compressed_config(group_size=64),
        PACKED_4,
        "int 4 bits by group of 64",
    ),
    "compressed: no zeros": (
        compressed_config(symmetric=False),
        PACKED_4,
        'weight_zero_point" is missing',
    ),
    "compressed: zeros not packed": (
        compressed_config(symmetric=False),
        changed(ASYM_4, weight_zero_point=torch.zeros(40, 3, dtype=torch.int8)),
        "needs I32",
    ),
    "compressed: zeros of symmetric weights": (
        compressed_config(),
        PACKED_4 | {".weight_zero_point": torch.ones(40, 3, dtype=torch.int8)},
        "weight_zero_point.*not all of it is 0",
    ),
    "compressed: zeros of symmetric bytes": (
        compressed_config("int-quantized", num_bits=8, strategy="channel"),
        int8_with_zeros(40, 1)[0],
        "weight_zero_point.*not all of it is 0",
    ),
    "compressed: zeros of FP8": (
        compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"),
        changed(int8_with_zeros(40, 1)[0], weight=fp8_codes(40, 96)),
        "weight_zero_point.*not all of it is 0",
    ),
    "compressed: no zeros of bytes": (
        compressed_config("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        changed(int8_with_zeros(40, 1)[0], weight_zero_point=None),
        'weight_zero_point" is missing',
    ),
    "compressed: as many zeros as are not needed": (
        compressed_config("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        changed(int8_with_zeros(40, 1)[0], weight_zero_point=torch.ones(40, 3, dtype=torch.int8)),
        r"weight_zero_point.*needs I8 \[40, 1\]",
    ),
    "compressed: another shape": (
        compressed_config(),
        changed(PACKED_4, weight_shape=torch.tensor([41, 96])),
        "but 40 rows are there",
    ),
    "compressed: no shape": (
        compressed_config(),
        changed(PACKED_4, weight_shape=None),
        "is missing",
    ),
    "compressed: FP8 without a scheme": (
        compressed_config("float-quantized"),
        {".weight": fp8_codes(40, 96), ".weight_scale": torch.ones(40, 1)},
        r"\[40, 1\] scales.*nothing",
    ),
    "bnb: no scales": (BNB, changed(NF4_4, **{"weight.absmax": None}), "absmax. is missing"),
    "bnb: no state": (BNB, changed(NF4_4, **{STATE[1:]: None}), "belongs to is not there"),
    "bnb: no nested scales": (
        BNB,
        changed(NESTED, **{"weight.nested_absmax": None}),
        "nested_absmax. is missing",
    ),
    "bnb: a block too few": (
        BNB,
        changed(NF4_4, **{"weight.absmax": torch.ones(40)}),
        r"absmax.*F32 \[40\]",
    ),
    "bnb: nested scales that are not": (
        BNB,
        changed(NESTED, **{"weight.absmax": torch.ones(41)}),
        r"absmax.*needs U8 \[41\]",
    ),
    "bnb: codes beyond the shape": (BNB, bnb(shape=[30, 70])[0], "needs U8"),
    "bnb: codes that are not there": (BNB, bnb(shape=[1 << 40, 1 << 40])[0], "needs U8"),
    "bnb: blocks of 48": (BNB, bnb(blocksize=48)[0], "blocksize is 48"),
    "bnb: blocks of 64.0": (BNB, bnb(blocksize=64.0)[0], r"blocksize is 64\.0"),
    "bnb: no shape": (BNB, bnb(shape=None)[0], "shape is None"),
    "bnb: another dtype": (BNB, bnb(dtype=["bfloat16"])[0], "dtype is"),
    "bnb: no JSON": (BNB, changed(NF4_4, **{STATE[1:]: torch.zeros(9, dtype=torch.uint8)}), "JSON"),
    "FP8: blocks that are not": (FP8 | {"weight_block_size": [128, 128]}, fp8(), "none of what"),
    "FP8: no block": (FP8 | {"weight_block_size": [128]}, fp8(), "not rows and columns"),
    "FP8: no scale": (FP8, changed(fp8(), weight_scale_inv=None), "F8_E4M3 without a scale"),
    "FP8: a scale alone": (FP8, changed(fp8(), weight=None), "belongs to is not there"),
    "FP8: with FP4": (FP8 | {"expert_dtype": "fp4"}, fp8(), "expert_dtype"),
    "modelopt: AWQ": (
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        {},
        "quant_algo .*; NVFP4, FP8",
    ),
    "mxfp4: no scales": (
        {"quant_method": "mxfp4"},
        {".down_proj_blocks": torch.zeros(2, 3, 4, 16, dtype=torch.uint8)},
        "down_proj_scales. is missing",
    ),
    "mxfp4: blocks of 30": (
        {"quant_method": "mxfp4"},
        {
            ".down_proj_blocks": torch.zeros(2, 3, 4, 15, dtype=torch.uint8),
            ".down_proj_scales": torch.zeros(2, 3, 4, dtype=torch.uint8),
        },
        "needs U8",
    ),
    "no columns": (
        gptq_config(),
        {n: torch.zeros((0, 0), dtype=t.dtype) for n, t in GPTQ_4.items() if n != ".g_idx"},
        "no element",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_what_does_not_hold_together_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, tensors, words = LIES[case]
    with pytest.raises(CheckpointError, match=f"(?s){words}") as raised:
        found(tmp_path, config, tensors)
    assert str(tmp_path) in str(raised.value)


SOUND: list[tuple[dict[str, Any], Tensors]] = [
    (gptq_config(dynamic={"x": {"bits": 8}}), GPTQ_4),
    (AWQ, AWQ_4),
    (compressed_config(symmetric=False), ASYM_4),
    (compressed_config("float-quantized", type="float", num_bits=8), fp8()),
    (BNB, NESTED),
    (FP8, fp8()),
]
ODD: list[Any] = [None, True, 0, -1, 7, 1 << 70, 64.0, 1e999, "", "x", [], [1], {}, {"a": []}]


def with_odd_value(value: Any, rng: random.Random) -> Any:
    """The same but for one value somewhere inside it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return value | {key: with_odd_value(value[key], rng)}
    return rng.choice(ODD)


def test_a_mutated_config_or_state_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(0)
    num_refused = 0
    for round_idx in range(300):
        config, tensors = SOUND[round_idx % len(SOUND)]
        if STATE in tensors and rng.random() < 0.8:
            state = json.loads(bytes(tensors[STATE].tolist()))
            tensors = tensors | {STATE: in_state(with_odd_value(state, rng))}
        else:
            config = with_odd_value(config, rng)
            config = config if isinstance(config, dict) else {"quant_method": config}
        try:
            entries = found(tmp_path, config, tensors)
        except CheckpointError:
            num_refused += 1
            continue
        for entry in entries.values():
            if isinstance(entry, PackedEntry):
                decoded(entry, torch.bfloat16)
    assert num_refused > 100


def test_every_reader_passes_a_checkpoint_without_quantized_weights(tmp_path: Path) -> None:
    """As when all modules were left out."""
    configs: list[dict[str, Any]] = [config for config, _ in SOUND]
    configs += [{"quant_method": "modelopt", "quant_algo": "FP8"}, {"quant_method": "mxfp4"}]
    assert {config["quant_method"] for config in configs} == set(READERS)
    for config in configs:
        entries = found(tmp_path, config, {".weight": torch.ones(2, 2)})
        assert all(isinstance(entry, TensorEntry) for entry in entries.values())
        assert set(entries) == {WEIGHT, "model.norm.weight"}
