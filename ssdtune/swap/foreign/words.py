"""GPTQ as AutoGPTQ and GPTQModel write it, and AWQ as AutoAWQ does: integer codes in words of 32 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ssdtune.kernels.integers import GPTQ_BITS, Awq, Gptq
from ssdtune.swap.foreign.pile import FLOAT_DTYPES, Pile, weight_dtype
from ssdtune.swap.header import quoted

GPTQ_LAYOUTS: Final = {"gptq": True, "gptq_v2": False}  # whether zeros are stored less one
GROUPS: Final = range(1, 1 << 31)
WHOLE: Final = -1  # group_size where a row has one scale


def read_gptq(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together the weights that have a `.qweight`, of the config's bits and groups or what `dynamic` says."""
    layout = str(_first(config, "checkpoint_format", "format", default="gptq")).lower()
    if layout not in GPTQ_LAYOUTS or config.get("is_marlin_format"):
        pile.refuse_config(f"says the layout is {quoted(layout)}; gptq and gptq_v2 are supported")
    for base in pile.bases(".qweight"):
        _put_gptq(pile, base, {**config, **_override(config, base, pile)}, GPTQ_LAYOUTS[layout])
    pile.refuse_left(".qzeros", ".scales", ".g_idx")


def _put_gptq(pile: Pile, base: str, config: Mapping[str, Any], is_v1: bool) -> None:
    name = base + ".weight"
    bits = pile.integer(config, "bits", GPTQ_BITS)
    words = pile.take(base + ".qweight", of=base, rank=2)
    zeros = pile.take(base + ".qzeros", of=base)
    scales = pile.take(base + ".scales", of=base, rank=2, dtypes=FLOAT_DTYPES)
    g_idx = pile.find(base + ".g_idx")
    width = words.shape[0] * 32 // bits
    if g_idx is not None and g_idx.shape and width - 32 < g_idx.shape[0] < width:
        width = g_idx.shape[0]  # the last word is not full
    group = _group(pile, config, "group_size", width)
    is_ordered = g_idx is not None and pile.groups_of(g_idx, width, group, scales.shape[0])
    format = Gptq(bits, group, is_v1, is_ordered, scales.dtype)
    parts = [words, zeros, scales, *([g_idx] if g_idx and is_ordered else [])]
    pile.put(name, weight_dtype(config, scales.dtype), (scales.shape[1], width), format, parts)


def _override(config: Mapping[str, Any], module: str, pile: Pile) -> Mapping[str, Any]:
    """What GPTQModel's `dynamic` says of a module: its first pattern that the name begins with."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        pile.refuse_config(f"has dynamic {quoted(dynamic)}, not rules for modules")
    for pattern, values in dynamic.items():
        try:
            is_met = re.match(pattern.removeprefix("+:").removeprefix("-:"), module)
        except re.error as error:
            pile.refuse_config(
                f"has a rule {quoted(pattern)} in dynamic that is no pattern: {error}"
            )
        if is_met:
            return {} if pattern.startswith("-:") or not isinstance(values, Mapping) else values
    return {}


def read_awq(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together the weights that have a `.qweight`."""
    layout = str(_first(config, "version", "format", default="gemm")).lower()
    if layout != "gemm" or config.get("backend") == "llm-awq":
        pile.refuse_config(f"says the layout is {quoted(layout)}; AutoAWQ's gemm is supported")
    bits = _first(config, "bits", "w_bit", default=4)
    pile.integer({"bits": bits}, "bits", (4,))
    for base in pile.bases(".qweight"):
        words = pile.take(base + ".qweight", of=base, rank=2)
        zeros = pile.take(base + ".qzeros", of=base)
        scales = pile.take(base + ".scales", of=base, rank=2, dtypes=FLOAT_DTYPES)
        key = "q_group_size" if "q_group_size" in config else "group_size"
        group = _group(pile, config, key, words.shape[0])
        if words.shape[0] % group:  # AutoAWQ makes none; as many scales may fit all the same
            pile.refuse_config(
                f"has {key} {group}, and {quoted(base)} has {words.shape[0]} columns, not a multiple"
            )
        pile.put(
            base + ".weight",
            weight_dtype(config, scales.dtype),
            (words.shape[1] * 8, words.shape[0]),
            Awq(group, scales.dtype),
            [words, zeros, scales],
        )
    pile.refuse_left(".qzeros", ".scales")


def _first(config: Mapping[str, Any], *keys: str, default: Any) -> Any:
    """The first of the keys that says something."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _group(pile: Pile, config: Mapping[str, Any], key: str, width: int) -> int:
    """Columns that share a scale."""
    if config.get(key, 128) == WHOLE:
        return max(width, 1)
    return pile.integer(config, key, GROUPS, default=128)
