"""What `all-linear` means on models of many parts, and what is said about it."""

import dataclasses
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel

from ssdtune.config import TrainConfig
from ssdtune.peft import AdapterError, announce, attach, lora_config, resolve_all_linear

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
EXPECTED = {
    "llama": ATTENTION | MLP,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_fc", "c_proj"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "mamba2": {"in_proj"},  # peft refuses out_proj: its kernel reads the weight
    "qwen3_moe": ATTENTION,
    "gpt_oss": ATTENTION,
    "llama4_text": ATTENTION | MLP,  # every other layer is dense; no router
    "gemma3_vlm": ATTENTION | MLP,
    "t5": {"q", "k", "v", "o", "wi", "wo"},
}


def adapted(model):
    """Full names of the layers that carry an adapter."""
    names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
    return {name.split(".lora_A.")[0].removeprefix("base_model.model.") for name in names}


def all_linear(name):
    return attach(tiny_models.build(name), LoraConfig(r=2, target_modules="all-linear"))


def train_config(**given):
    required = {"model_name_or_path": "m", "dataset": "d.jsonl", "output_dir": Path("o")}
    return TrainConfig(**{**required, **given})


@pytest.mark.parametrize("name", EXPECTED)
def test_all_linear_is_every_linear_layer_of_the_language_model_but_head_and_routers(name):
    assert set(resolve_all_linear(tiny_models.build(name)).modules) == EXPECTED[name]


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_all_linear_makes_an_adapter_on_every_architecture(name):
    model = all_linear(name)
    layers = adapted(model)
    assert layers
    assert not any(
        n.endswith(("lm_head", "embed_out", "router", "shared_expert_gate")) for n in layers
    )
    assert not any(".experts" in n or "vision" in n or "projector" in n for n in layers)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_in_a_vision_language_model_the_tower_is_left_alone_and_that_is_said():
    model = all_linear("gemma3_vlm")
    assert all(name.startswith("model.language_model.layers.") for name in adapted(model))
    assert len(adapted(model)) == 4 * 7
    assert any("towers and projectors" in line for line in announce(model))


def test_a_towers_layers_are_adapted_where_they_are_named():
    model = attach(tiny_models.build("gemma3_vlm"), LoraConfig(r=2, target_modules=["fc1"]))
    assert all("vision_tower" in name for name in adapted(model))
    assert not any("towers" in line for line in announce(model))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_stacked_experts_are_adapted_by_name_only_and_that_is_said(name):
    told = "\n".join(announce(all_linear(name)))
    assert "not adapted: the experts (name down_proj, gate_up_proj" in told
    wanted = ["q_proj", "gate_up_proj", "down_proj"]
    model = attach(tiny_models.build(name), LoraConfig(r=2, target_modules=wanted))
    assert any(".experts" in layer for layer in adapted(model))
    assert any(layer.endswith("q_proj") for layer in adapted(model))
    assert "not adapted: the experts" not in "\n".join(announce(model))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_vlm"])
def test_the_saved_adapter_loads_onto_the_same_layers(name, tmp_path):
    model = all_linear(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_models.build(name), tmp_path)
    assert adapted(loaded) == adapted(model)


def test_the_keys_of_a_run_become_the_adapters():
    model = tiny_models.build("llama")
    keys = {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "use_dora": True, "use_rslora": True}
    config = lora_config(train_config(**keys, lora_modules_to_save=("lm_head",)), model)
    found = dataclasses.asdict(config)
    for key, value in {"r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "use_dora": True}.items():
        assert found[key] == value
    assert found["use_rslora"]
    assert found["modules_to_save"] == ["lm_head"]
    assert found["task_type"] == "CAUSAL_LM"
    assert set(found["target_modules"]) == ATTENTION | MLP


def test_what_trains_is_said_with_its_size():
    model = attach(tiny_models.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    count = 4 * (2 * 64 + 2 * 64)
    lines = announce(model)
    assert lines[0] == "adapter   LoRA r2 on q_proj"
    assert lines[1].startswith(f"trains    {count:,} parameters (4.10 KB; ")


def test_a_name_that_no_layer_has_is_refused_with_the_nearest_one():
    with pytest.raises(AdapterError, match="no layer of this model is called gate_porj") as caught:
        attach(tiny_models.build("llama"), LoraConfig(target_modules=["q_proj", "gate_porj"]))
    assert "Did you mean gate_proj?" in str(caught.value)


def test_what_peft_refuses_is_refused_in_few_words():
    with pytest.raises(AdapterError, match="peft can't put this adapter on") as caught:
        attach(tiny_models.build("mamba2"), LoraConfig(target_modules=["out_proj"]))
    assert len(str(caught.value).splitlines()) <= 4


def test_the_configuration_that_was_given_is_left_as_it_was():
    given = LoraConfig(r=2, target_modules="all-linear")
    attach(tiny_models.build("gemma3_vlm"), given)
    assert given.target_modules == "all-linear"
    assert given.exclude_modules is None
