"""Parameters that are not there: a tensor without storage that knows its shape, dtype and device.

Between its block's visits a streamed weight is a `Placeholder` in its module. Whatever only looks at a weight (peft
making adapters, counting parameters, moving to the device it is on) needs nothing more; an operator that touches its
values gets them from the slot or the file. Writing raises, for the write would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ssdtune.errors import SSDTuneError


class PlaceholderError(SSDTuneError):
    """Something tried to change a streamed weight."""


class WeightSource(Protocol):
    """What stands behind a placeholder."""

    name: str

    def read(self) -> torch.Tensor:
        """The values, in fresh memory of the placeholder's shape, dtype and device."""
        ...

    def make_trainable(self) -> None:
        """Puts a real parameter, resident and trainable, in the place of every placeholder of this weight."""
        ...


_KEEPS_PLACEHOLDER = ("aten::detach", "aten::alias", "aten::lift_fresh")


class Placeholder(torch.Tensor):
    """A streamed weight outside its visits; see the module's docstring."""

    source: WeightSource

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        source: WeightSource,
        shape: torch.Size,
        *,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Placeholder:
        """A placeholder of this description; it is an `nn.Parameter` to `isinstance`, as modules demand."""
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=stride, dtype=dtype, device=device, requires_grad=False
        )
        made.source = source
        made._is_param = True
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing beyond `__new__`."""

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stays a placeholder where no value is needed, raises on writes, reads for everything else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Placeholder) and _is_value_free(func, first, kwargs):
            return first.twin()
        if func._schema.is_mutable:
            _refuse_writes(func, args, kwargs)
        real: Any = pytree.tree_map_only(Placeholder, lambda p: p.source.read(), (args, kwargs))
        return func(*real[0], **real[1])

    def twin(self) -> Placeholder:
        """Another placeholder of the same weight."""
        return Placeholder(
            self.source, self.shape, stride=self.stride(), dtype=self.dtype, device=self.device
        )

    def storage(self) -> Any:
        """safetensors asks for it before it writes."""
        raise PlaceholderError(
            f"{self.source.name} is streamed, and has no memory that could be written.\n"
            "With an adapter on the head or the embedding peft writes those beside it: give its save_pretrained "
            "save_embedding_layers=False, and the adapter alone is written."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A copy is real: `modules_to_save` copies a module in order to train it."""
        copied = nn.Parameter(self.source.read(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the real values."""
        return nn.Parameter(self.source.read(), requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Description without values."""
        return f"Placeholder({self.source.name}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def requires_grad_(self, requires_grad: bool = True) -> torch.Tensor:  # type: ignore[override]
        """To train a streamed weight makes it resident."""
        self.requires_grad = requires_grad
        return self


def _is_value_free(func: Any, tensor: Placeholder, kwargs: dict[str, Any]) -> bool:
    name = func._schema.name
    if name in _KEEPS_PLACEHOLDER:
        return True
    if name != "aten::_to_copy":
        return False
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype not in (None, tensor.dtype):
        raise PlaceholderError(
            f"{tensor.source.name} is streamed as {tensor.dtype} and can't be converted to {dtype}.\n"
            f"Pass dtype= to ssdtune.stream() instead of converting the model afterwards."
        )
    return device is None or _is_same(torch.device(device), tensor.device)


def _is_same(one: torch.device, other: torch.device) -> bool:
    """accelerate calls the CPU `cpu:0` in a process group; a device without a number is the current one."""
    if one.type != other.type or one.type == "cpu":
        return one.type == other.type
    return (
        all(d.index in (None, torch.cuda.current_device()) for d in (one, other))
        or one.index == other.index
    )


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value, argument in zip([*args, *kwargs.values()], func._schema.arguments, strict=False):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written and isinstance(value, Placeholder):
            raise PlaceholderError(
                f"{value.source.name} is streamed from your model's files, which are never written: "
                f"{func._schema.name} would be lost.\nAn adapter whose initialisation changes base weights "
                f"(PiSSA, OLoRA) is not supported, and LoftQ's is ssdtune.peft.replace_lora_weights_loftq: choose "
                f"another init_lora_weights."
            )


def _get_requires_grad(self: Placeholder) -> bool:
    return torch.Tensor.requires_grad.__get__(self)  # type: ignore[attr-defined]


def _set_requires_grad(self: Placeholder, value: bool) -> None:
    if value:
        self.source.make_trainable()


def _get_data(self: Placeholder) -> Placeholder:
    return self.twin()


def _set_data(self: Placeholder, value: torch.Tensor) -> None:
    """`module.to(where it is)` assigns a twin; anything else would be lost in silence."""
    if isinstance(value, Placeholder) and value.source is self.source:
        return
    raise PlaceholderError(
        f"{self.source.name} is streamed from your model's files, which are never written: the assignment to .data "
        f"would be lost.\nAn adapter whose initialisation changes base weights (PiSSA, OLoRA) is not supported, and "
        f"LoftQ's is ssdtune.peft.replace_lora_weights_loftq: choose another init_lora_weights. A change of dtype goes "
        f"into ssdtune.stream(dtype=...)."
    )


# Properties of torch.Tensor that must not be inherited; set here since a class body may not shadow them by `def`.
_PROPERTIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "requires_grad": (_get_requires_grad, _set_requires_grad),
    "data": (_get_data, _set_data),
}
for _name, (_get, _set) in _PROPERTIES.items():
    setattr(Placeholder, _name, property(_get, _set))
