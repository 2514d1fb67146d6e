"""gpt-oss in GGUF files, written by ggml's own package: experts as llama.cpp's converter packs and cuts them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf
from support import Pair, assert_same_training, with_lora
from test_gguf import blocks_of, package, placed, same_bits, tensor, write
from test_packing import decoded, write_aligned
from test_quantized_models import quantized

from ssdtune.kernels import ggml_moved
from ssdtune.kernels.ggml import Ggml
from ssdtune.kernels.ggml_moved import TurnedExperts
from ssdtune.kernels.nibbles import E2M1
from ssdtune.kernels.quantize_nibbles import quantize_nibbles
from ssdtune.kernels.unpack import unpack
from ssdtune.swap.gguf import open_gguf
from ssdtune.swap.header import CheckpointError
from ssdtune.visit.build import build_meta
from ssdtune.visit.gguf_config import gguf_config
from ssdtune.visit.gguf_names import hf_checkpoint

Tensors = dict[str, torch.Tensor]
LEAVES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.router": "ffn_gate_inp",
}  # fmt: skip
HEAD = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def config() -> tf.GptOssConfig:
    """Layers that slide do so within a batch; an epsilon that float32 holds."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tiny_models.small(
        tf.GptOssConfig, head_dim=16, sliding_window=8, rms_norm_eps=2.0**-17, **experts
    )


def model() -> tf.PreTrainedModel:
    torch.manual_seed(1)
    made = tf.GptOssForCausalLM(config())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.02)
    return made


def converted(state: Tensors) -> Tensors:
    """The model's tensors as llama.cpp's converter names, turns and cuts them (conversion/gpt_oss.py)."""
    made = {}
    for name, value in state.items():
        base, _, suffix = name.rpartition(".")
        if base in HEAD:
            made[f"{HEAD[base]}.{suffix}"] = value
            continue
        layer, leaf = base.removeprefix("model.layers.").split(".", 1)
        if leaf == "self_attn":
            made[f"blk.{layer}.attn_sinks.weight"] = value
        elif leaf != "mlp.experts":
            made[f"blk.{layer}.{LEAVES[leaf]}.{suffix}"] = value
        else:
            kind = "bias" if suffix.endswith("_bias") else "weight"
            turned = value.mT if kind == "weight" else value
            cut = {"down": turned}
            if suffix.startswith("gate_up"):
                cut = {"gate": turned[:, ::2], "up": turned[:, 1::2]}
            for which, one in cut.items():
                made[f"blk.{layer}.ffn_{which}_exps.{kind}"] = one.contiguous()
    return made


def mxfp4(values: torch.Tensor) -> torch.Tensor:
    """ggml's blocks (block_mxfp4 of ggml-common.h): a scale, then elements j and j + 16 in a byte, the first below."""
    parts = quantize_nibbles(values, E2M1, 32, "E8M0")
    pairs = parts["codes"].view(-1, 16)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)
    blocks = torch.cat((parts["scales"].view(-1, 1), codes[:, :16] | codes[:, 16:] << 4), dim=1)
    return blocks.view(*values.shape[:-1], -1)


def saved(path: Path, tensors: Tensors, config: tf.GptOssConfig, *more: Any) -> Path:
    """A file by ggml's package: experts in MXFP4, other matrices in 8 bits, all else in float32. more: calls of the
    writer, (name, argument)."""
    theirs = package("gguf")
    kinds = theirs.GGMLQuantizationType
    writer = theirs.GGUFWriter(path, "gpt-oss")
    rope = config.rope_parameters
    for call, value in (
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", config.num_key_value_heads),
        ("key_length", config.head_dim),
        ("value_length", config.head_dim),
        ("layer_norm_rms_eps", config.rms_norm_eps),
        ("expert_count", config.num_local_experts),
        ("expert_used_count", config.num_experts_per_tok),
        ("sliding_window", config.sliding_window),
        ("expert_feed_forward_length", config.intermediate_size),
        ("rope_freq_base", rope["rope_theta"]),
        ("rope_scaling_type", theirs.RopeScalingType.YARN),
        ("rope_scaling_factor", rope["factor"]),
        ("rope_scaling_orig_ctx_len", rope["original_max_position_embeddings"]),
        ("bos_token_id", 1),
        ("eos_token_id", 2),
        ("pad_token_id", 0),
        *more,
    ):
        getattr(writer, f"add_{call}")(value)
    for name, value in tensors.items():
        if name.endswith("exps.weight"):
            writer.add_tensor(name, mxfp4(value).numpy(), raw_dtype=kinds.MXFP4)
        elif value.dim() == 2 and name.endswith("weight"):
            blocks = theirs.quants.quantize(value.numpy(), kinds.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=kinds.Q8_0)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "m.gguf", converted(model().state_dict()), config())


