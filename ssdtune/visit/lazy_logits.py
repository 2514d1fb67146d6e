"""Logits that are not computed until somebody reads them.

A model calls its head, scales or caps what it gets, casts it, and hands it to a loss. `LazyLogits`
stands for that tensor all the way: shape, dtype, device and autograd graph are those of the real
one, but it has no storage. Each cheap step is written down as an `Op`, in two kinds:

* a *value* op acts on every token alike: cast, scale, tanh, bias, a slice of the vocabulary;
* a *token* op only picks or rearranges rows: view, slice or select along any other dimension.

Hence `logits[chunk of rows]` is the value ops applied to `head(hidden rows picked by the token
ops)`, which is what a loss in chunks needs (`loss.py`). `torch.nn.functional.cross_entropy` is the
one function that is answered that way. Whatever else touches the tensor gets real numbers: they are
computed once and kept, and autograd, which recorded every step, takes the gradient back to the
head. The rules are torch's own (`__torch_function__` above autograd, `__torch_dispatch__` below).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

aten = torch.ops.aten

SCALING_OPS = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
VALUE_OPS = (aten._to_copy.default, aten.tanh.default, *SCALING_OPS)
RESHAPES = (aten.view.default, aten._unsafe_view.default)
PICKS = (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim)

# What these read is in the wrapper itself.
METADATA = frozenset(
    "size dim ndimension stride numel nelement __len__ is_contiguous is_floating_point is_complex "
    "is_signed get_device element_size storage_offset __hash__ requires_grad_ is_inference "
    "is_same_size has_names".split()
)
# These go for the storage, past every dispatcher, so the real tensor must stand in their place.
STORAGE = frozenset(
    "numpy tolist __array__ data_ptr untyped_storage storage _typed_storage __reduce_ex__ "
    "__deepcopy__ __dlpack__ share_memory_ is_shared pin_memory".split()
)
GRADIENT_WATCHERS = frozenset(("register_hook", "retain_grad"))
RECORDED = frozenset(
    "float double half bfloat16 to type contiguous clone detach view reshape flatten "
    "unsqueeze squeeze __getitem__ select narrow mul multiply div divide true_divide __rmul__ tanh "
    "add sub subtract __radd__ cat concat concatenate".split()
)
SCALING_NAMES = frozenset("mul multiply div divide true_divide add sub subtract".split())
VALUE_GETTERS = tuple(getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))


@dataclass(frozen=True)
class Op:
    """One recorded step: `func(x, *args, **kwargs)` of an aten overload; token op or value op."""

    func: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    on_tokens: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.func(x, *self.args, **self.kwargs)


class Source:
    """Where values come from: one call of the head, or several results joined."""

    def __init__(self) -> None:
        self.nodes: weakref.WeakSet[Node] = weakref.WeakSet()
        self.gradient_is_watched = False
        """Somebody wants the gradient of the logits themselves: no loss in chunks."""

    def values(self) -> Tensor:
        """The real tensor, without a graph. Called once for as long as it is kept."""
        raise NotImplementedError

    def cross_entropy(self, lazy: LazyLogits, target: Tensor, **options: Any) -> Tensor | None:
        """The loss over `lazy` without its values, or None where that cannot be done."""
        return None

    def settle(self) -> None:
        """Compute every step recorded so far. Somebody gets hold of the memory and may write into
        it, and what was derived before that write must not see it."""
        for node in list(self.nodes):
            node.values()

    def watch_gradient(self) -> None:
        """Somebody wants to see the gradient of these logits."""
        self.gradient_is_watched = True


class Node:
    """A tensor that may not exist yet: `op(parent)`, or what `source` gives where parent is None.

    meta: a meta tensor of the same shape, strides and dtype. real: the values, once computed.
    """

    def __init__(self, source: Source, meta: Tensor, device: torch.device) -> None:
        self.source, self.meta, self.device = source, meta, device
        self.parent: Node | None = None
        self.op: Op | None = None
        self.real: Tensor | None = None
        self.divisor: Tensor | float | None = None
        """What the caller will divide a summed loss by, if it told (see `loss.py`)."""
        source.nodes.add(self)

    def derive(self, op: Op) -> Node:
        """The node of `op(self)`; raises what the real operator would raise for these shapes."""
        to_meta = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (op.args, op.kwargs))
        kwargs = {key: value for key, value in to_meta[1].items() if key != "device"}
        child = Node(self.source, op.func(self.meta, *to_meta[0], **kwargs), self.device)
        child.parent, child.op, child.divisor = self, op, self.divisor
        return child

    def ops(self) -> tuple[Op, ...]:
        """Every step from the source to here, in order."""
        if self.parent is None or self.op is None:
            return ()
        return (*self.parent.ops(), self.op)

    def values(self) -> Tensor:
        """The real tensor, without a graph; views of one another share memory as torch's do."""
        if self.real is None:
            if self.parent is None or self.op is None:
                self.real = self.source.values()
            else:
                before = self.parent.values()
                with torch.no_grad(), torch.inference_mode(mode=before.is_inference()):
                    self.real = self.op(before)
            self.parent = self.op = None
        return self.real


