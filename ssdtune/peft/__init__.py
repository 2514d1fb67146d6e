"""Adapters on a streamed model: which layers get one, made through the peft library."""

from ssdtune.peft.adapters import AdapterError, announce, attach, lora_config, resolve_all_linear

__all__ = ["AdapterError", "announce", "attach", "lora_config", "resolve_all_linear"]
