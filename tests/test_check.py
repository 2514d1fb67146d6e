"""An architecture is checked, not trusted: small copies are faithful, defects are refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

import ssdtune
from ssdtune.visit import check, function, shrink, trial
from ssdtune.visit.check import ArchitectureError, ensure_checked, examine, finding_path


class Notes:
    """What blocks leave for later ones beside their arguments: no mapping, nothing that is seen."""

    seen: Any = None


class LeakyLayer(LlamaDecoderLayer):
    """Layer 0 leaves its result in an object that layer 2 adds to its input."""

    def forward(self, hidden_states: Any, *args: Any, notes: Any = None, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 2:
            hidden_states = hidden_states + notes.seen
        result = super().forward(hidden_states, *args, **kwargs)
        if self.self_attn.layer_idx == 0:
            notes.seen = result
        return result


class LeakyForCausalLM(tf.LlamaForCausalLM):
    """Right in memory. Streamed, layer 2's gradient of what layer 0 left is lost without an error."""

    config_class = tf.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i in range(config.num_hidden_layers):
            self.model.layers[i] = LeakyLayer(config, i)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, notes=Notes(), **kwargs)


class AttributeForCausalLM(LeakyForCausalLM):
    """The same through an attribute of the model, which all micro-batches share."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.notes = getattr(self, "notes", Notes())
        return tf.LlamaForCausalLM.forward(self, *args, notes=self.notes, **kwargs)


def default_config(name: str) -> Any:
    """The full-size default of a tiny model's class."""
    config = type(tiny_models.CONFIGS[name]())()
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    return config


def model_class_of(name: str, config: Any) -> Any:
    from transformers.models.auto.auto_factory import _get_model_class

    return _get_model_class(config, tiny_models.auto_class(name)._model_mapping)


# ------------------------------------------------------------------ defects


@pytest.mark.parametrize("model_class", [LeakyForCausalLM, AttributeForCausalLM])
def test_a_block_that_talks_past_its_arguments_is_refused_by_name(model_class: Any) -> None:
    with pytest.raises(ArchitectureError, match=r"gradient of model\.layers\.0\.\w+") as caught:
        ensure_checked(model_class, tf.LlamaConfig())
    assert model_class.__name__ in str(caught.value)
    assert str(caught.value).count("\n") < 4


def test_the_refused_model_is_the_one_that_only_loses_a_gradient() -> None:
    """Its losses agree in the first step, so that nothing but gradients could tell."""
    small = next(shrink.candidates(tf.LlamaConfig()))
    difference = trial.compare(LeakyForCausalLM, small).difference
    assert difference is not None
    assert difference.startswith("the gradient of")
    assert "in step 1" in difference


def test_a_difference_cannot_be_allowed() -> None:
    with pytest.raises(ArchitectureError, match="can't be streamed"):
        ensure_checked(LeakyForCausalLM, tf.LlamaConfig(), allow_unchecked=True)


def test_a_defect_of_the_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n's layers share keys and values by a dict: without its being carried, a refusal."""
    config = tiny_models.CONFIGS["gemma3n"]()
    monkeypatch.setattr(function, "_changes", lambda mapping, before: {})
    finding = examine(tf.Gemma3nForCausalLM, config)
    assert finding.outcome == "differs", finding


def test_stream_refuses_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    folder = tiny_models.save(LeakyForCausalLM(tiny_models.CONFIGS["llama"]()), tmp_path / "m")
    before = threading.active_count()
    for _ in range(2):  # found, and then remembered
        with pytest.raises(ArchitectureError, match=r"model\.layers\.0\."):
            ssdtune.stream(folder, model_class=LeakyForCausalLM, offload={"ram": "2MB"})
    assert threading.active_count() == before
    assert [f.name.split("-")[0] for f in (tmp_path / "cache/checked").iterdir()] == [
        "LeakyForCausalLM"
    ]


# ------------------------------------------------------------------ what passes, and what is known


FAST = ("mixtral", "t5", "gemma3_vlm")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in tiny_models.CONFIGS],
)
def test_full_size_defaults_pass(name: str) -> None:
    config = default_config(name)
    finding = examine(model_class_of(name, config), config)
    assert finding.outcome == "same", finding
    assert finding.note == "", "the vision tower ran"


