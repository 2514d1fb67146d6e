"""PEFT's methods on a streamed model: each trains as in memory, or is refused with a reason."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from support import (
    ROUNDING,
    accumulate_means,
    assert_same_training,
    cut,
    digests,
    make_pair,
    trained,
    with_adapter,
    with_lora,
)

from ssdtune.errors import SSDTuneError

Stream = Callable[..., Any]
ATTENTION = ["q_proj", "v_proj"]
LLM: dict[str, Any] = {"task_type": "CAUSAL_LM"}

EXACT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", **LLM),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, use_rslora=True, **LLM),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, **LLM),
    "lora with biases": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, bias="lora_only", lora_bias=True, **LLM
    ),
    "lora on embedding and head": lambda: peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], **LLM
    ),
    "lora on the head alone": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"], **LLM),
    "lora on the embedding alone": lambda: peft.LoraConfig(
        r=4, target_modules=["embed_tokens"], **LLM
    ),
    "trained head": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["lm_head"], **LLM
    ),
    "trained embedding": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["embed_tokens"], **LLM
    ),
    "trained norms": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, modules_to_save=["input_layernorm", "norm"], **LLM
    ),
    "trainable tokens beside lora": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, trainable_token_indices=[3, 7, 150], **LLM
    ),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 7, 150], **LLM),
    "some layers only": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, layers_to_transform=[1, 3], **LLM
    ),
    "layers passed twice": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, layer_replication=[(0, 3), (1, 4)], **LLM
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=ATTENTION, **LLM),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=ATTENTION, **LLM),
    "oft": lambda: peft.OFTConfig(
        r=0, oft_block_size=8, target_modules=ATTENTION, use_cayley_neumann=False, **LLM
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LLM
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=ATTENTION, **LLM),
    "layer norm tuning": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm", "post_attention_layernorm"], **LLM
    ),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=ATTENTION, **LLM),
}


# Made for the whole batch before the front door cuts it: their gradient is summed over rows at once.
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **LLM),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=32, **LLM
    ),
}


def batches(name: str = "llama", num_steps: int = 3) -> list[dict[str, torch.Tensor]]:
    return [tiny_models.batch(name, 6, seed=step) for step in range(num_steps)]


@pytest.mark.parametrize("variant", EXACT)
def test_training_equals_training_in_memory(variant: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, adapt=lambda m: with_adapter(m, EXACT[variant]()))
    before = digests(tmp_path)
    assert_same_training(pair, batches())
    assert digests(tmp_path) == before


@pytest.mark.parametrize("variant", PROMPTS)
def test_prompts_equal_to_rounding(variant: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, adapt=lambda m: with_adapter(m, PROMPTS[variant]()))
    assert_same_training(pair, batches(), rounding=ROUNDING[torch.float32])


def test_adalora_equals_with_one_micro_batch(tmp_path: Path, stream: Stream) -> None:
    """peft adds its orthogonality term once per forward: several micro-batches make another loss."""
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=10,
        tinit=1,
        tfinal=2,
        deltaT=1,
        target_modules=ATTENTION,
        **LLM,
    )
    pair = make_pair(
        "llama", tmp_path, stream, micro_batch_size=6, adapt=lambda m: with_adapter(m, config)
    )
    for step, batch in enumerate(batches(num_steps=5)):
        assert_same_training(pair, [batch], num_micro=1)
        for model in pair.models:
            model(**batch).loss.backward()
            model.base_model.update_and_allocate(step)
            model.zero_grad()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_lora_on_stacked_experts_equals(name: str, tmp_path: Path, stream: Stream) -> None:
    """Experts are parameters without a module of their own: peft parametrises them for a forward."""
    config = peft.LoraConfig(
        r=2,
        target_modules=ATTENTION,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        **LLM,
    )
    pair = make_pair(name, tmp_path, stream, adapt=lambda m: with_adapter(m, config))
    assert any("experts" in parameter for parameter, _ in trained(pair.streamed))
    assert_same_training(pair, batches(name))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", False])
def test_initialisations_that_leave_the_base_alone_equal(
    init: Any, tmp_path: Path, stream: Stream
) -> None:
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=init, **LLM)
    pair = make_pair("llama", tmp_path, stream, adapt=lambda m: with_adapter(m, config))
    assert_same_training(pair, batches(num_steps=1))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_trained_head_of_a_tied_model_equals(name: str, tmp_path: Path, stream: Stream) -> None:
    """peft trains a copy of the head; the embedding stays as it is."""
    config = peft.LoraConfig(r=4, modules_to_save=["lm_head"], target_modules=tiny_targets(name))
    pair = make_pair(name, tmp_path, stream, adapt=lambda m: with_adapter(m, config))
    if name == "t5":
        means = partial(accumulate_means, is_causal=False)
        rounding = ROUNDING[torch.float32]
        assert_same_training(pair, batches(name), plain_step=means, count=False, rounding=rounding)
    else:
        assert_same_training(pair, batches(name))


def tiny_targets(name: str) -> list[str]:
    return {"gpt2": ["c_attn"], "t5": ["q", "v"]}[name]


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(
    init: Any, tmp_path: Path, stream: Stream
) -> None:
    """The change of the base weights would be lost, and the loss silently wrong."""
    before = saved(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=init)
    with pytest.raises(SSDTuneError, match=r"init_lora_weights"):
        peft.get_peft_model(stream(tmp_path), config)
    assert digests(tmp_path) == before


def test_prefix_tuning_is_refused(tmp_path: Path, stream: Stream) -> None:
    """Its prefix arrives as a filled key-value cache, which recompute could not fill again."""
    saved(tmp_path)
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, **LLM)
    model = peft.get_peft_model(stream(tmp_path), config)
    with pytest.raises(SSDTuneError, match=r"cache"):
        model(**batches()[0]).loss.backward()


def test_adapters_without_memory_are_refused(tmp_path: Path, stream: Stream) -> None:
    """`low_cpu_mem_usage` leaves adapters on the meta device until somebody loads them."""
    saved(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, **LLM)
    model = peft.get_peft_model(stream(tmp_path), config, low_cpu_mem_usage=True)
    with pytest.raises(SSDTuneError, match=r"low_cpu_mem_usage"):
        model(**batches()[0]).loss.backward()


def test_merging_into_streamed_weights_is_refused(tmp_path: Path, stream: Stream) -> None:
    before = saved(tmp_path)
    model = with_lora(stream(tmp_path), ATTENTION)
    with pytest.raises(SSDTuneError, match="never written"):
        model.merge_adapter()
    assert digests(tmp_path) == before
    assert torch.isfinite(model(**batches()[0]).loss)


def saved(folder: Path) -> dict[str, str]:
    """A tiny Llama's folder, and the digests of its files."""
    tiny_models.save(tiny_models.build("llama"), folder)
    return digests(folder)