# ------------------------------------------------------------------------------------ weights


def test_weights_are_those_that_the_package_decodes(path: Path) -> None:
    theirs = package("gguf")
    stored = {
        one.name: torch.from_numpy(theirs.dequantize(one.data, one.tensor_type).copy())
        for one in theirs.GGUFReader(path).tensors
    }
    found = placed(open_gguf(path), config(), tf.GptOssForCausalLM)
    assert found.keys() == model().state_dict().keys()
    again = converted(found)
    assert again.keys() == stored.keys()
    assert all(same_bits(again[name], value) for name, value in stored.items())
    assert again["blk.3.ffn_up_exps.weight"].unique().numel() > 16


def test_weights_are_those_of_the_model(path: Path) -> None:
    """What was not quantized, to the bit; the rest nearly: nothing lies elsewhere."""
    found = placed(open_gguf(path), config(), tf.GptOssForCausalLM)
    for name, value in model().state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert torch.nn.functional.cosine_similarity(found[name], value, dim=1).min() > 0.9
        elif value.dim() == 2 and name.endswith("weight"):
            assert torch.allclose(found[name], value, atol=value.abs().max().item() / 200)
        else:
            assert torch.equal(found[name], value), name


def test_experts_are_those_of_the_published_form(tmp_path: Path) -> None:
    """Of safetensors, where two elements that follow each other share a byte."""
    _, folder, model_class = quantized("mxfp4", tmp_path / "published")
    expected = decoded(build_meta(folder).checkpoint, torch.float32)
    meta = build_meta(folder)
    path = saved(tmp_path / "m.gguf", converted(expected), meta.config)
    found = placed(open_gguf(path), meta.config, model_class)
    experts = [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 8
    assert all(torch.equal(found[name], expected[name]) for name in experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_take_turns(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types may differ; some rows at a time or all of them."""
    types = (Ggml("MXFP4"), Ggml("Q8_0"))
    parts = [blocks_of(one.kind, 3 * 10 * 64 // 32) for one in types]
    parts[0][:, 0] = 120
    gate, up = (torch.empty(3, 10, 64, dtype=dtype) for _ in types)
    for one, blocks, out in zip(types, parts, (gate, up), strict=True):
        unpack(one, [blocks.view(-1)], out, suffix="")
    for chunk in (1, 7 * 64, ggml_moved.CHUNK):
        monkeypatch.setattr(ggml_moved, "CHUNK", chunk)
        found = torch.full((3, 64, 20), torch.nan, dtype=dtype)
        format = TurnedExperts(types)
        sizes = [part.shape[0] for part in format.parts((3, 64, 20))]
        assert sizes == [blocks.numel() for blocks in parts]
        unpack(format, [blocks.view(-1) for blocks in parts], found)
        assert torch.equal(found[..., ::2], gate.mT)
        assert torch.equal(found[..., 1::2], up.mT)


def test_biases_take_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = torch.randn(2, 3, 10).unbind()
    raw = [one.contiguous().view(torch.uint8).view(-1) for one in (gate, up)]
    for chunk in (8, ggml_moved.CHUNK):
        monkeypatch.setattr(ggml_moved, "CHUNK", chunk)
        found = torch.empty(3, 20)
        unpack(TurnedExperts((Ggml("F32"), Ggml("F32"))), raw, found)
        assert torch.equal(found, torch.stack((gate, up), dim=2).flatten(1))


# ----------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_trains_as_its_decoded_twin(
    dtype: torch.dtype, path: Path, tmp_path: Path, stream: Callable[..., Any]
) -> None:
    twin = tmp_path / "twin"
    gguf_config(open_gguf(path)).save_pretrained(twin)
    values = placed(open_gguf(path), config(), tf.GptOssForCausalLM)
    write_aligned({n: v.to(dtype) for n, v in values.items()}, twin / "model.safetensors")
    adapt = partial(with_lora, targets=["q_proj", "o_proj"])
    plain = adapt(tf.GptOssForCausalLM.from_pretrained(twin, dtype=dtype))
    streamed = adapt(stream(path, dtype=str(dtype).removeprefix("torch.")))
    pair = Pair("gpt_oss", path, plain, streamed)
    batches = [tiny_models.batch("gpt_oss", 4, 17 - s, seed=s) for s in range(2)]
    assert_same_training(pair, batches, num_micro=2)
    assert any(block.is_packed for block in pair.engine.plan.blocks)


# ----------------------------------------------------------------------------------- the config


def test_the_config_is_that_of_the_model(path: Path) -> None:
    found, expected = gguf_config(open_gguf(path)).to_dict(), config().to_dict()
    left_out = {"dtype", "use_cache"}
    assert found["dtype"] == "bfloat16"
    assert {k: v for k, v in found.items() if k not in left_out} == {
        k: v for k, v in expected.items() if k not in left_out
    }
    assert found["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert found["rope_parameters"]["truncate"] is False


def test_the_bounds_of_yarn_are_read_and_what_is_unknown_of_it_refused(tmp_path: Path) -> None:
    bounds = [("rope_scaling_yarn_beta_fast", 16.0), ("rope_scaling_yarn_beta_slow", 2.0)]
    told = saved(tmp_path / "a.gguf", {"token_embd.weight": torch.ones(199, 64)}, config(), *bounds)
    rope = gguf_config(open_gguf(told)).rope_parameters
    assert (rope["beta_fast"], rope["beta_slow"]) == (16.0, 2.0)
    unknown = saved(tmp_path / "b.gguf", {}, config(), ("rope_scaling_yarn_ext_factor", 1.0))
    with pytest.raises(CheckpointError, match=r"rope.scaling.yarn_ext_factor scales rotations"):
        gguf_config(open_gguf(unknown))


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"gate": (4, 128, 64)}, r"blk.0.ffn_up_exps.weight.*it is missing"),
        ({"up": (4, 128, 64)}, r"blk.0.ffn_gate_exps.weight.*it is missing"),
        ({"gate": (4, 128, 64), "up": (4, 96, 64)}, r"\[4, 128, 64\] and \[4, 96, 64\] are no shapes"),
        ({"down": (64, 128)}, r"\[64, 128\] are no shapes of experts"),
        ({"gate_up": (4, 256, 64)}, "GptOssForCausalLM has no place for it"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit_are_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    package("gguf")
    tensors = {
        f"blk.0.ffn_{which}_exps.weight": tensor("MXFP4", *shape) for which, shape in shapes.items()
    }
    path = write(tmp_path / "m.gguf", tensors, {"general.architecture": "gpt-oss"})
    with pytest.raises(CheckpointError, match=message) as refused:
        hf_checkpoint(open_gguf(path), config(), tf.GptOssForCausalLM)
    assert "m.gguf" in str(refused.value)


def test_experts_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    tensors = converted(model().state_dict())
    name = "blk.2.ffn_down_exps.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    path = saved(tmp_path / "m.gguf", tensors, config())
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.experts.down_proj"):
        placed(open_gguf(path), config(), tf.GptOssForCausalLM)
