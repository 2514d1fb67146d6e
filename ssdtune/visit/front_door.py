"""The front door: cuts a step's batch into micro-batches where the batch axis is known, and joins the outputs.

Only arguments whose axis is known are cut: a table by name, else the first dimension where it is the number of rows.
Image patches follow the grid rows of their images, and those the image tokens of their rows. Anything else is refused
by name: a list of separately collated micro-batches (`micro_batches=[…]`) never needs cutting.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from ssdtune.errors import SSDTuneError

MICRO_BATCHES = "micro_batches"
_SHARED = frozenset(
    {"num_items_in_batch", "cache_position", "logits_to_keep", "return_dict", "use_cache"}
)
CACHES = ("past_key_values", "cache", "cache_params")  # the last: Mamba's in older releases
_PER_IMAGE = ("image_sizes", "pixel_attention_mask")
_REFUSED = {
    "cu_seq_lens_q": "packed sequences share one row",
    "cu_seq_lens_k": "packed sequences share one row",
    "max_length_q": "packed sequences share one row",
    "max_length_k": "packed sequences share one row",
    **dict.fromkeys(CACHES, "a cache can't be cut"),
}


class FrontDoorError(SSDTuneError):
    """A batch that can't be cut into micro-batches, or outputs that can't be joined."""


def cut(kwargs: Mapping[str, Any], micro_batch_size: int, config: Any) -> list[dict[str, Any]]:
    """The micro-batches of a batch: contiguous groups of `micro_batch_size` rows, the last one smaller if need be.

    kwargs: what the model's forward is called with. Raises FrontDoorError that names the argument.
    """
    rows = _num_rows(kwargs)
    if rows is None or rows <= micro_batch_size:
        return [dict(kwargs)]
    spans = [
        (start, min(start + micro_batch_size, rows)) for start in range(0, rows, micro_batch_size)
    ]
    pieces: list[dict[str, Any]] = [{} for _ in spans]
    images = _image_spans(kwargs, spans, config)
    for name, value in kwargs.items():
        for piece, part in zip(pieces, _cut_one(name, value, rows, spans, images), strict=True):
            piece[name] = part
    return pieces


def given(pieces: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The micro-batches that a caller cut: mappings with the same keys. Other keywords go to each of them."""
    if args or not isinstance(pieces, (list, tuple)) or not pieces:
        what = "beside positional arguments" if args else f"as {str(pieces)[:40]!r}"
        raise FrontDoorError(
            f"{MICRO_BATCHES} came {what}; give a list of batches, each a dict of what forward takes."
        )
    for i, piece in enumerate(pieces):
        if not isinstance(piece, Mapping):
            raise FrontDoorError(
                f"{MICRO_BATCHES}[{i}] is a {type(piece).__name__}, not a dict of what forward takes."
            )
        if piece.keys() != pieces[0].keys():
            raise FrontDoorError(
                f"{MICRO_BATCHES}[{i}] has {sorted(piece)}, but {MICRO_BATCHES}[0] has {sorted(pieces[0])}: "
                f"their outputs couldn't be joined."
            )
    return [{**kwargs, **piece} for piece in pieces]


def refuse_filled_cache(kwargs: Mapping[str, Any]) -> None:
    """Recompute would read keys and values that are gone or add its own once more. Empty caches are left out."""
    for name in CACHES:
        num_cached = getattr(kwargs.get(name), "get_seq_length", lambda: 0)()
        if num_cached:
            raise FrontDoorError(
                f"{name} brings a cache of {num_cached} positions into training, which a streamed model can't use.\n"
                f"Prefix tuning is not supported: choose LoRA or prompt tuning. To only evaluate, use torch.no_grad()."
            )


