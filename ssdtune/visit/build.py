"""A Hugging Face model without its weights: every parameter on the meta device, all else real.

`from_pretrained` does everything but load: it picks the dtype, reads the config, makes the modules,
sets the attention, the generation config and eval mode. So its own code runs here, in a subclass
of the model's class whose two loading steps are replaced (`_load_pretrained_model` reads nothing,
`_finalize_model_loading` makes buffers and ties). The instance gets its own class back.

    meta = build_meta("meta-llama/Llama-3.1-8B", dtype="auto")
    placements = place(meta.model, meta.checkpoint.tensors)

Parameters are meta tensors of the dtype that each will have. Buffers are real, on the CPU, and hold
what a normal build computes; persistent ones are to be filled from the files.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.swap import foreign, pack_header
from ssdtune.swap.gguf import open_gguf
from ssdtune.swap.header import TensorEntry
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import Checkpoint, open_checkpoint
from ssdtune.visit.gguf_config import gguf_config
from ssdtune.visit.gguf_names import hf_checkpoint
from ssdtune.visit.placement import CASTABLE, FILE_DTYPES, plain_targets

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

# Only what a model needs, and none of the other copies of the weights that some repositories hold.
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
HUB_FILES_LEFT_OUT = ["*/*", "consolidated*"]
HUB_KEYS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
MODEL_KEYS = ("attn_implementation", "experts_implementation")
REFUSED = {
    "quantization_config": "weights are not quantized while loading; run `ssdtune pack` once",
    "load_in_4bit": "weights are not quantized while loading; run `ssdtune pack --bits 4` once",
    "load_in_8bit": "weights are not quantized while loading; run `ssdtune pack --bits 8` once",
    "gguf_file": "give the path of the .gguf file itself as the model",
    "device_map": "ssdtune places the weights itself; give `offload` budgets instead",
    "max_memory": "ssdtune places the weights itself; give `offload` budgets instead",
    "offload_folder": "weights are read in place from the model's own files",
    "low_cpu_mem_usage": "the full weights are never in memory anyway; leave it out",
    "variant": "only the folder's main safetensors files are read",
    "subfolder": "give the folder itself",
}
# No checkpoint has fewer tensors than layers; below this many layers nobody waits for the modules.
LAYERS_ALWAYS_FINE = 1000
LAYER_COUNTS = re.compile(r"^(n|num|encoder|decoder)_(hidden_|encoder_|decoder_)?layers?$|^depth$")
COMPARED_AT_A_TIME = 1 << 20  # elements


class BuildError(SSDTuneError):
    """The model cannot be built: not found, not supported, or asked for with what is not honoured."""


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
    class or an Auto class, where the choice by config is not the one that is wanted. bits: to be read at most of
    nested codes, where the model is packed; None: all. The rest: HUB_KEYS, MODEL_KEYS, `config`, and names of config values to override; anything else is
    refused by name. Raises BuildError, or CheckpointError for damaged files.
    """
    again = partial(
        build_meta,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        **from_pretrained_kwargs,
    )
    kwargs = {k: v for k, v in from_pretrained_kwargs.items() if v is not None}
    dtype = _chosen_dtype(dtype, kwargs)
    _refuse(kwargs)
    hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
    for_model = {key: kwargs.pop(key) for key in MODEL_KEYS if key in kwargs}
    name = os.fspath(model_name_or_path)
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        model, checkpoint = _of_gguf(path, model_class, kwargs, dtype=dtype, **for_model)
        return _meta(model, name, path.parent, checkpoint, Origin(None, again))
    folder = find_folder(model_name_or_path, with_code=trust_remote_code, **hub)
    config = _load_config(folder, kwargs, trust_remote_code=trust_remote_code)
    origin = Origin(_noted_source(config), again)
    if getattr(config, "quantization_config", None) is not None:
        config = copy.deepcopy(config)  # it may be the caller's, and loses that
    checkpoint = _unpacked(config, open_checkpoint(folder), bits)
    _check_layer_counts(config, len(checkpoint.tensors))
    chosen = choose_class(config, model_class, folder, trust_remote_code=trust_remote_code)
    config = own_config(chosen, config)
    model = _build(chosen, folder, checkpoint, config=config, dtype=dtype, **for_model)
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
    return _build(chosen, None, checkpoint, config=config, **for_model), checkpoint


def _meta(
    model: PreTrainedModel, name: str, folder: Path, checkpoint: Checkpoint, origin: Origin
) -> MetaModel:
    model.name_or_path = model.config.name_or_path = name  # what an adapter's config will say
    generation = model.generation_config if model.can_generate() else None
    return MetaModel(model, folder, model.config, generation, checkpoint, origin)


