"""bitsandbytes' NF4 and FP4, as transformers saves them.

Beside a weight lie its scales (`.absmax`), what its codes stand for (`.quant_map`, which the library does not look at:
it has the table in its code), and JSON in bytes (`.quant_state.bitsandbytes__nf4`). With double quantization `.absmax`
holds codes of 8 bits, and `.nested_absmax` and `.nested_quant_map` are there. The codes may be stored under another
dtype than uint8 (`bnb_4bit_quant_storage`): the bytes are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from ssdtune.kernels.nibbles import BNB_FP4, NF4, NestedNibbles, Nibbles
from ssdtune.swap.foreign.pile import FLOAT_DTYPES, FLOATS, Pile
from ssdtune.swap.header import TensorEntry, parse_json, quoted, refuse

TABLES: Final = {"nf4": NF4, "fp4": BNB_FP4}
STATE: Final = ".quant_state.bitsandbytes__"
BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # the library's
MAX_STATE_BYTES: Final = 1 << 16


def read(config: Mapping[str, Any], pile: Pile) -> None:
    """Puts together the weights that a state says are in 4 bits."""
    if config.get("load_in_8bit"):
        pile.refuse_config("is LLM.int8()'s, 8 bits by bitsandbytes: not supported; 4 bits are")
    for kind in TABLES:
        for name in pile.bases(STATE + kind):
            _put(pile, name, kind)
    pile.refuse_left(".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB")


def _put(pile: Pile, name: str, kind: str) -> None:
    state_entry = pile.take(f"{name}{STATE}{kind}", of=name)
    state = _state(pile, state_entry)
    shape, block = tuple(state["shape"]), state["blocksize"]
    codes = _as_bytes(pile.take(name, of=name))
    absmax = pile.take(f"{name}.absmax", of=name)
    pile.find(f"{name}.quant_map")
    if "nested_offset" not in state:
        if absmax.dtype not in FLOAT_DTYPES:
            refuse(absmax.path, f"{absmax.dtype}, and its state is not nested.", tensor=absmax.name)
        format = Nibbles(TABLES[kind], block, is_high_first=True, scale=absmax.dtype)
        parts = [codes, absmax]
    else:
        format = NestedNibbles(
            TABLES[kind], block, state["nested_blocksize"], float(state["nested_offset"])
        )
        nested = (pile.take(f"{name}.nested_{what}", of=name) for what in ("quant_map", "absmax"))
        parts = [codes, absmax, *nested]
    pile.put(name, FLOATS[state["dtype"]], shape, format, parts)


def _state(pile: Pile, entry: TensorEntry) -> Mapping[str, Any]:
    """What the JSON says, each value checked."""
    if entry.num_bytes > MAX_STATE_BYTES:
        refuse(entry.path, f"{entry.num_bytes:,} bytes are no state.", tensor=entry.name)
    try:
        state = parse_json(pile.values(entry).numpy().tobytes())
    except ValueError as error:
        refuse(entry.path, f"not valid JSON: {error}.", tensor=entry.name, cause=error)
    checks = {
        "blocksize": lambda v: type(v) is int and v in BLOCKS,
        "dtype": lambda v: isinstance(v, str) and v in FLOATS,
        "shape": lambda v: isinstance(v, list) and v and all(type(n) is int and n > 0 for n in v),
    }
    if isinstance(state, dict) and "nested_offset" in state:
        checks["nested_offset"] = lambda v: type(v) in (int, float) and math.isfinite(v)
        checks["nested_blocksize"] = lambda v: type(v) is int and v > 0
        checks["nested_dtype"] = lambda v: v == "float32"
    for key, is_sound in checks.items():
        value = state.get(key) if isinstance(state, dict) else None
        if not is_sound(value):
            refuse(entry.path, f"its {key} is {quoted(value)}.", tensor=entry.name)
    return state


def _as_bytes(entry: TensorEntry) -> TensorEntry:
    return dataclasses.replace(entry, dtype="U8", shape=(entry.num_bytes,))
