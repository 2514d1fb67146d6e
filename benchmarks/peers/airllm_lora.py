"""AirLLM's LoRA trainer, and its twin in memory with the same adapters.

It takes Qwen3.5-shaped models only, and one micro-batch a step, so both train a random model of
that shape, made for the run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import (
    Base,
    Spec,
    load_plain,
    make_batch,
    make_optimizer,
    trained_elements,
)


def write_random_model(folder: Path, dtype: str, config: Spec | None = None) -> int:
    """Writes a random Qwen3.5 model with about SmolLM2's width and depth; returns its elements."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "tie_word_embeddings": False,
        **(config or {}),
    }
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    vision["out_hidden_size"] = text["hidden_size"]
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def seed_adapters(model: torch.nn.Module, seed: int) -> None:
    """The same first values on both sides, whatever was drawn before. B stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("lora_A"):
                bound = parameter.shape[1] ** -0.5
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2 * drawn - 1) * bound)


class AirLLM(Base):
    """Its own trainer as it comes, prefetching on. spec: `scratch`: where its per-layer copy goes."""

    trains = "lora"

    def __init__(self, spec: Spec) -> None:
        from airllm import AirLLMLoRA  # type: ignore[import-not-found]

        self.trainer: Any = AirLLMLoRA(
            spec["model"],
            device="cpu",
            dtype=getattr(torch, spec["dtype"]),
            layer_shards_saving_path=spec["scratch"],
            max_seq_len=len(spec["batch"][0]),
            lora_r=spec["lora_rank"],
            lora_alpha=2 * spec["lora_rank"],
            lr=spec["learning_rate"],
        )
        seed_adapters(self.trainer.model, spec["seed"])
        self.batch = make_batch(spec["batch"])
        self.layers = Path(spec["scratch"])

    def settle(self) -> None:
        """It reads through the page cache, which would hold this small model whole and a large one
        not at all: each step begins without."""
        for file in self.layers.rglob("*.safetensors"):
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def step(self) -> float:
        return float(self.trainer.train_step(self.batch["input_ids"], self.batch["labels"]))

    def about(self) -> dict[str, Any]:
        elements = trained_elements(self.trainer.model)
        return {"trained_elements": elements, "page_cache": "dropped before each step"}


class AirLLMTwin(Base):
    """The same model and adapters, all in memory, with gradient checkpointing, in one batch."""

    trains = "lora"

    def __init__(self, spec: Spec) -> None:
        from airllm.lora_linear import inject_lora  # type: ignore[import-not-found]

        model = load_plain(spec)
        model.requires_grad_(False)
        rank = spec["lora_rank"]
        layers = model.model.language_model.layers
        inject_lora(layers, r=rank, alpha=2 * rank, dtype=getattr(torch, spec["dtype"]))
        self.model = model.train()
        seed_adapters(self.model, spec["seed"])
        self.batch = make_batch(spec["batch"])
        self.optimizer = make_optimizer(self.model, spec)

    def step(self) -> float:
        loss = self.model(input_ids=self.batch["input_ids"], labels=self.batch["labels"]).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def about(self) -> dict[str, Any]:
        return {"trained_elements": trained_elements(self.model)}
