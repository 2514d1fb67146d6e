"""What says how weights are quantized where config.json does not: files of their own, as earlier writers had them.

quantize_config.json     AutoGPTQ and GPTQModel
quant_config.json        AutoAWQ
hf_quant_config.json     ModelOpt, under "quantization"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ssdtune.swap.header import parse_json, quoted, read_small, refuse
from ssdtune.swap.source import Checkpoint

# By its name: the method where the file names none, and what ends the names of tensors that only its writers have. In a
# folder without them the file is a remnant: it says nothing of plain weights.
SIDECARS: Final[Mapping[str, tuple[str, str]]] = {
    "quantize_config.json": ("gptq", ".qweight"),
    "quant_config.json": ("awq", ".qweight"),
    "hf_quant_config.json": ("modelopt", ".weight_scale"),
}
MAX_BYTES: Final = 1 << 24  # of a file that may name every layer


def described_beside(checkpoint: Checkpoint) -> tuple[Path, Mapping[str, Any]] | None:
    """The file that describes a checkpoint's quantization, and what config.json's `quantization_config` would say of it;
    None where the weights are plain.

    Raises CheckpointError for a file that is no JSON object, and for tensors of GPTQ or AWQ that no file describes.
    """
    for name, (method, suffix) in SIDECARS.items():
        path = checkpoint.folder / name
        if path.is_file() and _first(checkpoint, suffix) is not None:
            return path, {"quant_method": method, **_read(path)}
    quantized = _first(checkpoint, ".qweight")
    if quantized is not None:
        refuse(
            checkpoint.folder / "config.json",
            f"the files hold {quoted(quantized)}, of GPTQ or AWQ, and it has no quantization_config.",
            way_out=f"Nothing was loaded. Add the {', '.join(SIDECARS)} or config.json that belongs to the model.",
        )
    return None


def _first(checkpoint: Checkpoint, suffix: str) -> str | None:
    return next((name for name in checkpoint.tensors if name.endswith(suffix)), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        read = parse_json(read_small(path, MAX_BYTES))
    except ValueError as error:
        refuse(path, f"not valid JSON: {error}.", cause=error)
    found = read.get("quantization", read) if isinstance(read, dict) else read
    if not isinstance(found, dict):
        refuse(path, f"it says {quoted(found)}, not how weights are quantized.")
    return found