class Joined(Source):
    """`torch.cat` of several lazy tensors along a token dimension, as outputs are joined."""

    def __init__(self, parts: Sequence[Node], dim: int) -> None:
        super().__init__()
        self.parts, self.dim = list(parts), dim

    def values(self) -> Tensor:
        parts = [part.values() for part in self.parts]
        with torch.no_grad(), torch.inference_mode(mode=parts[0].is_inference()):
            joined = torch.cat(parts, self.dim)
        self.parts = []
        return joined


def _recordable(func: Any, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op | None:
    """The op to write down for `func(node, *args, **kwargs)`, or None: compute it now."""
    num_dims = node.meta.dim()
    if func is aten.clone.default or func is aten.alias.default:
        return Op(func, args, kwargs, on_tokens=True)
    if func in RESHAPES:
        keeps_rows = func(node.meta, *args, **kwargs).shape[-1:] == node.meta.shape[-1:]
        return Op(func, args, kwargs, on_tokens=True) if keeps_rows else None
    if func in PICKS and num_dims > 1:
        dim = args[0] if args else 0
        dim = dim % (num_dims + 1 if func is aten.unsqueeze.default else num_dims)
        if func is aten.slice.Tensor:
            return Op(func, args, kwargs, on_tokens=dim < num_dims - 1)
        return Op(func, args, kwargs, on_tokens=True) if dim < num_dims - 1 else None
    if func in VALUE_OPS and _same_for_every_token(node, args) and _keeps_place(node, kwargs):
        return Op(func, args, kwargs, on_tokens=False)
    return None


def _same_for_every_token(node: Node, constants: Sequence[Any]) -> bool:
    """Whether each constant is a number, or a tensor that varies along the vocabulary only."""
    tensors = [x for x in constants if isinstance(x, Tensor)]
    return all(
        not isinstance(x, LazyLogits)
        and not x.requires_grad
        and x.dim() <= node.meta.dim()
        and x.numel() == (x.shape[-1] if x.dim() else 1)
        and x.numel() in (1, node.meta.shape[-1])
        for x in tensors
    )


def _keeps_place(node: Node, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    moved = device is not None and torch.device(device) != node.device
    return not (
        moved or kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided)
    )


def _will_record(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A guess, from above autograd, whether `_recordable` will accept.

    A wrong guess is still right, only later: values are then computed inside the dispatcher, where
    a micro-batch should not have to wait for its neighbours.
    """
    name = getattr(func, "__name__", "")
    if name not in RECORDED or not args:
        return False
    if isinstance(args[0], (tuple, list)):
        return all(isinstance(x, LazyLogits) for x in args[0])
    lazy, others = args[0], pytree.tree_leaves((args[1:], kwargs))
    if not isinstance(lazy, LazyLogits) or any(isinstance(x, LazyLogits) for x in others):
        return False
    tensors = [x for x in others if isinstance(x, Tensor)]
    if tensors and (name not in SCALING_NAMES or not _same_for_every_token(lazy.node, tensors)):
        return False
    if name == "view" and any(isinstance(x, torch.dtype) for x in others):
        return False
    places = [x for x in others if isinstance(x, (str, torch.device))]
    return all(str(place) == str(lazy.node.device) for place in places)


class LazyLogits(torch.Tensor):
    """See the module's docstring. `node` says what it stands for.

    trusted: the autograd node under which the recorded steps are the whole truth. A function that
    passes the tensor through its own backward gives it another one, and then a loss in chunks,
    which takes its gradient straight to the head, would skip that backward.
    """

    node: Node
    trusted: Any

    @staticmethod
    def __new__(cls, node: Node) -> LazyLogits:
        meta = node.meta
        lazy = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=node.device,
        )
        lazy.node, lazy.trusted = node, cls  # no autograd node is `cls`: untrusted until told
        return lazy

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self.node.real is not None:
            return repr(self.node.real)
        meta = self.node.meta
        shape, device = tuple(meta.shape), self.node.device
        return f"LazyLogits(shape={shape}, dtype={meta.dtype}, device='{device}', not computed)"

    def is_computed(self) -> bool:
        """Whether the real values exist."""
        return self.node.real is not None

    def compute(self) -> LazyLogits:
        """Compute the values now, and give back this tensor."""
        self.node.values()
        return self

    def is_trusted(self) -> bool:
        """Whether what autograd has recorded of it is still what `trust` declared."""
        with torch._C.DisableTorchFunctionSubclass():
            wants_own_gradient = self.requires_grad and self.grad_fn is None
            return self.grad_fn is self.trusted and not wants_own_gradient

    def trust(self) -> LazyLogits:
        """Declare that the recorded steps lead here and nothing else did."""
        with torch._C.DisableTorchFunctionSubclass():
            self.trusted = self.grad_fn
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        recorded, name = _will_record(func, args, kwargs), getattr(func, "__name__", "")
        lazies = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls)]
        is_exact = recorded and all(x.is_trusted() for x in lazies)
        if name in STORAGE:
            args = tuple(_Real.apply(x) if isinstance(x, cls) else x for x in args)
        elif name in GRADIENT_WATCHERS:
            lazies[0].node.source.watch_gradient()
        elif not (recorded or name in METADATA or _is_metadata_getter(func, name)):
            for lazy in lazies:
                lazy.node.values()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if is_exact and isinstance(result, cls):
            result.trust()
        return result

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls) and func is aten.detach.default:
            return cls(first.node)
        if isinstance(first, cls) and first.node.real is None:
            op = _recordable(func, first.node, args[1:], kwargs)
            if op is not None:
                return cls(first.node.derive(op))
        if func is aten.cat.default and (joined := _join(*args)) is not None:
            return joined
        return _compute(func, args, kwargs)


def _is_metadata_getter(func: Any, name: str) -> bool:
    return name in ("__get__", "__set__", "__delete__") and func not in VALUE_GETTERS


def _join(parts: Sequence[Tensor], dim: int = 0) -> LazyLogits | None:
    nodes = [x.node for x in parts if isinstance(x, LazyLogits) and x.node.real is None]
    along_tokens = len(nodes) == len(parts) and dim % nodes[0].meta.dim() < nodes[0].meta.dim() - 1
    if not along_tokens or len({node.device for node in nodes}) > 1:
        return None
    meta = torch.cat([node.meta for node in nodes], dim)
    joined = Node(Joined(nodes, dim), meta, nodes[0].device)
    for node in nodes:
        node.source.nodes.add(joined)  # it must read a part before somebody writes into that part
    return LazyLogits(joined)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func` on real values; an in-place one gives back the tensor it was called on."""
    is_view = any(value.alias_info is not None for value in func._schema.returns)
    if is_view or func._schema.is_mutable:
        for lazy in pytree.tree_leaves((args, kwargs)):
            if isinstance(lazy, LazyLogits):
                lazy.node.source.settle()
    real = pytree.tree_map_only(LazyLogits, lambda x: x.node.values(), (args, kwargs))
    result = func(*real[0], **real[1])
    is_in_place = func._schema.is_mutable and isinstance(result, Tensor) and result is real[0][0]
    return args[0] if is_in_place else result


class _Real(torch.autograd.Function):
    """The real tensor in place of a lazy one, its gradient handed on unchanged."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        lazy.node.source.settle()
        return lazy.node.values().detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def _cross_entropy(  # noqa: PLR0913 - the signature is torch's
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`F.cross_entropy` without the logits, or None where it needs them."""
    plain = weight is None and size_average is None and reduce is None
    if not plain or not isinstance(input, LazyLogits) or isinstance(target, LazyLogits):
        return None
    node = input.node
    rows = tuple(node.meta.shape[:1])
    is_classes = node.meta.dim() == 2 and target.dtype == torch.int64 and target.shape == rows
    if not is_classes or node.real is not None or target.device != node.device:
        return None
    if node.source.gradient_is_watched or not input.is_trusted():
        return None
    return node.source.cross_entropy(
        input,
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def picked_rows(hidden: Tensor, ops: Sequence[Op]) -> Tensor:
    """The hidden states behind the rows that `ops` leave, [num_rows, width], in the same order."""
    for op in ops:
        if not op.on_tokens or op.func in (aten.clone.default, aten.alias.default):
            continue
        if op.func in RESHAPES:
            hidden = hidden.reshape([*op.args[0][:-1], hidden.shape[-1]])
        else:
            hidden = op(hidden)
    return hidden.reshape(-1, hidden.shape[-1])


def finished_values(raw: Tensor, ops: Sequence[Op]) -> Tensor:
    """Value ops applied to raw logits [1, num_rows, vocabulary] -> [num_rows, vocabulary]."""
    for op in ops:
        if op.on_tokens:
            continue
        if op.func is aten.slice.Tensor:
            raw = op.func(raw, -1, *op.args[1:])  # its number was that of another shape
        else:
            raw = op(raw)
    return raw.flatten(0, -2)
