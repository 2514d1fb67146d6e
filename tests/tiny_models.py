"""Tiny random models of many architectures, batches for them, and their checkpoints as the hub has them.

One table, `CONFIGS`: name -> function that makes a config (hidden 64, 4 layers, 199 tokens, no
dropout). `build` makes the model, `batch` something to train it on, `save` a sharded folder.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 199
IMAGE_TOKEN, IMAGE_START, IMAGE_END = 190, 191, 192
TOKENS_PER_IMAGE = 4

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def small(config_class: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    return config_class(**{**SMALL, **more})


def gemma3_vlm() -> PretrainedConfig:
    text = small(tf.Gemma3TextConfig, head_dim=16, **SLIDING).to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    return tf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
    )


def deepseek_v3() -> PretrainedConfig:
    latent = {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    routed = {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    return small(tf.DeepseekV3Config, num_key_value_heads=4, **latent, **routed)


def qwen3_next() -> PretrainedConfig:
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    kinds = ["linear_attention", "full_attention"] * 2
    return small(
        tf.Qwen3NextConfig,
        head_dim=16,
        layer_types=kinds,
        shared_expert_intermediate_size=32,
        **linear,
        **EXPERTS,
    )


def gemma3n() -> PretrainedConfig:
    extra = {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    }
    return small(tf.Gemma3nTextConfig, head_dim=16, **SLIDING, **extra)


def mamba2() -> PretrainedConfig:
    sizes = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16}
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": VOCAB, "use_cache": False}
    return tf.Mamba2Config(expand=2, **sizes, **shape)


def llama4_text() -> PretrainedConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
    return small(
        tf.Llama4TextConfig,
        head_dim=16,
        intermediate_size_mlp=128,
        attention_chunk_size=16,
        **experts,
    )


def gpt2() -> PretrainedConfig:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB}
    return tf.GPT2Config(**shape, use_cache=False, bos_token_id=1, eos_token_id=2, **no_dropout)


def opt() -> PretrainedConfig:
    return small(
        tf.OPTConfig, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, max_position_embeddings=256
    )


def t5() -> PretrainedConfig:
    return tf.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=4,
        num_heads=4,
        vocab_size=VOCAB,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )


def bart() -> PretrainedConfig:
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 4, "attention_heads": 4, "ffn_dim": 128}.items()
    }
    return tf.BartConfig(
        d_model=64,
        vocab_size=VOCAB,
        dropout=0.0,
        max_position_embeddings=256,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **sides,
    )


CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: small(tf.LlamaConfig),
    "qwen3": lambda: small(tf.Qwen3Config, head_dim=16),
    "gemma3": lambda: small(tf.Gemma3TextConfig, head_dim=16, **SLIDING),
    "opt": opt,
    "gpt2": gpt2,
    "mistral": lambda: small(tf.MistralConfig, sliding_window=8),
    "phi3": lambda: small(tf.Phi3Config),
    "mixtral": lambda: small(tf.MixtralConfig, num_local_experts=4),
    "qwen3_moe": lambda: small(tf.Qwen3MoeConfig, head_dim=16, **EXPERTS),
    "gpt_oss": lambda: small(
        tf.GptOssConfig, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": deepseek_v3,
    "bloom": lambda: tf.BloomConfig(
        hidden_size=64, n_layer=4, n_head=4, vocab_size=VOCAB, use_cache=False, **NO_DROPOUT
    ),
    "falcon": lambda: small(tf.FalconConfig, **NO_DROPOUT),
    "gpt_neox": lambda: small(tf.GPTNeoXConfig, classifier_dropout=0.0, **NO_DROPOUT),
    "mamba2": mamba2,
    "gemma3n": gemma3n,
    "olmo2": lambda: small(tf.Olmo2Config),
    "granite": lambda: small(tf.GraniteConfig),
    "glm4": lambda: small(tf.Glm4Config, head_dim=16),
    "stablelm": lambda: small(tf.StableLmConfig),
    "qwen3_next": qwen3_next,
    "llama4_text": llama4_text,
    "gemma3_vlm": gemma3_vlm,
    "t5": t5,
    "bart": bart,
}
# Two layers of half the width, for tests of many steps: what the config has otherwise.
NARROW = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
SMALLER: dict[str, dict[str, Any]] = {
    "llama": {**NARROW, "head_dim": 8},
    "gemma3": {**NARROW, "layer_types": SLIDING["layer_types"][:2]},
    "opt": {**NARROW, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"num_hidden_layers": 2, "hidden_size": 32},
    "mixtral": {**NARROW, "head_dim": 8},
    "mamba2": {"num_hidden_layers": 2, "hidden_size": 32, "num_heads": 4},
}
SEQ2SEQ = ("t5", "bart")
VISION = ("gemma3_vlm",)
CAUSAL = tuple(name for name in CONFIGS if name not in SEQ2SEQ + VISION)


def auto_class(name: str) -> Any:
    if name in SEQ2SEQ:
        return tf.AutoModelForSeq2SeqLM
    return tf.AutoModelForImageTextToText if name in VISION else tf.AutoModelForCausalLM


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 1, *, is_smaller: bool = False
) -> PreTrainedModel:
    """A random model with every parameter and persistent buffer random (biases, norms too)."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    if is_smaller:
        config.update(SMALLER[name])
    model = auto_class(name).from_config(config, dtype=dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            # Zeros and ones would hide a tensor that landed at the wrong place.
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype), alpha=0.02)
    return model


def batch(name: str, rows: int = 2, length: int = 17, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens [rows, length] with labels; the vision model's rows hold one image each."""
    random = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, IMAGE_TOKEN, (rows, length), generator=random)
    made = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if name in VISION:
        is_image = torch.zeros_like(input_ids)
        is_image[:, 2 : 2 + TOKENS_PER_IMAGE] = 1
        input_ids[:, 1], input_ids[:, 2 + TOKENS_PER_IMAGE] = IMAGE_START, IMAGE_END
        input_ids[is_image.bool()] = IMAGE_TOKEN
        made["token_type_ids"] = is_image
        made["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=random)
    if name in SEQ2SEQ:
        made["labels"] = torch.randint(3, IMAGE_TOKEN, (rows, length // 2), generator=random)
    else:
        made["labels"] = input_ids.clone()
    return made


def save(model: PreTrainedModel, folder: Path | str, max_shard_size: str = "200KB") -> Path:
    """Write config and sharded safetensors in the hub's form (experts unfused, tied weights once)."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of linear layers, as peft wants them.

    Left out: heads, routers, and layers named by a number (`projections.0` would match every
    module whose name ends in `.0`).
    """
    left_out = {"lm_head", "embed_out", "router", "modality_router", "gate", "shared_expert_gate"}
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return sorted(leaf for leaf in leaves - left_out if not leaf.isdigit())
