"""A config's tiny sister: the same class and flags, a few layers of every kind, narrow, few words.

    for small in candidates(config):      # the smallest first; later ones are wider
        model = model_class(small)        # the caller takes the first that builds and runs

Numbers keep their relations because a whole part (text, vision, …) is divided by two factors: head
counts by one, head widths by the other, all other widths by their product. So whatever was heads ×
head width, or a multiple of the hidden size, still is. What a number means is told by its name (`config_numbers.py`).

Layers: a prefix, and the first two of each further kind. A layer's kind is what all per-layer lists
say of it (`layer_types`), which index lists hold it (`mlp_only_layers`) and on which side of each
threshold it lies (`first_k_dense_replace`); the lists, indices and thresholds follow.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssdtune.visit.config_numbers import (
    FROM_THE_END,
    INDEX_LISTS,
    PERIODS,
    THRESHOLDS,
    Part,
    fields_of,
    is_config,
    is_count,
    num_layers,
    overrides_of,
    parts_of,
    role_of,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX_LAYERS = 4  # a first, a last, and neighbours that can alternate
MAX_LAYERS = 14
VOCABULARY = 160
POSITIONS = 512
PATCHES_A_SIDE = 8  # of an image
HEAD_WIDTHS = (8, 16, 32)  # the narrowest heads to try, one candidate each
OTHER_HEAD_WIDTH = 2  # state-space heads and the like, where no rotary table needs an even half
MIN_HIDDEN = 32
DROPOUT = r".*(dropout|pdrop|drop_rate|drop_path|layerdrop|jitter).*"
HIDDEN_NAMES = ("embed_dim", "hidden_size", "d_model", "n_embd", "dim")
HEAD_NAMES = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
_AT_MOST = {
    "vocabulary": VOCABULARY,
    "positions": POSITIONS,
    "old_positions": POSITIONS // 2,
    "experts": 4,
    "top_k": 2,
    "expert_groups": 2,
    "top_groups": 1,
    "chunk": 16,
    "state": 16,
}
# Roles that also come as a list, one by layer or axis.
_LISTED = frozenset({"width", "heads", "experts", "top_k", "token", "image"})


class ShrinkError(Exception):
    """This config's numbers do not tell how it could be made small."""


# ------------------------------------------------------------------ widths


@dataclasses.dataclass(frozen=True)
class Factors:
    """What counts of heads, widths of heads and all other widths are divided by."""

    heads: int = 1
    head_width: int = 1

    @property
    def width(self) -> int:
        """What all other widths are divided by."""
        return self.heads * self.head_width


