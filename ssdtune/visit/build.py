"""A Hugging Face model without its weights: every parameter on the meta device, all else real.

    meta = build_meta("meta-llama/Llama-3.1-8B", dtype="auto")
    placements = place(meta.model, meta.checkpoint.tensors)

Parameters are meta tensors of the dtype that each will have. Buffers are real, on the CPU, and hold
what a normal build computes; persistent ones are to be filled from the files. Where the files hold
packed weights, the model is the one whose plain weights they stand for.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.swap import foreign, pack_header
from ssdtune.swap.beside import QUANTIZATION
from ssdtune.swap.foreign.sidecars import described_beside
from ssdtune.swap.gguf import open_gguf
from ssdtune.swap.header import TensorEntry
from ssdtune.swap.source import Checkpoint, open_checkpoint
from ssdtune.visit.asked import (
    HUB_KEYS,
    MODEL_KEYS,
    BuildError,
    check_layer_counts,
    chosen_dtype,
    find_folder,
    read_config,
    refuse,
)
from ssdtune.visit.bare import build_bare
from ssdtune.visit.classes import choose_class, own_config
from ssdtune.visit.gguf_config import gguf_config
from ssdtune.visit.gguf_names import hf_checkpoint

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where the weights are that a model's were packed from.

    source: a folder or a hub id; None where nobody has noted it. open: builds the model there with the arguments that
    this one was built with.
    """

    source: str | None
    open: Callable[[str], MetaModel]


@dataclasses.dataclass(frozen=True, slots=True)
class MetaModel:
    """A model on meta and where it came from."""

    model: PreTrainedModel
    folder: Path
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    checkpoint: Checkpoint
    origin: Origin


def build_meta(
    model_name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    model_class: type | None = None,
    trust_remote_code: bool = False,
    bits: int | None = None,
    **from_pretrained_kwargs: Any,
) -> MetaModel:
    """Build the model of a local folder or a hub id as `from_pretrained` would, without weights.

    dtype: "auto" is the config's, or that of the files where it says none. model_class: a model
    class or an Auto class, where the choice by config is not the one that is wanted. bits: to be
    read at most of nested codes, where the model is packed; None: all. The rest: HUB_KEYS,
    MODEL_KEYS, `config`, and names of config values to override; anything else is refused by name.
    Raises BuildError, or CheckpointError for damaged files.
    """
    again = partial(
        build_meta,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        **from_pretrained_kwargs,
    )
    kwargs = {k: v for k, v in from_pretrained_kwargs.items() if v is not None}
    dtype = chosen_dtype(dtype, kwargs)
    refuse(kwargs)
    hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
    for_model = {key: kwargs.pop(key) for key in MODEL_KEYS if key in kwargs}
    name = os.fspath(model_name_or_path)
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        model, checkpoint = _of_gguf(path, model_class, kwargs, dtype=dtype, **for_model)
        return _meta(model, name, path.parent, checkpoint, Origin(None, again))
    folder = find_folder(model_name_or_path, with_code=trust_remote_code, **hub)
    config = read_config(folder, kwargs, trust_remote_code=trust_remote_code)
    origin = Origin(_noted_source(config), again)
    if any(vars(part).get(QUANTIZATION) is not None for part in _parts(config)):
        config = copy.deepcopy(config)  # it may be the caller's, and loses that
    checkpoint = _unpacked(config, open_checkpoint(folder), bits)
    check_layer_counts(config, len(checkpoint.tensors))
    chosen = choose_class(config, model_class, folder, trust_remote_code=trust_remote_code)
    config = own_config(chosen, config)
    model = build_bare(chosen, folder, checkpoint, config=config, dtype=dtype, **for_model)
    return _meta(model, name, folder, checkpoint, origin)


def _of_gguf(
    path: Path,
    model_class: type | None,
    kwargs: dict[str, Any],
    **for_model: Any,
) -> tuple[PreTrainedModel, Checkpoint]:
    """The model of a GGUF file, its config made from what the file says unless one is given. kwargs: `config`, and
    values of the config to override."""
    found = open_gguf(path)
    config = kwargs.pop("config", None) or gguf_config(found)
    unknown = sorted(key for key in kwargs if not hasattr(config, key))
    if unknown:
        raise BuildError(f"unknown argument {unknown[0]}: not a value of {type(config).__name__}.")
    config.update(kwargs)
    chosen = choose_class(config, model_class, path.parent, trust_remote_code=False)
    config = own_config(chosen, config)
    checkpoint = hf_checkpoint(found, config, chosen)
    return build_bare(chosen, None, checkpoint, config=config, **for_model), checkpoint


def _meta(
    model: PreTrainedModel, name: str, folder: Path, checkpoint: Checkpoint, origin: Origin
) -> MetaModel:
    model.name_or_path = model.config.name_or_path = name  # what an adapter's config will say
    generation = model.generation_config if model.can_generate() else None
    return MetaModel(model, folder, model.config, generation, checkpoint, origin)


def _unpacked(config: PretrainedConfig, checkpoint: Checkpoint, bits: int | None) -> Checkpoint:
    """The tensors that quantized ones stand for; takes the quantization out of the config, for the model that is built
    has plain weights."""
    said = [vars(part).pop(QUANTIZATION, None) for part in _parts(config)]
    quantization = next((one for one in said if one is not None), None)
    if quantization is None and pack_header.is_packed(checkpoint):  # the config has lost it
        return pack_header.unpacked(checkpoint, bits=bits)
    if quantization is None:
        beside = described_beside(checkpoint)
        if beside is None:
            return checkpoint
        path, described = beside
    else:
        described = quantization if isinstance(quantization, dict) else quantization.to_dict()
        path = checkpoint.folder / "config.json"
    if described.get("quant_method") == pack_header.METHOD:
        pack_header.check_version(path, described.get("version", pack_header.VERSION))
        return pack_header.unpacked(checkpoint, bits=bits)
    plain = {n: e for n, e in checkpoint.tensors.items() if isinstance(e, TensorEntry)}
    stated = getattr(config, "dtype", None)
    if stated is not None:
        described = {"torch_dtype": str(stated).removeprefix("torch."), **described}
    return dataclasses.replace(checkpoint, tensors=foreign.recognise(described, plain, path))


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Where a config may say how weights are quantized, as transformers looks for it: itself, that of its text model."""
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _noted_source(config: PretrainedConfig) -> str | None:
    """What the folder was packed from, as `ssdtune pack` noted it (docs/format.md)."""
    quantization = vars(config).get(QUANTIZATION)
    found = quantization.get("source") if isinstance(quantization, dict) else None
    return found if isinstance(found, str) else None
