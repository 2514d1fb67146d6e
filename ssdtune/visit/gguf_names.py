"""A GGUF model under Hugging Face's names: which tensor of the file is which parameter, and the config by its keys.

    gguf = open_gguf(path)
    config = gguf_config(gguf)                              # or the config.json of the model that was converted
    checkpoint = hf_checkpoint(gguf, config, model_class)   # what `open_checkpoint` gives of a folder of safetensors

Names are by the table of the package `gguf`, which llama.cpp's converter goes by. What the converter does to values is
undone: query and key rows of llama (`PairedRows`), experts stacked to one tensor, dimensions of one left out, the one
that Gemma's norms have more (`LessOne`). An architecture whose values it changes otherwise is refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from ssdtune.kernels.formats import num_elements
from ssdtune.kernels.ggml import Ggml, LessOne, PairedRows
from ssdtune.swap.foreign.pile import weight_dtype
from ssdtune.swap.gguf import Gguf
from ssdtune.swap.header import TensorEntry, opened, pread_exactly, quoted, refuse
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Entry = TensorEntry | PackedEntry


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp calls one. model_types: of configs whose models it is; the first, of the config that is made of
    the file's keys. is_paired: whether query and key rows were moved. is_shifted: whether norms have one more. experts:
    their module in a layer, in the names of files that have each for itself; projections: of an expert there. keys:
    beside KEYS, more that the config needs. fixed: values that no key has. untold: what the config must say and no key
    does."""

    model_types: tuple[str, ...]
    is_paired: bool = False
    is_shifted: bool = False
    experts: str = ""
    projections: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj"}
    )
    untold: str = ""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


EXPERT_KEYS: Final = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SHARED_KEYS: Final = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
ARCHITECTURES: Final = {
    "llama": Architecture(("llama", "mistral"), is_paired=True),
    "qwen2": Architecture(("qwen2",)),
    "qwen2moe": Architecture(("qwen2_moe",), experts="mlp.experts", keys=EXPERT_KEYS | SHARED_KEYS),
    "qwen3": Architecture(("qwen3",)),
    "qwen3moe": Architecture(
        ("qwen3_moe",), experts="mlp.experts", keys=EXPERT_KEYS, fixed={"norm_topk_prob": True}
    ),
    "phi3": Architecture(("phi3",)),
    "gemma": Architecture(("gemma",), is_shifted=True),
    "gemma2": Architecture(
        ("gemma2",), is_shifted=True, untold="what queries are divided by, which layers slide"
    ),
    "gemma3": Architecture(
        ("gemma3_text",), is_shifted=True, untold="what queries are divided by, which layers slide"
    ),
}
# What says llama and has experts.
MIXTRAL: Final = Architecture(
    ("mixtral",),
    is_paired=True,
    experts="block_sparse_moe.experts",
    projections={"gate": "w1", "up": "w3"},
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
# What the converter computes for others, so that no move gives it back.
COMPUTED: Final = {
    "nemotron": "adds one to the weights of norms",
    "qwen35": "adds one to the weights of norms",
    "qwen35moe": "adds one to the weights of norms",
    "mamba": "stores -exp(A_log)",
}
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
# Tables that llama.cpp computes rotations by; for transformers they are in the config.
ROPE_TABLES: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PAIRED: Final = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(weight|bias)")
_EXPERTS: Final = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<which>gate|up)_exps\.weight")
_OTHER_FILE: Final = (
    "Nothing was loaded. Use the safetensors of this model: as published, or by `ssdtune pack`."
)
_GIVE_CONFIG: Final = (
    "Nothing was loaded. Use the config.json of the model that the file was made of."
)