def test_each_process_of_a_group_checks_by_itself() -> None:
    """There transformers lets the first process alone write files; the others have folders of their own."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        finding = examine(tf.LlamaForCausalLM, tf.LlamaConfig())
    finally:
        distributed.destroy_process_group()
    assert finding.outcome == "same", finding


def test_said_once_and_remembered(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        ensure_checked(
            tf.LlamaForCausalLM, tf.LlamaConfig(), findings=tmp_path / "new", say=said.append
        )
    assert len(said) == 1
    assert said[0].startswith("checking LlamaForCausalLM once: streamed = in memory ✓ (")


def test_what_is_known_is_believed_and_rubbish_is_not(tmp_path: Path) -> None:
    config = tf.LlamaConfig()
    path = finding_path(tf.LlamaForCausalLM, config, tmp_path)
    assert path is not None
    path.write_text(json.dumps({"outcome": "differs", "reason": "the gradient of x differs"}))
    with pytest.raises(ArchitectureError, match="the gradient of x differs"):
        ensure_checked(tf.LlamaForCausalLM, config, findings=tmp_path)
    for rubbish in ("[]", '{"outcome": "fine"}'):
        path.write_text(rubbish)
        ensure_checked(tf.LlamaForCausalLM, config, findings=tmp_path)
        assert json.loads(path.read_text())["outcome"] == "same"


def test_a_finding_belongs_to_flags_class_and_code_not_to_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def path(model_class: Any = tf.LlamaForCausalLM, **changed: Any) -> Path | None:
        return finding_path(model_class, tf.LlamaConfig(**changed), tmp_path)

    assert path() == path(vocab_size=128_000, num_hidden_layers=80, intermediate_size=11008)
    others = [
        path(),
        path(tie_word_embeddings=True),
        path(attention_bias=True),
        path(num_key_value_heads=8),
        path(LeakyForCausalLM),
    ]
    monkeypatch.setattr(ssdtune, "__version__", "99")
    assert len({*others, path()}) == 6


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = ensure_checked(
        tf.GPT2LMHeadModel, tf.GPT2Config(), findings=tmp_path / "file" / "below"
    )
    assert finding.outcome == "same"


# ------------------------------------------------------------------ unchecked


class Remote(tf.LlamaForCausalLM):
    """Stands for a class that a model repository brings along."""

    __module__ = "transformers_modules.somebody.modeling"


class Broken(tf.LlamaForCausalLM):
    """Fails in memory as well: there is nothing to compare with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no forward today")


@pytest.mark.parametrize(
    ("model_class", "config", "reason"),
    [
        (Remote, tf.LlamaConfig(), "its own code"),
        (Broken, tf.LlamaConfig(), "no forward today"),
        (tf.LlamaForCausalLM, tf.PretrainedConfig(), "how many layers"),
    ],
)
def test_unchecked_is_refused_unless_allowed(
    model_class: Any, config: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ArchitectureError, match=reason) as caught:
        ensure_checked(model_class, config, findings=tmp_path)
    assert "allow_unchecked: true" in str(caught.value)
    said: list[str] = []
    ensure_checked(model_class, config, allow_unchecked=True, findings=tmp_path, say=said.append)
    assert len(said) == 1
    assert "unchecked" in said[0]
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the caller's world


def test_nothing_of_the_callers_is_disturbed() -> None:
    logging.set_verbosity_info()
    torch.set_default_dtype(torch.float64)
    try:
        before = state_of_the_world()
        with torch.inference_mode(), torch.autocast("cpu"):
            finding = examine(tf.GPT2LMHeadModel, tf.GPT2Config())
            assert torch.is_inference_mode_enabled()
        assert finding.outcome == "same", finding
        assert state_of_the_world() == before
    finally:
        torch.set_default_dtype(torch.float32)
        logging.set_verbosity_error()


def state_of_the_world() -> tuple[Any, ...]:
    import random

    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
    )


def test_the_config_stays_as_it_is() -> None:
    config = tf.Gemma3nTextConfig()
    before = copy.deepcopy(config).to_dict()
    list(shrink.candidates(config))
    assert config.to_dict() == before


# ------------------------------------------------------------------ small configs


def smallest(config: Any) -> Any:
    return next(shrink.candidates(config))


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_small_copies_are_small_and_of_the_same_kind(name: str) -> None:
    config = default_config(name)
    small = smallest(config)
    assert type(small) is type(config)
    with torch.device("meta"):
        model = model_class_of(name, config)._from_config(small)
    assert sum(p.numel() for p in model.parameters()) < 20e6


