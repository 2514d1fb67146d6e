"""The transformers model under what peft puts around it."""

from __future__ import annotations

from typing import Any


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