def hf_checkpoint(
    gguf: Gguf, config: PretrainedConfig, model_class: type[PreTrainedModel]
) -> Checkpoint:
    """The file's tensors as the model names and shapes them, packed as they lie.

    config: the model's; a packed tensor has its dtype, or bfloat16 where it states none. model_class: is built on the
    meta device for its names. Raises CheckpointError for an architecture that is not read, a tensor that the model has
    no place for, and where rotations are scaled but the config does not say so.
    """
    architecture = _architecture(gguf)
    if config.model_type not in architecture.model_types:
        refuse(
            gguf.path,
            f"it is {quoted(gguf.architecture)}, the config is of a {quoted(config.model_type)}: they do not belong "
            "together.",
        )
    shapes = _parameters(model_class, config)
    names = _names(gguf, config.num_hidden_layers, shapes)
    dtype = weight_dtype({"dtype": getattr(config, "dtype", None)}, "")
    tensors: dict[str, Entry] = {}
    for name, entry in gguf.tensors.items():
        if name in ROPE_TABLES:
            _check_is_scaled(gguf, config, name)
        elif architecture.experts and (match := _EXPERTS.fullmatch(name)):
            prefix = f"model.layers.{match['layer']}.{architecture.experts}"
            for number, one in enumerate(_each(entry)):
                leaf = architecture.projections[match["which"]]
                target = f"{prefix}.{number}.{leaf}.weight"
                tensors[target] = _renamed(one, target, dtype)
        elif name in names:
            target, stored = names[name], _undone(entry, architecture, config)
            tensors[target] = _renamed(_shaped(stored, shapes[target]), target, dtype)
        else:
            refuse(
                entry.path,
                f"{model_class.__name__} has no place for it.",
                tensor=name,
                way_out=_OTHER_FILE,
            )
    return Checkpoint(gguf.path.parent, tensors, gguf.files, gguf.states)


def _architecture(gguf: Gguf) -> Architecture:
    name = gguf.architecture
    if name in COMPUTED:
        refuse(
            gguf.path,
            f"it is {quoted(name)}: for that, llama.cpp's converter {COMPUTED[name]}. Values are not computed while a "
            "model is read.",
            way_out=_OTHER_FILE,
        )
    if name not in ARCHITECTURES:
        refuse(
            gguf.path,
            f"its architecture is {quoted(name)}; {', '.join(ARCHITECTURES)} are read.",
            way_out=_OTHER_FILE,
        )
    if name == "llama" and gguf.metadata.get("llama.expert_count", 0):
        return MIXTRAL
    return ARCHITECTURES[name]


# ------------------------------------------------------------------------------------------ names


def _parameters(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the model's state dict holds, by name."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _names(gguf: Gguf, num_layers: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Names of parameters by those that tensors have in the file."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        refuse(
            gguf.path,
            "the names of tensors in GGUF files are in the package gguf, which is not installed.",
            way_out="Run: pip install gguf",
            cause=error,
        )
    number = next(n for n, name in MODEL_ARCH_NAMES.items() if name == gguf.architecture)
    table = get_tensor_name_map(number, num_layers)
    names: dict[str, str] = {}
    for name in shapes:
        # Experts that are one parameter have no suffix in the model, and one in the file.
        base, suffix = name, ".weight"
        if name.endswith((".weight", ".bias")):
            base, _, suffix = name.rpartition(".")
            suffix = "." + suffix
        found = table.get_name(base)
        if found is not None:
            names.setdefault(found + suffix, name)
    return names


# ---------------------------------------------------------------------------------------- entries


def _renamed(entry: Entry, name: str, dtype: str) -> Entry:
    if isinstance(entry, TensorEntry):
        return dataclasses.replace(entry, name=name)
    [blocks] = entry.parts
    blocks = dataclasses.replace(blocks, name=f"{name}.blocks")
    return dataclasses.replace(entry, name=name, dtype=dtype, parts=(blocks,))


def _shaped(entry: Entry, shape: tuple[int, ...]) -> Entry:
    """The entry in this shape, where it differs in dimensions of one only: the converter leaves them out."""
    plain = [[n for n in one if n != 1] for one in (entry.shape, shape)]
    return dataclasses.replace(entry, shape=shape) if plain[0] == plain[1] else entry


def _each(entry: Entry) -> Iterator[Entry]:
    """Along the first dimension, each for itself. Their names stay."""
    number, *shape = entry.shape
    for i in range(number):
        if isinstance(entry, TensorEntry):
            yield _cut(entry, i, number, tuple(shape))
        else:
            num_bytes = entry.num_bytes // number
            blocks = _cut(entry.parts[0], i, number, (num_bytes,))
            yield dataclasses.replace(entry, shape=tuple(shape), parts=(blocks,))


