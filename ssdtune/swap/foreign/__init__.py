"""Checkpoints that other libraries quantized, read in place: which formats their tensors are in, under which names.

`recognise` is told what config.json says of the quantization and which tensors the files hold, and gives the tensors
that the model had before it was quantized. Nothing is converted or copied; of the tensors' data only what decides on
the format is read, a few KB a weight.

    quant_method          what is read
    bitsandbytes          NF4 and FP4, plain or double quantization                         bnb.py
    gptq, awq             2, 3, 4, 8 bits with or without a g_idx; "gemm", 4 bits           words.py
    compressed-tensors    pack-, int-, float-, nvfp4-pack-, mxfp4-pack-, mxfp8-quantized    compressed.py
    fp8, modelopt, mxfp4  blocks, rows or tensors of FP8; NVFP4; gpt-oss's MXFP4            floats.py

What activations are quantized by is left out: a step computes with the weights' values at full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ssdtune.swap.foreign import bnb, compressed, floats, words
from ssdtune.swap.foreign.pile import Pile
from ssdtune.swap.header import TensorEntry, quoted, refuse
from ssdtune.swap.packed import PackedEntry

Reader = Callable[[Mapping[str, Any], Pile], None]
READERS: Final[Mapping[str, Reader]] = {
    "bitsandbytes": bnb.read,
    "gptq": words.read_gptq,
    "awq": words.read_awq,
    "compressed-tensors": compressed.read,
    "fp8": floats.read_fp8,
    "modelopt": floats.read_modelopt,
    "mxfp4": floats.read_mxfp4,
}


def recognise(
    quantization: Mapping[str, Any],
    tensors: Mapping[str, TensorEntry | PackedEntry],
    config_path: Path,
) -> dict[str, TensorEntry | PackedEntry]:
    """The checkpoint's tensors as the model names them.

    quantization: config.json's `quantization_config`, or what stands for it (sidecars.py); a `torch_dtype` in it
    overrules the dtype of the scales. tensors: as the headers have them, none packed. config_path: for messages. A
    quantized weight is one PackedEntry, "...q_proj.weight" with the shape that the parameter has; others stay as they
    are; what only served the weights is gone.

    Raises CheckpointError, with the file and the tensor, for a method or layout that is not read, and where what is
    said and what is there do not agree.
    """
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # which did not name itself at first
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        refuse(
            config_path,
            f"its quantization_config is by {quoted(method)}: not supported.",
            way_out=f"Use a checkpoint by {', '.join(READERS)}; or the unquantized model, by `ssdtune pack`.",
        )
    stored = {name: entry for name, entry in tensors.items() if isinstance(entry, TensorEntry)}
    assert len(stored) == len(tensors)
    pile = Pile(stored, config_path)
    reader(quantization, pile)
    return pile.result()
