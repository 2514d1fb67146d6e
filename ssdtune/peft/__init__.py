"""Adapters on a streamed model: which layers get one, made through the peft library, and where they begin."""

from ssdtune.peft.adapters import announce, attach, fingerprint_of, lora_config, resolve_all_linear
from ssdtune.peft.errors import AdapterError
from ssdtune.peft.loftq import Residual, replace_lora_weights_loftq

__all__ = [
    "AdapterError",
    "Residual",
    "announce",
    "attach",
    "fingerprint_of",
    "lora_config",
    "replace_lora_weights_loftq",
    "resolve_all_linear",
]
