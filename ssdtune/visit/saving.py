"""A streamed model's weights as they are now, written to a folder that `from_pretrained` reads.

Each block is written as it is read: memory for one block at a time, whatever the model's size.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssdtune.durable import (
    commit_folder,
    new_temporary_folder,
    remove_folder_we_made,
    write_file_atomically,
)
from ssdtune.errors import SSDTuneError
from ssdtune.swap.beside import CONFIG, copy_beside
from ssdtune.visit.placeholder import Placeholder

INDEX_NAME = "model.safetensors.index.json"


class SaveError(SSDTuneError):
    """Weights that can't be written where they are wanted."""


def check_is_new(out: Path) -> None:
    """Raises SaveError where something is there already: the base, it may be."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SaveError(f"{out} is there already.\nGive a folder that is not.")


def unstreamed_state(model: Any) -> dict[str, Any]:
    """A model's state without its streamed weights: of one with an adapter on its head or embedding, peft would write
    the base's matrix beside the adapter."""
    state: dict[str, Any] = model.state_dict()
    return {name: value for name, value in state.items() if not isinstance(value, Placeholder)}


def write_weights(model: Any, out: Path) -> int:
    """Writes a streamed model to the new folder `out`, a file for each block, with its config and what lies beside the
    base's weights; bytes of all weights. Raises SSDTuneError where that fails, and leaves nothing."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_is_new(out)
    parts = list(_parts(model))
    folder = new_temporary_folder(out)
    try:
        _write_configs(model, folder)
        places: dict[str, str] = {}
        total = 0
        for number, names in enumerate(parts, 1):
            tensors = _in_files_form(model, names)
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            try:
                save_file(tensors, folder / name, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                raise not_written(out, error) from error
            places |= dict.fromkeys(tensors, name)
            total += sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_file_atomically(folder / INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())
        commit_folder(folder, out)
    finally:
        remove_folder_we_made(folder)
    return total


def not_written(out: Path, error: Exception) -> SaveError:
    """The error for a folder whose files a library could not write."""
    return SaveError(
        f"{out} could not be written: {error}.\n"
        "Nothing of it stays. Free some space, or give a folder on another drive."
    )


def _parts(model: Any) -> Iterator[list[str]]:
    """Names of weights that are written together: a block's, and those outside of blocks."""
    streamer = model.ssdtune
    streamed: set[str] = set()
    for block in range(len(streamer.blocks)):
        names = streamer.names(block)
        streamed.update(names)
        yield names
    held = {id(w.placeholder) for w in streamer.weights}
    outside = [name for name, p in model.named_parameters() if id(p) not in held]
    state = model.state_dict(keep_vars=True)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    outside += [name for name in state if name not in parameters]  # persistent buffers
    if outside:
        yield outside


def _in_files_form(model: Any, names: list[str]) -> dict[str, Any]:
    """Values under the names, and in the shapes, that the hub's files have."""
    from transformers.core_model_loading import revert_weight_conversion

    state: Mapping[str, Any] = model.state_dict(keep_vars=True)
    values = {name: state[name].detach().clone().cpu() for name in names}
    return {name: t.contiguous() for name, t in revert_weight_conversion(model, values).items()}


def _write_configs(model: Any, folder: Path) -> None:
    """The tokenizer and whatever else lies beside the base's weights, and the model's own configs as they are now: plain
    weights, of the dtype that they are streamed in."""
    copy_beside(model.ssdtune.checkpoint.folder, folder)
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.to_json_file(folder / CONFIG)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
