"""compressed-tensors, as llm-compressor writes it: several schemes may be in one model, and a weight's tensors tell its
own.

    weight_packed I32        integers of 1-8 bits in streams ("pack-quantized")
    weight_packed U8         FP4: NVFP4 where there is a weight_global_scale, else MXFP4
    weight F8_E4M3 or I8     times a scale per tensor, row, block or group ("float-", "int-", "mxfp8-quantized"); I8
                             less a zero of the same, if there is one

The config's groups say bits, groups and symmetry, and for which modules; which of them is a weight's follows from the
shapes, so that no names or classes of modules are needed. Where none of them fits, the weight is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from ssdtune.kernels.float8 import CODES
from ssdtune.kernels.integers import PackQuantized, num_groups, num_words
from ssdtune.swap.foreign.floats import SERVING, Block, is_block, put_fp4, put_scaled
from ssdtune.swap.foreign.pile import FLOAT_DTYPES, OTHER_MODEL, Pile, weight_dtype
from ssdtune.swap.header import TensorEntry, quoted, refuse

LAYOUTS: Final = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
POSITIVE: Final = range(1, 1 << 31)


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How some of the weights are quantized. group, block: for the strategies of these names."""

    bits: int
    is_integer: bool
    is_symmetric: bool
    strategy: str
    group: int
    block: Block

    def __str__(self) -> str:
        kind = "int" if self.is_integer else "float"
        detail = {"group": f" of {self.group}", "block": f" of {list(self.block)}"}
        return f"{kind} {self.bits} bits by {self.strategy}{detail.get(self.strategy, '')}"

    def blocks(self, rows: int, width: int) -> Block:
        """Rows and columns that share a scale in a matrix."""
        found = {"tensor": (rows, width), "channel": (1, width), "block": self.block}
        return found.get(self.strategy, (1, self.group))

    def has_packed(self, width: int, num_packed: int, num_scales: int) -> bool:
        """Whether rows of so many columns, in so many words with so many scales, can be of this scheme."""
        if not self.is_integer or self.strategy not in ("group", "channel"):
            return False
        group = self.blocks(1, width)[1]
        if width % group:  # the library makes none; as many scales may fit all the same
            return False
        return num_words(width, self.bits) == num_packed and num_groups(width, group) == num_scales


