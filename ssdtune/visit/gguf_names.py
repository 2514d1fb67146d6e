"""A GGUF model under Hugging Face's names: which tensor of the file is which parameter.

    gguf = open_gguf(path)
    config = gguf_config(gguf)                              # or the config.json of the model that was converted
    checkpoint = hf_checkpoint(gguf, config, model_class)   # what `open_checkpoint` gives of a folder of safetensors

Names are by the table of the package `gguf`, which llama.cpp's converter goes by. What the converter does to values is
undone: query and key rows of llama (`PairedRows`), experts stacked to one tensor, dimensions of one left out, the one
that Gemma's norms have more (`LessOne`), gpt-oss's experts cut into gate and up (`TurnedExperts`). Which of that an
architecture wants stands in `gguf_architectures.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

import torch

from ssdtune.kernels.ggml import Ggml
from ssdtune.kernels.ggml_moved import LessOne, PairedRows, TurnedExperts
from ssdtune.swap.foreign.pile import weight_dtype
from ssdtune.swap.gguf import Gguf
from ssdtune.swap.header import TensorEntry, quoted, refuse
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import Checkpoint
from ssdtune.visit.gguf_architectures import OTHER_FILE, Architecture, architecture_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Entry = TensorEntry | PackedEntry

# Tables that llama.cpp computes rotations by; for transformers they are in the config.
ROPE_TABLES: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PAIRED: Final = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(weight|bias)")
_EXPERTS: Final = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<which>gate|up)_exps\.weight")
_TURNED: Final = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<which>gate|up|down)_exps\.(?P<kind>weight|bias)"
)
GIVE_CONFIG: Final = (
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
    architecture = architecture_of(gguf)
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
        elif architecture.is_turned and (match := _TURNED.fullmatch(name)):
            tensors |= _turned(gguf, match, dtype)
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
                way_out=OTHER_FILE,
            )
    return Checkpoint(gguf.path.parent, tensors, gguf.files, gguf.states)


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


def _turned(gguf: Gguf, match: re.Match[str], dtype: str) -> dict[str, PackedEntry]:
    """gpt-oss's experts as the model has them: what the file has as gate and up is one tensor. Of these two, either one
    gives it. match: of the tensor's name."""
    layer, which, kind = match["layer"], match["which"], match["kind"]
    sources, leaf = ["down"], "down_proj"
    if which != "down":
        sources, leaf = ["gate", "up"], "gate_up_proj"
    stored = [_stored(needed(gguf, f"blk.{layer}.ffn_{one}_exps.{kind}")) for one in sources]
    shapes = [list(one.shape) for one in stored]
    if len(shapes[0]) != (3 if kind == "weight" else 2) or shapes[0] != shapes[-1]:
        refuse(
            stored[0].path,
            f"{' and '.join(map(str, shapes))} are no shapes of experts.",
            tensor=stored[0].name,
        )
    name = f"model.layers.{layer}.mlp.experts.{leaf}{'_bias' if kind == 'bias' else ''}"
    experts, rows, *columns = shapes[0]
    shape = (experts, *columns, rows * len(stored))
    format = TurnedExperts(tuple(one.format for one in stored if isinstance(one.format, Ggml)))
    parts = [
        dataclasses.replace(one.parts[0], name=f"{name}.{part.suffix}")
        for one, part in zip(stored, format.parts(shape), strict=True)
    ]
    return {name: PackedEntry(name, stored[0].path, dtype, shape, format, tuple(parts))}


# ---------------------------------------------------------------------------------------- checks


def _check_is_scaled(gguf: Gguf, config: PretrainedConfig, table: str) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default":
        refuse(
            gguf.path,
            "it scales rotations by this table, and the config says that they are not scaled.",
            tensor=table,
            way_out=GIVE_CONFIG,
        )


def needed(gguf: Gguf, name: str) -> Entry:
    """The file's tensor of that name. Raises CheckpointError where there is none."""
    found = gguf.tensors.get(name)
    if found is None:
        refuse(gguf.path, "it is missing.", tensor=name)
    return found