def _cut(entry: TensorEntry, i: int, number: int, shape: tuple[int, ...]) -> TensorEntry:
    """Part i of a tensor in equal parts."""
    num_bytes = entry.num_bytes // number
    start = entry.start + i * num_bytes
    return dataclasses.replace(entry, shape=shape, start=start, num_bytes=num_bytes)


def _undone(entry: Entry, architecture: Architecture, config: PretrainedConfig) -> Entry:
    """The tensor without what the converter did to it."""
    if architecture.is_paired and (match := _PAIRED.fullmatch(entry.name)):
        return _paired(entry, config, match["which"])
    if architecture.is_shifted and entry.name.endswith("_norm.weight"):
        stored = _stored(entry)
        assert isinstance(stored.format, Ggml)
        return dataclasses.replace(stored, format=LessOne(stored.format))
    return entry


def _stored(entry: Entry) -> PackedEntry:
    """The tensor as one of ggml's types, which plain ones are too."""
    if isinstance(entry, PackedEntry):
        return entry
    blocks = dataclasses.replace(entry, dtype="U8", shape=(entry.num_bytes,))
    format = Ggml(entry.dtype)
    return PackedEntry(entry.name, entry.path, entry.dtype, entry.shape, format, (blocks,))


def _paired(entry: Entry, config: PretrainedConfig, which: str) -> PackedEntry:
    """Query or key rows in the order that the model has them."""
    num_heads = config.num_attention_heads if which == "q" else config.num_key_value_heads
    if entry.shape[0] % (2 * num_heads):
        refuse(
            entry.path,
            f"{entry.shape[0]:,} rows are not {num_heads} heads of pairs.",
            tensor=entry.name,
        )
    stored = _stored(entry)
    assert isinstance(stored.format, Ggml)
    return dataclasses.replace(stored, format=PairedRows(stored.format, num_heads))


# ----------------------------------------------------------------------------------------- config


def gguf_config(gguf: Gguf) -> PretrainedConfig:
    """The config that the file's keys describe, with a dtype: the files', bfloat16 where weights are quantized.

    Raises CheckpointError for an architecture that is not read, a key that is missing or not of its kind, and rotations
    that are scaled in a way that the keys do not say in full.
    """
    from transformers import AutoConfig

    architecture = _architecture(gguf)
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
    values["rope_parameters"] = _rope(gguf, of, values["head_dim"])
    values["vocab_size"] = _needed(gguf, "token_embd.weight").shape[0]
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
                way_out=_GIVE_CONFIG,
            )
        return found

    def text(self, key: str, default: str) -> str:
        """A string."""
        return str(self._gguf.metadata.get(f"{self._gguf.architecture}.{key}", default))


def _rope(gguf: Gguf, of: _Keys, head_dim: int) -> dict[str, Any]:
    """rope_parameters: plain rotations, or Llama 3.1's."""
    base = of.number("rope.freq_base", DEFAULT_ROPE_BASE)
    rotated = of.number("rope.dimension_count", head_dim)
    scaling = of.text("rope.scaling.type", "none")
    if rotated != head_dim or scaling != "none":
        refuse(
            gguf.path,
            f"it rotates {rotated} of {head_dim} columns of a head, scaled by {quoted(scaling)}: its keys do not say "
            "all that the config must.",
            way_out=_GIVE_CONFIG,
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
            way_out=_GIVE_CONFIG,
        )
    return scaled


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


def _check_is_scaled(gguf: Gguf, config: PretrainedConfig, table: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        refuse(
            gguf.path,
            "it scales rotations by this table, and the config says that they are not scaled.",
            tensor=table,
            way_out=_GIVE_CONFIG,
        )


def _values(gguf: Gguf, name: str) -> list[float]:
    """Of a small tensor."""
    entry = gguf.tensors[name]
    if entry.dtype != "F32" or isinstance(entry, PackedEntry) or num_elements(entry.shape) > 4096:
        refuse(entry.path, "it is no small float32 tensor.", tensor=name)
    with opened(entry.path) as fd:
        raw = pread_exactly(entry.path, fd, entry.num_bytes, entry.start)
    return list(struct.unpack(f"<{num_elements(entry.shape)}f", raw))


def _needed(gguf: Gguf, name: str) -> Entry:
    found = gguf.tensors.get(name)
    if found is None:
        refuse(gguf.path, "it is missing.", tensor=name)
    return found


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