# ------------------------------------------------------------------ around training


def test_an_adapter_saves_and_loads_in_pefts_format(tmp_path: Path, stream: Stream) -> None:
    """Onto a plain model and onto a streamed one; both answer as the model that was trained."""
    pair = make_pair("llama", tmp_path / "model", stream)
    assert_same_training(pair, batches(num_steps=1))
    pair.streamed.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    plain = type(pair.plain.get_base_model()).from_pretrained(tmp_path / "model")
    batch = batches()[0]
    with torch.no_grad():
        expected = pair.streamed.eval()(**batch).logits.clone()
        for base in (plain, stream(tmp_path / "model")):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            logits = torch.cat([loaded(**piece).logits for piece in cut(batch, 3)])
            assert torch.equal(logits, expected)


def test_an_adapter_on_embedding_and_head_is_saved_without_them(
    tmp_path: Path, stream: Stream
) -> None:
    """peft would write the base's matrices beside it, which are not in memory: it is told how not to."""
    config = EXACT["lora on embedding and head"]
    pair = make_pair("llama", tmp_path / "model", stream, adapt=lambda m: with_adapter(m, config()))
    with pytest.raises(SSDTuneError, match="save_embedding_layers=False"):
        pair.streamed.save_pretrained(tmp_path / "adapter")
    pair.streamed.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == sum(1 for _ in trained(pair.streamed))
    plain = type(pair.plain.get_base_model()).from_pretrained(tmp_path / "model")
    loaded, batch = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval(), batches()[0]
    with torch.no_grad():
        logits = torch.cat([loaded(**piece).logits for piece in cut(batch, 3)])
        assert torch.equal(logits, pair.streamed.eval()(**batch).logits)


@pytest.mark.parametrize("has_grad", [False, True])
def test_an_adapter_can_be_switched_off_and_on(
    has_grad: bool, tmp_path: Path, stream: Stream
) -> None:
    """What was noted of the blocks while it was off does not hold when it is on."""
    pair = make_pair("llama", tmp_path, stream)
    batch = batches()[0]
    with pair.streamed.disable_adapter(), torch.set_grad_enabled(has_grad):
        off = pair.streamed(**batch).logits.detach().clone()
    with pair.plain.disable_adapter(), torch.no_grad():
        expected = torch.cat([pair.plain(**piece).logits for piece in cut(batch, 3)])
    assert torch.equal(off, expected)
    assert_same_training(pair, batches())


def test_two_adapters_train_in_turn(tmp_path: Path, stream: Stream) -> None:
    def adapt(model: Any) -> Any:
        adapted = with_lora(model, ATTENTION)
        torch.manual_seed(3)
        adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj", "down_proj"]))
        return adapted

    pair = make_pair("llama", tmp_path, stream, adapt=adapt)
    for name in ("default", "other", "default"):
        for model in pair.models:
            model.set_adapter(name)
        assert_same_training(pair, batches(num_steps=2))


def test_a_removed_adapter_leaves_the_plain_streamed_model(tmp_path: Path, stream: Stream) -> None:
    saved(tmp_path)
    batch = batches()[0]
    base = stream(tmp_path)
    with torch.no_grad():
        before = base(**batch).logits.clone()
        removed = with_lora(base, ATTENTION).unload()
        assert torch.equal(removed(**batch).logits, before)