@pytest.mark.parametrize(
    "config",
    [
        tf.Gemma3TextConfig(),
        tf.Qwen3NextConfig(),
        tf.GptOssConfig(),
        tf.NemotronHConfig(),
        tf.Zamba2Config(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_kind_of_layer_is_in_the_copy(config: Any) -> None:
    kinds = "layer_types" if "layer_types" in vars(config) else "layers_block_type"
    full, few = getattr(config, kinds), getattr(smallest(config), kinds)
    assert set(few) == set(full)
    assert len(few) == smallest(config).num_hidden_layers <= shrink.MAX_LAYERS


def test_layers_named_by_number_or_threshold_follow() -> None:
    deepseek = smallest(tf.DeepseekV3Config(first_k_dense_replace=3))
    assert deepseek.first_k_dense_replace == 3
    assert deepseek.num_hidden_layers == 5, "three dense, two with experts"
    qwen = smallest(tf.Qwen2MoeConfig(num_hidden_layers=24, mlp_only_layers=[10, 20]))
    assert len(qwen.mlp_only_layers) == 2
    assert max(qwen.mlp_only_layers) < qwen.num_hidden_layers
    gemma = smallest(tf.Gemma3nTextConfig())
    sharing = gemma.layer_types[-gemma.num_kv_shared_layers :]
    assert set(sharing) == set(gemma.layer_types[: -gemma.num_kv_shared_layers])
    assert (
        len(gemma.intermediate_size)
        == len(gemma.activation_sparsity_pattern)
        == len(gemma.layer_types)
    )
    jamba = smallest(tf.JambaConfig())
    assert jamba.num_hidden_layers > jamba.attn_layer_period == 8


def test_relations_between_widths_hold() -> None:
    llama = smallest(
        tf.LlamaConfig(
            hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
        )
    )
    assert (llama.num_attention_heads, llama.num_key_value_heads) == (16, 2)
    assert llama.hidden_size == llama.num_attention_heads * llama.head_dim
    assert llama.intermediate_size * 8192 == 28672 * llama.hidden_size
    mamba = smallest(tf.Mamba2Config())
    assert mamba.num_heads * mamba.head_dim == mamba.expand * mamba.hidden_size
    qwen = smallest(
        tf.Qwen3VLConfig(
            text_config={"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128},
            vision_config={"out_hidden_size": 4096},
        )
    )
    assert qwen.vision_config.out_hidden_size == qwen.text_config.hidden_size
    assert qwen.vision_config.depth == 6, "the first four and two whose features go deeper"
    assert len(qwen.vision_config.deepstack_visual_indexes) <= qwen.text_config.num_hidden_layers


def test_flags_stay_dropout_goes_and_tokens_fit() -> None:
    gemma = tf.Gemma2Config(final_logit_softcapping=11.0, attn_logit_softcapping=7.0)
    small = smallest(gemma)
    assert small.final_logit_softcapping == 11.0
    assert small.tie_word_embeddings == gemma.tie_word_embeddings
    gpt2 = smallest(tf.GPT2Config(resid_pdrop=0.3))
    assert (gpt2.resid_pdrop, gpt2.attn_pdrop, gpt2.embd_pdrop) == (0.0, 0.0, 0.0)
    assert gpt2.bos_token_id == gpt2.eos_token_id < gpt2.vocab_size
    qwen = smallest(tf.Qwen3VLConfig())
    ids = [qwen.image_token_id, qwen.video_token_id, qwen.vision_start_token_id]
    assert len(set(ids)) == 3
    assert max(ids) < qwen.text_config.vocab_size


def test_rotary_lists_shrink_with_the_heads() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = tf.Qwen2_5_VLConfig(
        text_config={"hidden_size": 3584, "num_attention_heads": 28, "rope_parameters": rope}
    )
    text = smallest(config).text_config
    assert sum(text.rope_parameters["mrope_section"]) * 2 == (
        text.hidden_size // text.num_attention_heads
    )
    assert rope["mrope_section"] == [16, 24, 24]


def test_kernels_for_devices_are_replaced() -> None:
    """The check runs on the CPU whatever attention the user asked for."""
    config = tf.LlamaConfig(attn_implementation="flash_attention_2")
    assert next(iter(check._candidates(config)))._attn_implementation is None


def test_a_model_without_gradients_is_unchecked() -> None:
    """A comparison of nothing would pass."""

    class Deaf(tf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = output.loss * 0.0
            return output

    finding = examine(Deaf, tf.LlamaConfig())
    assert finding.outcome == "unchecked"
    assert "no linear layer" in finding.reason
