"""Architectures of GGUF files: which transformers model each is, and what llama.cpp's converter did to its values.

One whose values it changes in a way that no move of bytes gives back is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ssdtune.swap.gguf import Gguf
from ssdtune.swap.header import quoted, refuse

OTHER_FILE: Final = (
    "Nothing was loaded. Use the safetensors of this model: as published, or by `ssdtune pack`."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp calls one. model_types: of configs whose models it is; the first, of the config that is made of
    the file's keys. is_paired: whether query and key rows were moved. is_shifted: whether norms have one more. experts:
    their module in a layer, in the names of files that have each for itself; projections: of an expert there.
    is_turned: whether experts are what `TurnedExperts` says. keys: beside `gguf_config.KEYS`, more that the config
    needs. fixed: values that no key has; yarn: the same of rotations, where YaRN may scale them. untold: what the
    config must say and no key does."""

    model_types: tuple[str, ...]
    is_paired: bool = False
    is_shifted: bool = False
    experts: str = ""
    projections: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"gate": "gate_proj", "up": "up_proj"}
    )
    is_turned: bool = False
    untold: str = ""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    yarn: Mapping[str, Any] = dataclasses.field(default_factory=dict)


EXPERT_KEYS: Final = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SHARED_KEYS: Final = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
LOCAL_EXPERT_KEYS: Final = {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
ARCHITECTURES: Final = {
    "llama": Architecture(("llama", "mistral"), is_paired=True),
    "qwen2": Architecture(("qwen2",)),
    "qwen2moe": Architecture(("qwen2_moe",), experts="mlp.experts", keys=EXPERT_KEYS | SHARED_KEYS),
    "qwen3": Architecture(("qwen3",)),
    "qwen3moe": Architecture(
        ("qwen3_moe",), experts="mlp.experts", keys=EXPERT_KEYS, fixed={"norm_topk_prob": True}
    ),
    "phi3": Architecture(("phi3",)),
    "gemma": Architecture(("gemma",), is_shifted=True),
    "gemma2": Architecture(
        ("gemma2",), is_shifted=True, untold="what queries are divided by, which layers slide"
    ),
    "gemma3": Architecture(
        ("gemma3_text",), is_shifted=True, untold="what queries are divided by, which layers slide"
    ),
    # llama.cpp has the experts' activation as constants, and every other layer slides, as transformers has it by
    # default. YaRN's bounds are not rounded in any model of OpenAI's (`truncate` in config.json).
    "gpt-oss": Architecture(
        ("gpt_oss",),
        is_turned=True,
        keys=LOCAL_EXPERT_KEYS | {"attention.sliding_window": "sliding_window"},
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        yarn={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
}
# What says llama and has experts.
MIXTRAL: Final = Architecture(
    ("mixtral",),
    is_paired=True,
    experts="block_sparse_moe.experts",
    projections={"gate": "w1", "up": "w3"},
    keys=LOCAL_EXPERT_KEYS,
)
# What the converter computes for others, so that no move gives it back.
COMPUTED: Final = {
    "nemotron": "adds one to the weights of norms",
    "qwen35": "adds one to the weights of norms",
    "qwen35moe": "adds one to the weights of norms",
    "mamba": "stores -exp(A_log)",
}


def architecture_of(gguf: Gguf) -> Architecture:
    """The file's. Raises CheckpointError for one that is not read."""
    name = gguf.architecture
    if name in COMPUTED:
        refuse(
            gguf.path,
            f"it is {quoted(name)}: for that, llama.cpp's converter {COMPUTED[name]}. Values are not computed while a "
            "model is read.",
            way_out=OTHER_FILE,
        )
    if name not in ARCHITECTURES:
        refuse(
            gguf.path,
            f"its architecture is {quoted(name)}; {', '.join(ARCHITECTURES)} are read.",
            way_out=OTHER_FILE,
        )
    if name == "llama" and gguf.metadata.get("llama.expert_count", 0):
        return MIXTRAL
    return ARCHITECTURES[name]
