"""What a config's numbers mean, told by their names, and how they lie in towers (text, vision, …).

A whole number's *role* is what it counts or measures: layers, heads, a head's width, positions. A *part* is one tower's
config with those that only continue it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXPERTS = r"(moe_)?(num|n)_(local_|routed_)?experts"
_TOP_K = r"(moe_)?(top_?k|k)|moe_topk|(num_)?(experts|selected)_per_tok(en)?|num_selected_experts|top_k_experts"
ROLES: tuple[tuple[str, str], ...] = (  # the first that matches a whole name counts
    (r".*token_(id|ids|index)|image_token|.*_token", "token"),
    (r".*vocab_size.*|.*vocabulary.*", "vocabulary"),
    (r"original_max_position_embeddings", "old_positions"),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length"
        r"|max_(source|target)_positions|max_sequence_length",
        "positions",
    ),
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|window_size", "window"),
    (_EXPERTS, "experts"),
    (_TOP_K, "top_k"),
    (r"n_group|num_expert_groups?", "expert_groups"),
    (r"topk_group", "top_groups"),
    (r"(mamba_)?chunk_size", "chunk"),
    (r"(ssm_|mamba_)?(d_)?state(_size)?", "state"),
    (
        r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(encoder|decoder)_layers|num_blocks|depth",
        "layers",
    ),
    (
        r"(.*_)?(num|n)_(.*_)?heads?|(encoder|decoder)_attention_heads|n_head_kv|kv_n_heads"
        r"|num_query_groups|(mamba_)?n_?groups|num_key_value_groups",
        "heads",
    ),
    (r"head_dim|kv_channels|d_kv|d_head|attention_head_dim|rotary_dim", "head_width"),
    (r"(.*_)?head_dim|(.*_)?d_head|.*headdim|.*head_size|qk_(nope|rope)_head_dim", "other_width"),
    (r"hidden_size_per_layer_input", "width"),
    (r".*(layer|block|position|kernel|theta|base|multiple|factor|scalar|num_).*", "other"),
    (r"image_size", "image"),
    (r"mm_tokens_per_image|image_seq_length", "image_tokens"),
    (
        r".*(hidden|intermediate|ffn|inner|embd|embed|emb_dim|width|rank|lru|mlp|d_model|d_ff|d_ssm"
        r"|out_dim|output_dim|projection_dim|dim).*",
        "width",
    ),
)
# What numbers and lists say of layers. Thresholds: those below are of one kind. From the end: so many of the last are.
# Periods: every so many, one is. Index lists: those named are.
THRESHOLDS = r"first_k_dense_replace|num_dense_layers|.*layer_(start|end)_index|max_window_layers"
FROM_THE_END = r"num_kv_shared_layers"
PERIODS = r".*(period|interval|every_n_layers|sparse_step|layer_step|layer_freq)"
INDEX_LISTS = r".*(layers|idxs?|indices|indexes|layer_ids)"


def role_of(name: str) -> str:
    """What a whole number of that name is: one of the roles above, "other" where nothing is known."""
    return next((role for pattern, role in ROLES if re.fullmatch(pattern, name)), "other")


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number, no flag."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Part:
    """One tower's config and those that only continue it (no layers of their own)."""

    configs: list[PretrainedConfig]

    def numbers(self, *roles: str) -> Iterator[int]:
        """Yields all whole numbers in these roles, those in lists too."""
        for config in self.configs:
            for name, value in fields_of(config):
                if role_of(name) in roles:
                    yield from (v for v in _flat(value) if is_count(v))
            for overrides in overrides_of(config).values():
                yield from (v for name, v in overrides.items() if role_of(name) in roles)

    def first(self, names: Sequence[str]) -> int | None:
        """The value of the first of these names that is a number."""
        values = (vars(config).get(name) for name in names for config in self.configs)
        return next((v for v in values if is_count(v)), None)


def fields_of(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yields names and values of what a config says. It may be changed meanwhile."""
    for name, value in list(vars(config).items()):
        if not name.startswith("_") and value is not None:
            yield name, value


def overrides_of(config: PretrainedConfig) -> Mapping[int, Mapping[str, Any]]:
    """Layer -> values that it has in the place of the config's own (transformers' per_layer_config)."""
    return getattr(vars(config).get("_heterogeneity_spec"), "per_layer_overrides", {})


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for member in value:
            yield from _flat(member)
    else:
        yield value


def is_config(value: Any) -> bool:
    """Whether it is a part's config, whatever its class."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def parts_of(config: PretrainedConfig) -> list[Part]:
    """The towers of a config; one without layers belongs to the tower it sits in."""
    own, parts = Part([config]), []
    for _, value in fields_of(config):
        if is_config(value):
            below = parts_of(value)
            if len(below) == 1 and num_layers(value) is None:
                own.configs.extend(below[0].configs)
            else:
                parts.extend(below)
    return [own, *parts]


def num_layers(config: PretrainedConfig) -> int | None:
    """How many layers the tower has, None for a config without any."""
    for name, value in fields_of(config):
        if role_of(name) == "layers" and is_count(value):
            return value
    if any(is_config(value) for _, value in fields_of(config)):
        return None
    found = getattr(config, "num_hidden_layers", None)  # some compute it
    return found if is_count(found) else None
