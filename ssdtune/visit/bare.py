"""A model by its own `from_pretrained` code, which loads nothing: parameters on the meta device, all else real.

`from_pretrained` does everything but load: it picks the dtype, reads the config, makes the modules, sets the attention,
the generation config and eval mode. So its own code runs here, in a subclass of the model's class whose two loading
steps are replaced (`_load_pretrained_model` reads nothing, `_finalize_model_loading` makes buffers and ties). The
instance gets its own class back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.swap.source import Checkpoint
from ssdtune.visit.asked import BuildError
from ssdtune.visit.ties import tie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_bare(
    model_class: type[PreTrainedModel], folder: Path | None, checkpoint: Checkpoint, **kwargs: Any
) -> PreTrainedModel:
    """`from_pretrained` without loading. The two steps replaced exist from transformers 5.17 on. folder: None where the
    weights are in no folder of safetensors."""
    for step in ("_load_pretrained_model", "_finalize_model_loading"):
        if not callable(getattr(model_class, step, None)):
            raise BuildError(f"this transformers release has no {model_class.__name__}.{step}.")

    def finish(model: PreTrainedModel, load_config: Any, loading_info: Any) -> None:
        _set_dtypes(model, load_config.dtype_plan or {})
        _make_buffers(model)
        tie(model, checkpoint)

    steps = {
        "__module__": model_class.__module__,  # conversions are looked up by class name,
        "__qualname__": model_class.__qualname__,  # and "own code" is told by module
        "_load_pretrained_model": staticmethod(lambda *args, **kwargs: (None, None)),
        "_finalize_model_loading": staticmethod(finish),
    }
    bare: Any = type(model_class.__name__, (model_class,), steps)
    _refuse_deepspeed()
    try:
        if folder is None:
            model = bare.from_pretrained(None, state_dict={}, **kwargs)
        else:
            model = bare.from_pretrained(str(folder), use_safetensors=True, **kwargs)
    except (OSError, ImportError, ValueError, TypeError) as error:
        if isinstance(error, SSDTuneError):
            raise
        where = checkpoint.folder if folder is None else folder
        raise BuildError(f"{model_class.__name__} of {where} cannot be built: {error}") from error
    model.__class__ = model_class
    return model


def _refuse_deepspeed() -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise BuildError("DeepSpeed ZeRO-3 shards weights at load: ssdtune cannot work under it.")


def _set_dtypes(model: PreTrainedModel, plan: Mapping[str, torch.dtype]) -> None:
    """Gives the parameters and buffers that must stay in another dtype (routers, norms …) theirs.

    plan: name pattern -> dtype; the first pattern found anywhere in a name counts.
    """
    patterns = [(re.compile(key.replace("*", ".*")), dtype) for key, dtype in plan.items()]
    for owner, key, name, tensor in list(_tensors(model)):
        dtype = next((dtype for pattern, dtype in patterns if pattern.search(name)), None)
        if dtype is None or dtype == tensor.dtype:
            continue
        if isinstance(tensor, torch.nn.Parameter):
            owner._parameters[key] = torch.nn.Parameter(
                tensor.detach().to(dtype), tensor.requires_grad
            )
        elif key not in owner._non_persistent_buffers_set:
            owner._buffers[key] = tensor.to(dtype)


def _make_buffers(model: PreTrainedModel) -> None:
    """Makes buffers real and lets the model compute them; also parameters that files may lack.

    Whatever is marked as initialized is left alone by `initialize_weights`.
    """
    may_be_absent = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    for owner, key, name, tensor in list(_tensors(model)):
        if not isinstance(tensor, torch.nn.Parameter):
            owner._buffers[key] = torch.zeros_like(tensor, device="cpu")
        elif any(pattern.search(name) for pattern in may_be_absent):
            real = torch.zeros_like(tensor, device="cpu")
            owner._parameters[key] = torch.nn.Parameter(real, tensor.requires_grad)
        else:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()


def _tensors(
    model: PreTrainedModel,
) -> Iterator[tuple[torch.nn.Module, str, str, torch.Tensor]]:
    """Each parameter and buffer with its owner, its name there and its name in the model."""
    for prefix, owner in model.named_modules():
        for table in (owner._parameters, owner._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield owner, key, f"{prefix}.{key}" if prefix else key, tensor
