"""The config that a GGUF file's keys describe.

    config = gguf_config(open_gguf(path))

Names of keys: ggml's docs/gguf.md and the package `gguf`. What no key says is refused, but for what llama.cpp has as
constants of an architecture (`Architecture.fixed`, `.yarn`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ssdtune.kernels.formats import num_elements
from ssdtune.swap.gguf import Gguf
from ssdtune.swap.header import opened, pread_exactly, quoted, refuse
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.gguf_architectures import architecture_of
from ssdtune.visit.gguf_names import GIVE_CONFIG, ROPE_TABLES, needed

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEYS: Final = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
TOKEN_KEYS: Final = {"bos": "bos", "eos": "eos", "padding": "pad"}
DEFAULT_ROPE_BASE: Final = 10000.0  # llama.cpp's, where a file has none
# What Llama 3.1 and later have beside the factor, to which the file's own values are compared.
LLAMA3_ROPE: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_KEYS: Final = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def gguf_config(gguf: Gguf) -> PretrainedConfig:
    """The config that the file's keys describe, with a dtype: the files', bfloat16 where weights are quantized.

    Raises CheckpointError for an architecture that is not read, a key that is missing or not of its kind, and rotations
    that are scaled in a way that the keys do not say in full.
    """
    from transformers import AutoConfig

    architecture = architecture_of(gguf)
    if architecture.untold:
        refuse(
            gguf.path,
            f"its keys do not say all that the config must: {architecture.untold}.",
            way_out="Nothing was loaded. Give config= of the model that the file was made of to ssdtune.stream.",
        )
    of = _Keys(gguf)
    keys = {**KEYS, **architecture.keys}
    values: dict[str, Any] = {name: of.number(key) for key, name in keys.items()}
    num_heads = values["num_attention_heads"]
    values["num_key_value_heads"] = of.number("attention.head_count_kv", num_heads)
    head_dim = values["hidden_size"] // num_heads
    if architecture.is_paired:  # its models rotate whole heads
        head_dim = of.number("rope.dimension_count", head_dim)
    values["head_dim"] = of.number("attention.key_length", head_dim)
    values["rope_parameters"] = _rope(gguf, of, values["head_dim"], architecture.yarn)
    values["vocab_size"] = needed(gguf, "token_embd.weight").shape[0]
    # llama.cpp's converter leaves it out where it is the embedding.
    values["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for key, name in TOKEN_KEYS.items():
        values[f"{name}_token_id"] = gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
    values["dtype"] = _dtype(gguf)
    return AutoConfig.for_model(architecture.model_types[0], **values, **architecture.fixed)


class _Keys:
    """What the file says under its architecture's name."""

    def __init__(self, gguf: Gguf) -> None:
        self._gguf = gguf

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number. Refuses where there is none and no default, and lists: one for each layer."""
        name = f"{self._gguf.architecture}.{key}"
        found = self._gguf.metadata.get(name, default)
        if type(found) not in (int, float) or not 0 < found < math.inf:  # type: ignore[operator]
            refuse(
                self._gguf.path,
                f"{name} is {quoted(found)}, not a number above zero.",
                way_out=GIVE_CONFIG,
            )
        return found

    def text(self, key: str, default: str) -> str:
        """A string."""
        return str(self._gguf.metadata.get(f"{self._gguf.architecture}.{key}", default))


def _rope(gguf: Gguf, of: _Keys, head_dim: int, yarn: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters: plain rotations, Llama 3.1's, or scaled by YaRN where `yarn` says what no key does."""
    base = of.number("rope.freq_base", DEFAULT_ROPE_BASE)
    rotated = of.number("rope.dimension_count", head_dim)
    scaling = of.text("rope.scaling.type", "none")
    if rotated == head_dim and scaling == "yarn" and yarn:
        return _yarn(gguf, of, {"rope_theta": base, **yarn})
    if rotated != head_dim or scaling != "none":
        refuse(
            gguf.path,
            f"it rotates {rotated} of {head_dim} columns of a head, scaled by {quoted(scaling)}: its keys do not say "
            "all that the config must.",
            way_out=GIVE_CONFIG,
        )
    plain = {"rope_type": "default", "rope_theta": base}
    tables = [name for name in ROPE_TABLES if name in gguf.tensors]
    if not tables:
        return plain
    found = _values(gguf, tables[0]) if tables == ["rope_freqs.weight"] else []
    scaled = {"rope_type": "llama3", "rope_theta": base, "factor": max(found, default=1.0)}
    scaled |= LLAMA3_ROPE
    expected = _llama3_divisors(scaled, head_dim)
    if len(found) != len(expected) or not all(map(_is_close, found, expected)):
        refuse(
            gguf.path,
            "it scales rotations by a table that is not Llama 3's.",
            tensor=tables[0],
            way_out=GIVE_CONFIG,
        )
    return scaled


def _yarn(gguf: Gguf, of: _Keys, values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters of YaRN (Peng et al., arXiv 2309.00071). values: those that a file need not have."""
    prefix = f"{gguf.architecture}.rope.scaling."
    told = {key.removeprefix(prefix) for key in gguf.metadata if key.startswith(prefix)}
    unknown = sorted(told - YARN_KEYS.keys() - {"type", "finetuned"})
    if unknown:
        refuse(
            gguf.path,
            f"{prefix}{unknown[0]} scales rotations in a way that is not read.",
            way_out=GIVE_CONFIG,
        )
    found = {
        name: of.number(f"rope.scaling.{key}", values.get(name)) for key, name in YARN_KEYS.items()
    }
    return {"rope_type": "yarn", **values, **found}


def _llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """By what Llama 3.1 divides the frequency of each pair: 1 for short waves, the factor for long ones, and between
    them the harmonic mean of both that goes with the wave's length (transformers, `_compute_llama3_parameters`)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors: list[float] = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return divisors


def _is_close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-3)  # float32's powers, in another order


def _values(gguf: Gguf, name: str) -> list[float]:
    """Of a small tensor."""
    entry = gguf.tensors[name]
    if entry.dtype != "F32" or isinstance(entry, PackedEntry) or num_elements(entry.shape) > 4096:
        refuse(entry.path, "it is no small float32 tensor.", tensor=name)
    with opened(entry.path) as fd:
        raw = pread_exactly(entry.path, fd, entry.num_bytes, entry.start)
    return list(struct.unpack(f"<{num_elements(entry.shape)}f", raw))


def _dtype(gguf: Gguf) -> str:
    """Of weights that are not quantized, if all matrices are alike; bfloat16 if one is quantized."""
    found = {
        "BF16" if isinstance(entry, PackedEntry) else entry.dtype
        for entry in gguf.tensors.values()
        if len(entry.shape) > 1
    }
    return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(
        frozenset(found), "bfloat16"
    )
