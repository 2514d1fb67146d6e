"""Counts operators as they are dispatched: matrix products, attention, and what passes over values."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ssdtune.schedule.cost import Operator
from ssdtune.schedule.profile import FRESH

# Functions that a processor computes by many instructions a value.
SPECIAL = (
    "exp",
    "log",
    "silu",
    "gelu",
    "tanh",
    "sigmoid",
    "softmax",
    "sin",
    "cos",
    "erf",
    "softplus",
    "bernoulli",
)
LOOKUPS = (
    "embedding",
    "index",
    "gather",
    "scatter",
)  # touch as many bytes as they make, whatever the table holds
MADE_FROM_NOTHING = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "scalar_tensor",
)
FRESH_BYTES = (
    2**25
)  # glibc's largest M_MMAP_THRESHOLD (mallopt(3)): what is larger is mapped anew every time
BACKWARD_FLOP = 2.5  # of attention's forward: two products become five, recomputed scores included


class WorkCounter(TorchDispatchMode):
    """counts: operators -> how many, as `schedule.cost.Work` has them. Works on tensors without memory too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Operator] = Counter()

    @property
    def num_calls(self) -> int:
        """Operators counted so far."""
        return sum(n for op, n in self.counts.items() if op.kind != FRESH)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "prim" and not func.is_view:
            entry = _entry(func, args, kwargs, out)
            if entry is not None:
                self.counts[entry] += 1
            for made in pytree.tree_leaves(out):
                if isinstance(made, torch.Tensor) and _is_fresh(made, args, kwargs):
                    self.counts[Operator(FRESH, float(made.nbytes))] += 1
        return out


def _is_fresh(made: torch.Tensor, args: Any, kwargs: Any) -> bool:
    """Whether it lies in memory that the kernel has just given: too large for the C library to keep in its heap."""
    if made.nbytes < FRESH_BYTES or made.device.type != "cpu":
        return False
    given = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    return all(x.untyped_storage()._cdata != made.untyped_storage()._cdata for x in given)


def _entry(func: Any, args: Any, kwargs: Any, out: Any) -> Operator | None:
    name = func._schema.name.partition("::")[2]
    if name == "_unsafe_view" or name in MADE_FROM_NOTHING:
        return None
    if "scaled_dot_product" in name:
        return _attention(name, func, args, kwargs)
    made = _bytes_of(out)
    packet = func._overloadpacket
    if packet in flop_registry:
        flop = flop_registry[packet](*args, **kwargs, out_val=out)
        kind = "matmul_transposed" if _is_transposed(args) else "matmul"
        return Operator(kind, float(flop), float(_bytes_of((args, kwargs)) + made), _rows_of(args))
    if any(word in name for word in LOOKUPS):
        return Operator("pointwise", 2.0 * made)
    kind = "special" if any(word in name for word in SPECIAL) else "pointwise"
    size = float(_bytes_of((args, kwargs)) + made)
    return Operator(kind, size) if size else None


def _rows_of(args: Any) -> int:
    """Rows that one matrix is multiplied by; 0 where there are several matrices."""
    matrices = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1]
    if len(matrices) < 2 or matrices[-1].dim() != 2 or matrices[-2].dim() != 2:
        return 0
    return matrices[-2].shape[0]


def _is_transposed(args: Any) -> bool:
    """Whether the right matrix lies in memory by columns, as a linear layer's weight does in its forward: kernels then
    take another way through it."""
    matrices = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1]
    right = matrices[-1] if len(matrices) > 1 else None
    return right is not None and right.stride(-1) != 1 and right.stride(-2) == 1


def _attention(name: str, func: Any, args: Any, kwargs: Any) -> Operator:
    """FLOP of fused attention: two products over all pairs of positions, half of them where it is causal."""
    named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | dict(kwargs)
    query, key = named["query"], named["key"]
    batch, heads, length, width = query.shape
    flop = 4.0 * batch * heads * length * key.shape[-2] * width
    if named.get("is_causal"):
        flop /= 2
    if name.endswith("backward"):
        return Operator("attention_backward", BACKWARD_FLOP * flop)
    return Operator("attention", flop)


def _bytes_of(values: Any) -> int:
    """Bytes of all tensors, an expanded one as large as its memory."""
    tensors = [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
