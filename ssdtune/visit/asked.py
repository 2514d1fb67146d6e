"""What a caller of `build_meta` asks for: which folder, which dtype, which config; and what is refused by name."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.visit.placement import CASTABLE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


class BuildError(SSDTuneError):
    """The model cannot be built: not found, not supported, or asked for with what is not honoured."""


# The folder


def find_folder(
    model_name_or_path: str | os.PathLike[str], *, with_code: bool = False, **hub: Any
) -> Path:
    """The folder itself, or the hub's snapshot of that id (downloaded unless offline)."""
    name = os.fspath(model_name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not may_be_hub_id(name):
        raise absent(name)
    from huggingface_hub import is_offline_mode, snapshot_download

    hub["local_files_only"] = hub.get("local_files_only", False) or is_offline_mode()
    files = [*HUB_FILES, "*.py"] if with_code else HUB_FILES
    try:
        found = snapshot_download(
            name, allow_patterns=files, ignore_patterns=HUB_FILES_LEFT_OUT, **hub
        )
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise absent(name, error, is_offline=hub["local_files_only"]) from error
    return Path(found)


def may_be_hub_id(name: str) -> bool:
    """Whether it is written as the hub writes names: `owner/name`, no longer path, no file."""
    is_path = name.startswith(".") or name.endswith((".json", ".gguf", ".safetensors"))
    return not is_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def absent(name: str, error: Exception | None = None, *, is_offline: bool = False) -> BuildError:
    """The error of a model that is neither a folder here nor to be had from the hub. error: what the hub's client said."""
    path = Path(name).expanduser()
    if path.is_file() or not may_be_hub_id(name):
        here = "" if path.is_absolute() else f" (working folder: {Path.cwd()})"
        what = f"{name} is a file" if path.is_file() else f"no such folder or file: {name}{here}"
        return BuildError(
            f"model_name_or_path: {what}.\n"
            "Give a folder with config.json and safetensors files, a .gguf file, or a hub id."
        )
    if is_offline:
        return BuildError(
            f"model_name_or_path: {name} is no folder here, and is not in the hub's cache, where alone it is looked for "
            "offline.\nCorrect the name, give the model's folder, or fetch it once without HF_HUB_OFFLINE. "
            "`ssdtune plan --model config.json` needs no weights."
        )
    reason = (str(error or "").strip() or repr(error)).splitlines()[0][:300]
    return BuildError(
        f"model_name_or_path: {name} is no folder here, and could not be fetched from the hub: {reason}\n"
        "Correct the name, or give the model's folder. A gated model wants `hf auth login` first."
    )


# Arguments and config


def chosen_dtype(dtype: str | torch.dtype, kwargs: dict[str, Any]) -> str | torch.dtype:
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


def refuse(kwargs: Mapping[str, Any]) -> None:
    """Raises BuildError for an argument that is not honoured."""
    for key, reason in REFUSED.items():
        if key in kwargs and kwargs[key] is not False:
            raise BuildError(f"{key}={kwargs[key]!r}: {reason}.")
    if kwargs.get("use_safetensors") is False:
        raise BuildError("use_safetensors=False: only safetensors files are read, never pickles.")


def read_config(
    folder: Path, kwargs: dict[str, Any], *, trust_remote_code: bool
) -> PretrainedConfig:
    """The config with the caller's overrides; refuses what is left over."""
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


def check_layer_counts(config: PretrainedConfig, num_tensors: int) -> None:
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
