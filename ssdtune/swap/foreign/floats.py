"""FP8, NVFP4 and MXFP4: small floats with a scale for each block.

fp8      DeepSeek's and Qwen's blocks (`weight_scale_inv`), and a scale for a row or a tensor (`weight_scale`)
modelopt NVIDIA's: FP8 with a scale for a tensor, NVFP4 with `weight_scale` and `weight_scale_2`
mxfp4    gpt-oss's experts (`_blocks`, `_scales`), transposed to what the model has
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import num_elements
from ssdtune.kernels.nibbles import E2M1, Nibbles, Nvfp4, TurnedMxfp4
from ssdtune.swap.foreign.pile import FLOAT_DTYPES, OTHER_MODEL, Pile, flat, is_alike, weight_dtype
from ssdtune.swap.header import TensorEntry, quoted, refuse

Block = tuple[int, int]  # rows and columns of a matrix that share a scale
FP8: Final = "F8_E4M3"
EXPONENTS: Final = ("U8", "F8_E8M0")  # how files name scales that are powers of two
MODELOPT: Final = ("NVFP4", "FP8", "MIXED_PRECISION")
DEFAULT_BLOCK: Final = (128, 128)  # where quantization_config does not say, as in transformers
# Scales of activations and of the cache, which serve nothing here.
SERVING: Final = tuple(
    f"{of}_{what}"
    for of in (".input", ".output", "activation", ".q", ".k", ".v", ".kv")
    for what in ("scale", "zero_point", "global_scale")
)


def read_fp8(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together the tensors of FP8 that have a scale: for "x" it is "x_scale_inv" or "x_scale"."""
    block = config.get("weight_block_size", DEFAULT_BLOCK)
    if block is not None and not is_block(block):
        pile.refuse_config(f"has weight_block_size {quoted(block)}, not rows and columns")
    if config.get("expert_dtype", "fp8") != "fp8":
        pile.refuse_config(f"has expert_dtype {quoted(config['expert_dtype'])}: not supported")
    for suffix in ("_scale_inv", "_scale"):
        for name in pile.bases(suffix):
            codes = pile.look(name)
            if codes is None or codes.dtype != FP8:
                continue
            scale = pile.take(name + suffix, of=name)
            *_, rows, width = (1, 1, *codes.shape)
            blocks = [(1, width), (rows, width)]
            if block is not None:
                blocks.insert(0, (block[0], block[1]))
            put_scaled(config, pile, codes, scale, blocks)
    pile.drop(*SERVING)
    pile.refuse_left("_scale_inv", ".weight_scale")


def read_modelopt(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together the weights that have a `.weight_scale`."""
    algorithm = config.get("quant_algo")
    if algorithm not in MODELOPT:
        pile.refuse_config(
            f"has quant_algo {quoted(algorithm)}; {', '.join(MODELOPT)} are supported"
        )
    for base in pile.bases(".weight_scale"):
        name = base + ".weight"
        codes = pile.take(name, of=base, rank=2, dtypes=("U8", FP8))
        scale = pile.take(base + ".weight_scale", of=base)
        if codes.dtype == "U8":
            whole = pile.take(base + ".weight_scale_2", of=base)
            put_fp4(config, pile, name, (codes, scale, whole), is_divided=False)
        else:
            put_scaled(config, pile, codes, scale, [(codes.shape[0], codes.shape[1])])
    pile.drop(*SERVING)
    pile.refuse_left(".weight_scale_2", ".pre_quant_scale")


def read_mxfp4(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together "x" of "x_blocks" and "x_scales"."""
    for name in pile.bases("_blocks"):
        blocks = pile.take(name + "_blocks", of=name, rank=4, dtypes=("U8",))
        scales = exponents(pile.take(name + "_scales", of=name, rank=3, dtypes=EXPONENTS))
        experts, rows, num_blocks, _ = blocks.shape
        shape = (experts, 32 * num_blocks, rows)
        pile.put(name, weight_dtype(config, ""), shape, TurnedMxfp4(), [blocks, scales])
    pile.refuse_left("_scales")


def put_scaled(
    config: Mapping[str, Any],
    pile: Pile,
    codes: TensorEntry,
    scale: TensorEntry,
    blocks: Sequence[Block],
    zeros: TensorEntry | None = None,
) -> None:
    """A weight of one byte an element. blocks: what may share a scale; the first that there are scales for is it.
    zeros: of integers, one beside each scale."""
    pile.take(codes.name, of=codes.name)
    if len(codes.shape) < 2 or not num_elements(codes.shape):
        refuse(
            codes.path,
            f"{codes.dtype} of shape {list(codes.shape)} is no matrix.",
            tensor=codes.name,
        )
    if scale.dtype not in (*FLOAT_DTYPES, *EXPONENTS):
        refuse(scale.path, f"scales are not {scale.dtype}.", tensor=scale.name, way_out=OTHER_MODEL)
    kind = "E8M0" if scale.dtype in EXPONENTS else scale.dtype
    formats = [ScaledBytes(block, codes.dtype, kind, zeros is not None) for block in blocks]
    format = next(
        (f for f in formats if is_alike(scale.shape, f.parts(codes.shape)[1].shape)), None
    )
    if format is None:
        refuse(
            scale.path,
            f"{list(scale.shape)} scales for {list(codes.shape)} elements are none of what the config says "
            f"({'; '.join(f.label for f in formats) or 'nothing'}).",
            tensor=scale.name,
            way_out=OTHER_MODEL,
        )
    dtype = weight_dtype(config, scale.dtype)
    parts = [codes, exponents(scale), *([zeros] if zeros else [])]
    pile.put(codes.name, dtype, codes.shape, format, parts)


def put_fp4(
    config: Mapping[str, Any],
    pile: Pile,
    name: str,
    parts: Sequence[TensorEntry],
    *,
    is_divided: bool,
) -> None:
    """A weight of FP4, two elements a byte. parts: codes, scales of blocks, and for NVFP4 the scale of all."""
    codes, scale, *whole = parts
    rows, half = codes.shape
    block = 16 if whole else 32
    if 2 * half % block or scale.shape != (rows, 2 * half // block):
        refuse(
            scale.path,
            f"{list(scale.shape)} scales do not fit {rows} rows of {2 * half} elements in blocks of {block}.",
            tensor=scale.name,
            way_out=OTHER_MODEL,
        )
    dtype, shape = weight_dtype(config, ""), (rows, 2 * half)
    if whole:
        pile.put(name, dtype, shape, Nvfp4(is_divided), [flat(codes), flat(scale), *whole])
    else:
        format = Nibbles(E2M1, block, is_high_first=False, scale="E8M0")
        pile.put(name, dtype, shape, format, [flat(codes), flat(exponents(scale))])


def exponents(scale: TensorEntry) -> TensorEntry:
    """The same, powers of two under the name that formats have for them."""
    return dataclasses.replace(scale, dtype="U8") if scale.dtype in EXPONENTS else scale


def is_block(value: Any) -> bool:
    """Whether it is rows and columns."""
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and all(type(n) is int and n > 0 for n in value)
