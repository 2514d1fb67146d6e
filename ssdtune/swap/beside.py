"""What lies beside a model's weights: config, tokenizer, templates, code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ssdtune.durable import make_folder, write_file_atomically
from ssdtune.run_files import CHECK_NAME
from ssdtune.swap.foreign.sidecars import SIDECARS

CONFIG: Final = "config.json"
QUANTIZATION: Final = "quantization_config"
VOCABULARIES: Final = (".model", ".tiktoken", ".spm", ".codes", ".tokenizer")
SUFFIXES: Final = (".json", ".txt", ".jinja", ".py", *VOCABULARIES)
TEMPLATES: Final = "additional_chat_templates"  # a folder, where a tokenizer has several
# What is true of the source's weights only.
LEFT: Final = frozenset({CONFIG, CHECK_NAME, *SIDECARS})


def copy_beside(source: Path, out: Path, *, quantization: dict[str, Any] | None = None) -> None:
    """Copies it to another folder, the config last: without one the folder is no model. What a packing costs is left, and
    files that say how the source is quantized.

    quantization: what the copy's config says of its weights, whatever the source's says; None: that they are plain. A
    source without a config has none to copy. Each file is there whole or not at all. Raises DurableError.
    """
    for path in _files(source):
        there = out / path.relative_to(source)
        make_folder(there.parent)
        write_file_atomically(there, path.read_bytes())
    if not (source / CONFIG).is_file():
        return
    text = (source / CONFIG).read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    if _without_quantization(config) or quantization is not None:
        if quantization is not None:
            config[QUANTIZATION] = quantization
        text = json.dumps(config, indent=2) + "\n"
    write_file_atomically(out / CONFIG, text.encode())


def _without_quantization(config: dict[str, Any]) -> bool:
    """Takes out what a config says of its weights, in the part that is of its text model too; whether it said any."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    said = [part.pop(QUANTIZATION, None) for part in parts]
    return any(one is not None for one in said)


def bytes_beside(source: Path) -> int:
    """Of all that `copy_beside` copies; what it adds to a config is not counted."""
    sizes = [path.stat().st_size for path in _files(source)]
    config = source / CONFIG
    return sum(sizes) + (config.stat().st_size if config.is_file() else 0)


def _files(source: Path) -> Iterator[Path]:
    """What lies there, without what is LEFT."""
    for path in sorted([*source.iterdir(), *source.glob(f"{TEMPLATES}/*")]):
        is_index = path.name.endswith(".index.json")
        is_beside = path.suffix in SUFFIXES and not is_index and not path.name.startswith(".")
        if path.is_file() and is_beside and path.name not in LEFT:
            yield path