def _num_rows(kwargs: Mapping[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels", "pixel_values"):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


Spans = list[tuple[int, int]]


def _cut_one(
    name: str, value: Any, rows: int, spans: Spans, images: Mapping[str, Spans]
) -> list[Any]:
    if value is None or name in _SHARED or isinstance(value, (bool, int, float, str)):
        return [value] * len(spans)
    if name in _REFUSED:
        raise FrontDoorError(_cannot_cut(name, _REFUSED[name]))
    if name == "encoder_outputs" and isinstance(value, (tuple, ModelOutput)):
        return _cut_states(value, rows, spans)
    if not isinstance(value, torch.Tensor):
        raise FrontDoorError(_cannot_cut(name, f"it is a {type(value).__name__}"))
    if value.dim() == 0:
        return [value] * len(spans)
    if name in images:
        return [value[a:b] for a, b in images[name]]
    if name == "position_ids":
        return _cut_positions(value, rows, spans)
    if value.shape[0] == rows:
        return [value[a:b] for a, b in spans]
    raise FrontDoorError(_cannot_cut(name, f"its shape is {tuple(value.shape)} for {rows} rows"))


def _cut_states(value: Any, rows: int, spans: Spans) -> list[Any]:
    """An encoder's outputs, as generation without a cache hands them to every step."""
    if isinstance(value, ModelOutput):
        cut_fields = {k: _cut_states(v, rows, spans) for k, v in value.items()}
        return [type(value)(**{k: v[i] for k, v in cut_fields.items()}) for i in range(len(spans))]
    if isinstance(value, tuple):
        return list(zip(*(_cut_states(v, rows, spans) for v in value), strict=True))
    return _cut_one("encoder_outputs[...]", value, rows, spans, {})


def _cut_positions(value: torch.Tensor, rows: int, spans: Spans) -> list[torch.Tensor]:
    """(rows, length); (1, length) for all rows; (3 or 4, rows, length) with multimodal rotary positions."""
    if value.dim() == 2 and value.shape[0] == 1 and rows > 1:
        return [value] * len(spans)
    if value.dim() == 3 and value.shape[1] == rows:
        return [value[:, a:b] for a, b in spans]
    if value.dim() == 2 and value.shape[0] == rows:
        return [value[a:b] for a, b in spans]
    raise FrontDoorError(
        _cannot_cut("position_ids", f"its shape is {tuple(value.shape)} for {rows} rows")
    )


def _cannot_cut(name: str, why: str) -> str:
    return (
        f"can't cut {name!r} into micro-batches: {why}.\n"
        f"Pass a list of separately collated micro-batches instead: model({MICRO_BATCHES}=[batch, batch, …]), "
        f"or leave out micro_batch_size."
    )


def _image_spans(kwargs: Mapping[str, Any], spans: Spans, config: Any) -> dict[str, Spans]:
    """For arguments that follow images rather than rows: which of their rows belong to each micro-batch."""
    grid = kwargs.get("image_grid_thw")
    ids, pixels = kwargs.get("input_ids"), kwargs.get("pixel_values")
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if not isinstance(pixels, torch.Tensor) or not isinstance(ids, torch.Tensor) or token is None:
        return {}
    is_image = ids == token
    tokens = [int(is_image[a:b].sum()) for a, b in spans]
    if isinstance(grid, torch.Tensor):
        merge = getattr(getattr(config, "vision_config", config), "spatial_merge_size", 1)
        patches = grid.prod(-1).tolist()
        images = _group(patches, [t * merge * merge for t in tokens])
        bounds = [0, *torch.tensor(patches).cumsum(0).tolist()]
        return {
            "image_grid_thw": images,
            "pixel_values": [(bounds[a], bounds[b]) for a, b in images],
        }
    total = sum(tokens)
    if not total or total % pixels.shape[0]:
        raise FrontDoorError(
            _cannot_cut("pixel_values", f"{total} image tokens for {pixels.shape[0]} images")
        )
    images = _group([total // pixels.shape[0]] * pixels.shape[0], tokens)
    return dict.fromkeys(("pixel_values", *_PER_IMAGE), images)


def _group(sizes: Sequence[int], wanted: Sequence[int]) -> Spans:
    """Spans of consecutive items whose sizes add up to each wanted number."""
    spans, start = [], 0
    for want in wanted:
        stop, got = start, 0
        while got < want and stop < len(sizes):
            got += sizes[stop]
            stop += 1
        if got != want:
            raise FrontDoorError(
                _cannot_cut("pixel_values", "images and image tokens of the rows don't match")
            )
        spans.append((start, stop))
        start = stop
    return spans


def join(outputs: Sequence[Any], losses: torch.Tensor | None) -> Any:
    """One output from those of the micro-batches: rows one after the other, the losses' sum as the loss.

    outputs: ModelOutputs or tuples of one kind. Micro-batches of different lengths keep their fields as tuples.
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, ModelOutput):
        joined = {k: _join_field([o[k] for o in outputs], k == "loss", losses) for k in first}
        return type(first)(**joined)
    if isinstance(first, tuple):
        return tuple(
            _join_field([o[i] for o in outputs], i == 0, losses) for i in range(len(first))
        )
    if isinstance(first, torch.Tensor):
        return _join_field(list(outputs), True, losses)
    raise FrontDoorError(f"can't join outputs of type {type(first).__name__} over micro-batches")


def _join_field(values: list[Any], may_be_loss: bool, losses: torch.Tensor | None) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        if first.dim() == 0:
            return losses if may_be_loss and losses is not None else sum(values[1:], first)
        if all(v.shape[1:] == first.shape[1:] for v in values):
            return torch.cat(values)
        return tuple(values)
    if isinstance(first, (tuple, list)):
        return type(first)(_join_field(list(v), False, None) for v in zip(*values, strict=True))
    return first


def loss_of(output: Any) -> torch.Tensor | None:
    """The scalar loss in a model's output, if there is one."""
    if isinstance(output, ModelOutput):
        return output.get("loss")
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, torch.Tensor) and first.dim() == 0 else None


@functools.cache
def _parameters(function: Any) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(function).parameters
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def accepts(forward: Callable[..., Any], name: str) -> bool:
    """Whether a forward names this parameter."""
    return name in _parameters(getattr(forward, "__func__", forward))[0]


def accepts_extra(forward: Callable[..., Any]) -> bool:
    """Whether a forward takes further keywords, as those do that hand them to their loss."""
    names, has_extra = _parameters(getattr(forward, "__func__", forward))
    return has_extra or "num_items_in_batch" in names


def bind(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments by name, so that they can be cut by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(forward).parameters)
    if len(args) > len(names):
        raise FrontDoorError(f"forward takes {len(names)} positional arguments, got {len(args)}")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def num_trained(piece: Mapping[str, Any], config: Any) -> int | None:
    """Label positions of a micro-batch that its loss is the mean over; None without labels.

    Sequence labels are shifted by one inside a causal loss, so the first position has no prediction. A decoder
    behind an encoder shifts its inputs instead.
    """
    labels = piece.get("shift_labels", piece.get("labels"))
    if not isinstance(labels, torch.Tensor):
        return None
    all_count = (
        "shift_labels" in piece or labels.dim() < 2 or getattr(config, "is_encoder_decoder", False)
    )
    return int(((labels if all_count else labels[..., 1:]) != -100).sum())