def read(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together the weights that are packed or have a scale."""
    schemes = _schemes(config, pile)
    for base in pile.bases(".weight_packed"):
        packed = pile.take(base + ".weight_packed", of=base, rank=2, dtypes=("I32", "U8"))
        put = _put_integers if packed.dtype == "I32" else _put_fp4
        put(config, pile, base, packed, schemes)
    for base in pile.bases(".weight_scale"):
        weight = pile.take(base + ".weight", of=base, dtypes=tuple(CODES))
        scale = pile.take(base + ".weight_scale", of=base)
        fitting = [s for s in schemes if s.is_integer == (weight.dtype == "I8")]
        zeros = _zeros_of_bytes(pile, base, fitting)
        blocks = [s.blocks(*(1, 1, *weight.shape)[-2:]) for s in fitting]
        put_scaled(config, pile, weight, scale, blocks, zeros)
    pile.drop(*SERVING)
    pile.refuse_left(".weight_zero_point", ".weight_g_idx", ".weight_shape", ".weight_global_scale")


def _refuse(entry: TensorEntry, weight: str, why: str) -> NoReturn:
    """Refuses a weight because of one of its tensors."""
    refuse(entry.path, why, tensor=weight, way_out=OTHER_MODEL)


def _zeros_of_bytes(pile: Pile, base: str, fitting: Sequence[Scheme]) -> TensorEntry | None:
    """The zeros of a weight's bytes where one of them is not 0: they, not the config, tell which of two schemes that
    differ in symmetry it is of."""
    name = base + ".weight_zero_point"
    has_none = not fitting or any(s.is_symmetric for s in fitting)
    zeros = pile.find(name) if has_none else pile.take(name, of=base)
    if zeros is None or pile.is_zero(zeros):
        return None
    if not any(s.is_integer and not s.is_symmetric for s in fitting):
        _refuse_zeros(zeros)
    return zeros


def _refuse_zeros(zeros: TensorEntry) -> NoReturn:
    """Of symmetric weights, whose zeros may be in the file and say nothing."""
    _refuse(
        zeros,
        zeros.name,
        "not all of it is 0, and the config's schemes for such weights have no zeros.",
    )


def _put_integers(
    config: Mapping[str, Any],
    pile: Pile,
    base: str,
    packed: TensorEntry,
    schemes: Sequence[Scheme],
) -> None:
    rows, width = _shape(pile, base, packed)
    scale = pile.take(base + ".weight_scale", of=base, rank=2, dtypes=FLOAT_DTYPES)
    num_packed, num_scales = packed.shape[1], scale.shape[1]
    zeros, g_idx = pile.find(base + ".weight_zero_point"), pile.find(base + ".weight_g_idx")
    fitting = [s for s in schemes if s.has_packed(width, num_packed, num_scales)]
    if not fitting:
        _refuse(
            packed,
            base,
            f"{num_packed} words and {num_scales} scales for {width} columns are none of the config's schemes "
            f"({'; '.join(map(str, schemes))}).",
        )
    scheme = next((s for s in fitting if s.is_symmetric == (zeros is None)), fitting[0])
    if scheme.is_symmetric and zeros is not None and not pile.is_zero(zeros):
        _refuse_zeros(zeros)
    group = scheme.blocks(rows, width)[1]
    parts = [packed, scale]
    if not scheme.is_symmetric:
        parts.append(zeros or pile.take(base + ".weight_zero_point", of=base))
    # -1 is what a g_idx has that was never set.
    is_ordered = (
        g_idx is not None
        and not bool((pile.values(g_idx) == -1).any())
        and pile.groups_of(g_idx, width, group, num_scales)
    )
    if g_idx is not None and is_ordered:
        parts.append(g_idx)
    format = PackQuantized(scheme.bits, group, not scheme.is_symmetric, is_ordered, scale.dtype)
    pile.put(base + ".weight", weight_dtype(config, scale.dtype), (rows, width), format, parts)


def _shape(pile: Pile, base: str, packed: TensorEntry) -> tuple[int, int]:
    """Rows and columns that were packed."""
    entry = pile.take(base + ".weight_shape", of=base, dtypes=("I64", "I32"))
    shape = pile.values(entry).tolist()
    if entry.shape != (2,) or shape[0] != packed.shape[0] or shape[1] < 1:
        _refuse(
            entry, entry.name, f"it says {quoted(shape)}, but {packed.shape[0]} rows are there."
        )
    return shape[0], shape[1]


def _put_fp4(
    config: Mapping[str, Any],
    pile: Pile,
    base: str,
    packed: TensorEntry,
    schemes: Sequence[Scheme],
) -> None:
    scale = pile.take(base + ".weight_scale", of=base, rank=2)
    whole = pile.find(base + ".weight_global_scale")
    if not any(s.bits == 4 and not s.is_integer for s in schemes):
        _refuse(packed, base, "FP4, of which the config says nothing.")
    parts = [packed, scale, *([whole] if whole else [])]
    put_fp4(config, pile, base + ".weight", parts, is_divided=True)


def _schemes(config: Mapping[str, Any], pile: Pile) -> list[Scheme]:
    """The config's, checked."""
    layout = config.get("format")
    if layout not in LAYOUTS:
        pile.refuse_config(f"has format {quoted(layout)}; {', '.join(LAYOUTS)} are supported")
    for key in ("sparsity_config", "transform_config"):
        more = config.get(key) or {}
        if (
            not isinstance(more, Mapping)
            or more.get("format", "dense") != "dense"
            or more.get("config_groups")
        ):
            pile.refuse_config(f"has a {key}: not supported")
    groups = config.get("config_groups")
    described = list(groups.values()) if isinstance(groups, Mapping) else [groups]
    schemes: list[Scheme] = []
    for group in described:
        if not isinstance(group, Mapping):
            pile.refuse_config(f"has config_groups {quoted(group)} that do not describe weights")
        if group.get("weights") is not None:
            schemes.append(_scheme(group["weights"], pile))
    return schemes


def _scheme(weights: Any, pile: Pile) -> Scheme:
    if not isinstance(weights, Mapping):
        pile.refuse_config(f"has weights {quoted(weights)}")
    group = weights.get("group_size")
    inferred = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = weights.get("strategy") or inferred
    if strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
        pile.refuse_config(f"quantizes weights by {quoted(strategy)}: not supported")
    block = weights.get("block_structure") or (1, 1)
    if isinstance(block, str):  # as earlier versions wrote it: "128x128"
        block = [int(n) if n.isdecimal() else 0 for n in block.split("x")]
    if strategy == "block" and not is_block(block):
        pile.refuse_config(f"has block_structure {quoted(block)}, not rows and columns")
    return Scheme(
        bits=pile.integer(weights, "num_bits", range(1, 9)),
        is_integer=weights.get("type", "int") == "int",
        is_symmetric=bool(weights.get("symmetric", True)),
        strategy=strategy,
        group=pile.integer(weights, "group_size", POSITIVE) if "group" in strategy else 1,
        block=(block[0], block[1]) if strategy == "block" else (1, 1),
    )