# The folder


def find_folder(
    model_name_or_path: str | os.PathLike[str], *, with_code: bool = False, **hub: Any
) -> Path:
    """The folder itself, or the hub's snapshot of that id (downloaded unless offline)."""
    name = os.fspath(model_name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BuildError(
            f"{name} is a file; give the folder that holds config.json, or a .gguf file."
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise BuildError(f"no such folder: {name}")
    from huggingface_hub import is_offline_mode, snapshot_download

    hub["local_files_only"] = hub.get("local_files_only", False) or is_offline_mode()
    files = [*HUB_FILES, "*.py"] if with_code else HUB_FILES
    try:
        found = snapshot_download(
            name, allow_patterns=files, ignore_patterns=HUB_FILES_LEFT_OUT, **hub
        )
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        where = "in the hub's cache (offline)" if hub["local_files_only"] else "on the hub"
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise BuildError(
            f"{name} is no folder here, and no model that could be fetched {where}:\n{reason}"
        ) from error
    return Path(found)


# What was asked for


def _chosen_dtype(dtype: str | torch.dtype, kwargs: dict[str, Any]) -> str | torch.dtype:
    """`dtype`, or its old name `torch_dtype`, as "auto" or a torch.dtype."""
    old = kwargs.pop("torch_dtype", None)
    if old is not None:
        warnings.warn("`torch_dtype` is called `dtype` now; it was taken.", stacklevel=3)
        dtype = old if dtype == "auto" else dtype
    if dtype == "auto":
        return "auto"
    chosen = getattr(torch, str(dtype).removeprefix("torch."), None)
    if chosen in CASTABLE:
        return chosen
    raise BuildError(
        f"dtype {dtype!r} is not one to train in; "
        "use auto, float32, bfloat16 or float16 (one for the whole model)."
    )


def _refuse(kwargs: Mapping[str, Any]) -> None:
    for key, reason in REFUSED.items():
        if key in kwargs and kwargs[key] is not False:
            raise BuildError(f"{key}={kwargs[key]!r}: {reason}.")
    if kwargs.get("use_safetensors") is False:
        raise BuildError("use_safetensors=False: only safetensors files are read, never pickles.")


def _load_config(
    folder: Path, kwargs: dict[str, Any], *, trust_remote_code: bool
) -> PretrainedConfig:
    """The config with the caller's overrides; refuses what is left over, and quantized models."""
    from transformers import AutoConfig, PretrainedConfig

    ignored = ("use_safetensors", *REFUSED)
    kwargs = {key: value for key, value in kwargs.items() if key not in ignored}
    given = kwargs.pop("config", None)
    if isinstance(given, PretrainedConfig):
        config, left = given, kwargs
    else:
        _check_config_file(folder)
        read: Any = AutoConfig.from_pretrained
        flags = {"return_unused_kwargs": True, "trust_remote_code": trust_remote_code}
        try:
            config, left = read(given or folder, **flags, **kwargs)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BuildError(f"{folder / 'config.json'} does not make a config: {error}") from error
    left = sorted(set(left) - {"trust_remote_code"})
    if left:
        raise BuildError(
            f"unknown argument{'s' if len(left) > 1 else ''} {', '.join(left)}: neither a loading "
            f"option that ssdtune honours nor a value of {type(config).__name__}."
        )
    return config


def _unpacked(config: PretrainedConfig, checkpoint: Checkpoint, bits: int | None) -> Checkpoint:
    """The tensors that quantized ones stand for; takes the quantization out of the config, for the model that is built
    has plain weights."""
    quantization = vars(config).pop("quantization_config", None)
    if quantization is None:
        return checkpoint
    described = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if described.get("quant_method") == pack_header.METHOD:
        return pack_header.unpacked(checkpoint, bits=bits)
    plain = {n: e for n, e in checkpoint.tensors.items() if isinstance(e, TensorEntry)}
    stated = getattr(config, "dtype", None)
    if stated is not None:
        described = {"torch_dtype": str(stated).removeprefix("torch."), **described}
    path = checkpoint.folder / "config.json"
    return dataclasses.replace(checkpoint, tensors=foreign.recognise(described, plain, path))


def _noted_source(config: PretrainedConfig) -> str | None:
    """What the folder was packed from, as `ssdtune pack` noted it (docs/format.md)."""
    quantization = vars(config).get("quantization_config")
    found = quantization.get("source") if isinstance(quantization, dict) else None
    return found if isinstance(found, str) else None


def _check_config_file(folder: Path) -> None:
    has_adapter = (folder / "adapter_config.json").exists()
    if not (folder / "config.json").exists():
        hint = (
            "It holds an adapter: give the base model, and load the adapter onto it with peft."
            if has_adapter
            else "Give the folder of a Hugging Face model."
        )
        raise BuildError(f"{folder} has no config.json. {hint}")
    if has_adapter:
        raise BuildError(
            f"{folder} holds an adapter beside the model (adapter_config.json), which "
            "from_pretrained would load too.\nMove it out and load it with peft."
        )
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{folder / 'config.json'} is not JSON: {error}") from error


def _check_layer_counts(config: PretrainedConfig, num_tensors: int) -> None:
    """A config that claims more layers than the files have tensors would keep us busy for hours."""
    limit = max(num_tensors, LAYERS_ALWAYS_FINE)
    for part in _configs(config):
        for key, value in vars(part).items():
            if LAYER_COUNTS.match(key) and isinstance(value, int) and value > limit:
                raise BuildError(
                    f"config.json says {key}: {value}, but the files hold {num_tensors} tensors."
                )


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            yield from _configs(part)


# The class


def choose_class(
    config: PretrainedConfig, asked: type | None, folder: Path, *, trust_remote_code: bool
) -> type[PreTrainedModel]:
    """The model class: the one asked for, the repository's own code, or transformers' for it."""
    if asked is not None and not hasattr(asked, "_model_mapping"):
        return asked
    autos = _auto_classes(config) if asked is None else [asked]
    references = getattr(config, "auto_map", None) or {}
    for auto in autos:
        if trust_remote_code and auto.__name__ in references:
            return _remote_class(references[auto.__name__], folder)
        if type(config) in auto._model_mapping:
            from transformers.models.auto.auto_factory import _get_model_class

            return _get_model_class(config, auto._model_mapping)
    if any(auto.__name__ in references for auto in autos):
        raise BuildError(
            f"{folder} brings its own model code (auto_map in config.json).\n"
            "Read it, then pass trust_remote_code=True to run it."
        )
    raise BuildError(
        f"model_type {config.model_type!r} is no language model that transformers knows "
        f"({', '.join(auto.__name__ for auto in autos)}); name its class with model_class."
    )


def _auto_classes(config: PretrainedConfig) -> list[Any]:
    """In the order in which to ask: a config may be in several tables."""
    import transformers

    causal, images = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    if getattr(config, "is_encoder_decoder", False):
        return [transformers.AutoModelForSeq2SeqLM, images, causal]
    return [images, causal, transformers.AutoModelForSeq2SeqLM]


def _remote_class(reference: str, folder: Path) -> type[PreTrainedModel]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    model_class = get_class_from_dynamic_module(reference, str(folder))
    return add_generation_mixin_to_remote_model(model_class)


def own_config(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """The text part, where the class is a language model and the config a multimodal one's."""
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and model_class.config_class == text_class:
        return config.get_text_config()
    return config


# The model


def _build(
    model_class: type[PreTrainedModel], folder: Path | None, checkpoint: Checkpoint, **kwargs: Any
) -> PreTrainedModel:
    """`from_pretrained` without loading. The two steps replaced exist from transformers 5.17 on. folder: None where the
    weights are in no folder of safetensors."""
    for step in ("_load_pretrained_model", "_finalize_model_loading"):
        if not callable(getattr(model_class, step, None)):
            raise BuildError(f"this transformers release has no {model_class.__name__}.{step}.")

    def finish(model: PreTrainedModel, load_config: Any, loading_info: Any) -> None:
        _set_dtypes(model, load_config.dtype_plan or {})
        _make_buffers(model)
        _tie(model, checkpoint)

    steps = {
        "__module__": model_class.__module__,  # conversions are looked up by class name,
        "__qualname__": model_class.__qualname__,  # and "own code" is told by module
        "_load_pretrained_model": staticmethod(lambda *args, **kwargs: (None, None)),
        "_finalize_model_loading": staticmethod(finish),
    }
    bare: Any = type(model_class.__name__, (model_class,), steps)
    _refuse_deepspeed()
    try:
        if folder is None:
            model = bare.from_pretrained(None, state_dict={}, **kwargs)
        else:
            model = bare.from_pretrained(str(folder), use_safetensors=True, **kwargs)
    except (OSError, ImportError, ValueError, TypeError) as error:
        if isinstance(error, SSDTuneError):
            raise
        where = checkpoint.folder if folder is None else folder
        raise BuildError(f"{model_class.__name__} of {where} cannot be built: {error}") from error
    model.__class__ = model_class
    return model


def _refuse_deepspeed() -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise BuildError("DeepSpeed ZeRO-3 shards weights at load: ssdtune cannot work under it.")


def _set_dtypes(model: PreTrainedModel, plan: Mapping[str, torch.dtype]) -> None:
    """Gives the parameters and buffers that must stay in another dtype (routers, norms …) theirs.

    plan: name pattern -> dtype; the first pattern found anywhere in a name counts.
    """
    patterns = [(re.compile(key.replace("*", ".*")), dtype) for key, dtype in plan.items()]
    for owner, key, name, tensor in list(_tensors(model)):
        dtype = next((dtype for pattern, dtype in patterns if pattern.search(name)), None)
        if dtype is None or dtype == tensor.dtype:
            continue
        if isinstance(tensor, torch.nn.Parameter):
            owner._parameters[key] = torch.nn.Parameter(
                tensor.detach().to(dtype), tensor.requires_grad
            )
        elif key not in owner._non_persistent_buffers_set:
            owner._buffers[key] = tensor.to(dtype)


def _make_buffers(model: PreTrainedModel) -> None:
    """Makes buffers real and lets the model compute them; also parameters that files may lack.

    Whatever is marked as initialized is left alone by `initialize_weights`.
    """
    may_be_absent = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    for owner, key, name, tensor in list(_tensors(model)):
        if not isinstance(tensor, torch.nn.Parameter):
            owner._buffers[key] = torch.zeros_like(tensor, device="cpu")
        elif any(pattern.search(name) for pattern in may_be_absent):
            real = torch.zeros_like(tensor, device="cpu")
            owner._parameters[key] = torch.nn.Parameter(real, tensor.requires_grad)
        else:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()


def _tensors(
    model: PreTrainedModel,
) -> Iterator[tuple[torch.nn.Module, str, str, torch.Tensor]]:
    """Each parameter and buffer with its owner, its name there and its name in the model."""
    for prefix, owner in model.named_modules():
        for table in (owner._parameters, owner._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield owner, key, f"{prefix}.{key}" if prefix else key, tensor


def _tie(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Ties as the config says, except where the files hold two different tensors.

    That is from_pretrained's rule: a config that ties what was trained apart is wrong.
    """
    tied = dict(model.all_tied_weights_keys)
    if not tied:
        return
    shapes = {tuple(model.get_parameter_or_buffer(name).shape) for name in tied}
    candidates = [e.name for e in checkpoint.tensors.values() if tuple(e.shape) in shapes]
    found = plain_targets(model, candidates)
    for target, source in tied.items():
        if target not in found or source not in found:
            continue
        one, other = (checkpoint.tensors[found[name]] for name in (target, source))
        dtype = model.get_parameter_or_buffer(source).dtype
        if one != other and not _equal_on_disk(one, other, dtype):
            warnings.warn(
                f"the config ties {target} to {source}, but the files hold two different tensors: "
                "they are not tied. Set tie_word_embeddings to false in config.json.",
                stacklevel=2,
            )
            model.all_tied_weights_keys.pop(target)
    model.tie_weights(missing_keys=set(model.all_tied_weights_keys), recompute_mapping=False)


def _equal_on_disk(
    one: TensorEntry | PackedEntry, other: TensorEntry | PackedEntry, dtype: torch.dtype
) -> bool:
    """Whether two file tensors have the same values in `dtype`, a few megabytes at a time. Packed ones have if they are
    packed alike."""
    if tuple(one.shape) != tuple(other.shape):
        return False
    if isinstance(one, PackedEntry) or isinstance(other, PackedEntry):
        return (
            isinstance(one, PackedEntry)
            and isinstance(other, PackedEntry)
            and one.format == other.format
            and all(
                _equal_on_disk(a, b, FILE_DTYPES[a.dtype])
                for a, b in zip(one.parts, other.parts, strict=True)
            )
        )
    chunks = zip(_values(one, dtype), _values(other, dtype), strict=True)
    return all(torch.equal(a, b) for a, b in chunks)


def _values(entry: TensorEntry, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    stored = FILE_DTYPES[entry.dtype]
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        left = entry.num_bytes
        while left:
            raw = file.read(min(left, COMPARED_AT_A_TIME * stored.itemsize))
            if not raw:
                raise BuildError(
                    f"{entry.path} ends inside {entry.name}: {left} bytes are missing."
                )
            left -= len(raw)
            yield torch.frombuffer(bytearray(raw), dtype=stored).to(dtype)
