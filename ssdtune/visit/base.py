"""The transformers model under what peft puts around it."""

from __future__ import annotations

from typing import Any

from ssdtune.swap.packed import reading_of


def base_of(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def dtype_of(model: Any) -> str:
    """Of the streamed model's weights, as logs and checkpoints name it."""
    dtypes = {p.dtype for p in base_of(model).parameters() if p.is_floating_point()}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def weights_of(model: Any) -> dict[str, str | None]:
    """What logs and checkpoints say of a streamed model's weights: `base`, the fingerprint of its files, and `reading`, in
    how many bits nested codes of theirs are read."""
    checkpoint = base_of(model).ssdtune.checkpoint
    return {"base": checkpoint.fingerprint(), "reading": reading_of(checkpoint.tensors)}
