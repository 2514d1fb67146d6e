"""A model folder with headers alone: enough to plan for a model whose weights are not here.

From a `config.json` the modules are built on the meta device; a safetensors file is made whose header names every
parameter and whose data is a hole in the file system: the right length, no bytes on the drive.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ssdtune.visit.asked import BuildError
from ssdtune.visit.classes import choose_class, own_config
from ssdtune.visit.placement import FILE_DTYPES

HEADER_ALIGNMENT = 8
NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


def write_outline(config_file: Path, folder: Path, dtype: str = "auto") -> None:
    """Writes config and header into `folder`. dtype: of the weights; "auto" is the config's, or bfloat16.

    Raises BuildError for a config that no model class takes.
    """
    from transformers import AutoConfig

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config_file, folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
        wanted = getattr(config, "dtype", None) or torch.bfloat16
        if dtype != "auto":
            wanted = getattr(torch, dtype)
        chosen: Any = choose_class(config, None, folder, trust_remote_code=False)
        with torch.device("meta"):
            model = chosen._from_config(own_config(chosen, config), dtype=wanted)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BuildError(f"{config_file}: no model can be made from it: {reason}") from error
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, tied = 0, _tied(model)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _tied(model: torch.nn.Module) -> set[str]:
    """Names under which a tensor is met again."""
    seen: set[int] = set()
    again: set[str] = set()
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if id(tensor) in seen:
            again.add(name)
        seen.add(id(tensor))
    return again