def _factors(part: Part, narrowest: int) -> Factors:
    heads = [n for n in part.numbers("heads") if n > 1]
    by_heads = _largest_divisor(heads, lambda f: all(n // f >= 2 for n in heads))
    widths = list(part.numbers("head_width"))
    others = [n for n in part.numbers("other_width") if n > 1]
    hidden, count = part.first(HIDDEN_NAMES), part.first(HEAD_NAMES)
    if not widths and hidden and count and hidden % count == 0:
        widths = [hidden // count]
    if not widths and not others and hidden:  # no heads at all
        return Factors(1, max(1, hidden // max(MIN_HIDDEN, 4 * narrowest)))

    def is_fine(factor: int) -> bool:
        narrow = all(n // factor >= narrowest and n // factor % 2 == n % 2 for n in widths)
        return narrow and all(n // factor >= OTHER_HEAD_WIDTH for n in others)

    return Factors(by_heads, _largest_divisor([*widths, *others], is_fine))


def _largest_divisor(numbers: Sequence[int], is_fine: Any) -> int:
    common = math.gcd(*numbers) if numbers else 1
    divisors = (f for f in range(common, 0, -1) if common % f == 0)
    return next((f for f in divisors if is_fine(f)), 1)


def _divided(value: int, by: int) -> int:
    """Exactly where it divides; else near it, a multiple of four."""
    if value <= 0 or value % by == 0:
        return value // by if value > 0 else value
    return max(4, round(value / by / 4) * 4) if value > 4 else value


# ------------------------------------------------------------------ layers


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which of a tower's layers stay."""

    total: int
    kept: tuple[int, ...]

    def resized(self, name: str, value: Any) -> Any:
        """The value of a config's field for the kept layers; the same where it is not about layers."""
        if isinstance(value, (list, tuple)):
            if _is_index_list(name, value, self.total):
                return type(value)(i for i, layer in enumerate(self.kept) if layer in value)
            is_per_layer = len(value) == self.total > 1
            return type(value)(value[i] for i in self.kept) if is_per_layer else value
        if _is_pattern(name, value, self.total):
            return "".join(value[layer] for layer in self.kept)
        if not is_count(value):
            return value
        if role_of(name) == "layers":
            return len(self.kept) if value == self.total else min(value, PREFIX_LAYERS)
        if re.fullmatch(FROM_THE_END, name):
            return sum(layer >= self.total - value for layer in self.kept)
        if re.fullmatch(THRESHOLDS, name) and 0 <= value <= self.total:
            return sum(layer < value for layer in self.kept)
        return value


def _is_pattern(name: str, value: Any, total: int) -> bool:
    """One letter for each layer, as `hybrid_override_pattern` has it."""
    return isinstance(value, str) and name.endswith("pattern") and len(value) == total


def _is_index_list(name: str, value: Any, total: int) -> bool:
    if not re.fullmatch(INDEX_LISTS, name) or not len(value):
        return False
    is_rising = all(is_count(v) and 0 <= v < total for v in value)
    return is_rising and all(a < b for a, b in itertools.pairwise(value))


def choose_layers(config: PretrainedConfig) -> Layers:
    """A prefix that spans every period, and the first two layers of each kind that it lacks."""
    total = num_layers(config) or 0
    fields = list(fields_of(config))
    overrides = overrides_of(config)
    kinds = [(_kind(fields, layer, total), repr(overrides.get(layer))) for layer in range(total)]
    periods = [v for name, v in fields if re.fullmatch(PERIODS, name) and is_count(v)]
    prefix = max([PREFIX_LAYERS, *(p + 1 for p in periods if 1 < p < MAX_LAYERS - 2)])
    kept = list(range(min(prefix, total)))
    for layer in range(len(kept), total):
        if sum(kinds[k] == kinds[layer] for k in kept) < 2 and len(kept) < MAX_LAYERS:
            kept.append(layer)
    return Layers(total, tuple(kept))


def _kind(fields: Sequence[tuple[str, Any]], layer: int, total: int) -> tuple[Any, ...]:
    kind: list[Any] = []
    for name, value in fields:
        if isinstance(value, (list, tuple)) and _is_index_list(name, value, total):
            kind.append(layer in value)
        elif isinstance(value, (list, tuple)) or _is_pattern(name, value, total):
            kind.append(value[layer] if len(value) == total else None)
        elif is_count(value) and re.fullmatch(FROM_THE_END, name):
            kind.append(layer >= total - value)
        elif is_count(value) and re.fullmatch(THRESHOLDS, name):
            kind.append(layer < value)
    return tuple(map(repr, kind))


# ------------------------------------------------------------------ the small config


def candidates(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yields small copies of a config, the narrowest first; the config itself stays as it is.

    Raises ShrinkError where it has no layers or no hidden size.
    """
    if not any(num_layers(part.configs[0]) for part in parts_of(config)):
        raise ShrinkError(f"{type(config).__name__} does not say how many layers it has")
    seen: list[Mapping[str, Any]] = []
    for narrowest in HEAD_WIDTHS:
        small = copy.deepcopy(config)
        _shrink(small, narrowest)
        described = small.to_dict()
        if described not in seen:
            seen.append(described)
            yield small


@dataclasses.dataclass(frozen=True)
class _Scale:
    """How one tower's numbers shrink. `links`: widths that another tower has shrunk already."""

    factors: Factors
    tokens: _Tokens
    links: Mapping[int, int]


def _shrink(config: PretrainedConfig, narrowest: int) -> None:
    """Changes all towers of a config in place, the language model's first: others hand it vectors."""
    tokens, links = _Tokens(), {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in sorted(parts_of(config), key=lambda part: text not in part.configs):
        factors = _factors(part, narrowest)
        hidden = part.first(HIDDEN_NAMES)
        for member in part.configs:
            _shrink_one(member, _Scale(factors, tokens, links))
            tokens.place(member)
        if hidden and not links:
            links = {hidden: _divided(hidden, factors.width)}


def _shrink_one(config: PretrainedConfig, scale: _Scale) -> None:
    before = dict(vars(config))
    layers, own = choose_layers(config), _own_width(config)
    for name, value in fields_of(config):
        if is_config(value):
            continue
        small = _value(name, layers.resized(name, value), scale, before)
        if role_of(name) == "width" and name != own and is_count(value):
            small = scale.links.get(value, small)
        vars(config)[name] = small
    overrides = overrides_of(config)
    if overrides:
        kept = {
            index: {n: _value(n, v, scale, before) for n, v in overrides[layer].items()}
            for index, layer in enumerate(layers.kept)
            if layer in overrides
        }
        spec = vars(config)["_heterogeneity_spec"]
        vars(config)["_heterogeneity_spec"] = dataclasses.replace(spec, per_layer_overrides=kept)


def _own_width(config: PretrainedConfig) -> str | None:
    """The name of a tower's own hidden size, which may equal the language model's by chance."""
    return next((name for name in HIDDEN_NAMES if name in vars(config)), None)


def _value(name: str, value: Any, scale: _Scale, fields: Mapping[str, Any]) -> Any:
    """A field's value in the small config, its layers already chosen. fields: all as they were."""
    if isinstance(value, float):
        return 0.0 if re.fullmatch(DROPOUT, name) else value
    if isinstance(value, dict):
        return _rope(value, scale.factors)
    if isinstance(value, (list, tuple)) and role_of(name) in _LISTED:
        return type(value)(_value(name, member, scale, fields) for member in value)
    return _number(role_of(name), value, scale, fields) if is_count(value) else value


def _number(role: str, value: int, scale: _Scale, fields: Mapping[str, Any]) -> int:
    if role in _AT_MOST:
        return min(value, _AT_MOST[role])
    match role:
        case "token":
            return scale.tokens.moved(value)
        case "window":  # of attention; a vision tower's is in pixels and follows its patches
            return min(value, 8) if "patch_size" not in fields and value > 0 else value
        case "heads":
            return value // scale.factors.heads if value > 1 else value
        case "head_width" | "other_width":
            return max(1, value // scale.factors.head_width)
        case "width":
            return _divided(value, scale.factors.width)
        case "image":
            return _image_size(value, fields)
        case "image_tokens":
            return 4
    return value


def _image_size(value: int, fields: Mapping[str, Any]) -> int:
    patch = fields.get("patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    return min(value, PATCHES_A_SIDE * patch) if isinstance(patch, int) else value


def _rope(value: dict[Any, Any], factors: Factors) -> dict[Any, Any]:
    """Rotary parameters: lists with one entry for each half-dimension shrink with the heads."""
    small: dict[Any, Any] = {}
    for name, member in value.items():
        if isinstance(member, dict):
            small[name] = _rope(member, factors)
        elif name == "mrope_section":
            ends = [round(end / factors.head_width) for end in itertools.accumulate(member)]
            small[name] = [end - start for start, end in itertools.pairwise([0, *ends])]
        elif name in ("short_factor", "long_factor"):
            small[name] = list(member)[: max(1, len(member) // factors.head_width)]
        elif name == "original_max_position_embeddings":
            small[name] = min(member, _AT_MOST["old_positions"])
        else:
            small[name] = member
    return small


class _Tokens:
    """Special tokens beyond the small vocabulary get ids from its end, equal ones equal ids."""

    def __init__(self) -> None:
        self._moved: dict[int, int] = {}

    def moved(self, token: int) -> int:
        """The id in the small vocabulary."""
        if token < VOCABULARY // 2:
            return token
        return self._moved.setdefault(token, VOCABULARY - 1 - len(self._moved))

    def place(self, config: PretrainedConfig) -> None:
        """Nothing of a tower may lie beyond a vocabulary that was smaller from the start."""
        size = vars(config).get("vocab_size")
        if not is_count(size):
            return
        for name, value in fields_of(config):
            if role_of(name) == "token" and is_count(value) and value >= size:
                vars(config)[name] = size - 1
