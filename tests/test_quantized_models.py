"""Models that other libraries quantized train, in place, as their decoded twins do in memory."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_foreign
import test_gguf
import tiny_models
import torch
from pairs import by_turns
from safetensors.torch import load_file
from support import Pair, assert_same_training, digests, with_lora
from test_packing import unpacked_twin, write_aligned

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.nibbles import E2M1, NF4
from ssdtune.kernels.quantize_nibbles import quantize_nibbles
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.once import build_planned
from ssdtune.packing.wanted import Wanted
from ssdtune.swap.gguf import open_gguf
from ssdtune.swap.header import CheckpointError
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.build import build_meta
from ssdtune.visit.placement import place

Stream = Callable[..., Any]
Tensors = dict[str, torch.Tensor]
FP8_BLOCK = 32


def as_bitsandbytes(name: str, weight: torch.Tensor) -> Tensors:
    """NF4 in blocks of 64, as `save_pretrained` of a model loaded in 4 bits writes it."""
    parts = quantize_nibbles(weight, NF4, 64, "F32", is_high_first=True)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: parts["codes"].view(-1, 1),
        f"{name}.absmax": parts["scales"],
        f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.quant_state.bitsandbytes__nf4": written,
    }


def as_fp8(name: str, weight: torch.Tensor) -> Tensors:
    """DeepSeek's: e4m3 with a scale for each square."""
    rows, width = (n // FP8_BLOCK for n in weight.shape)
    squares = weight.float().view(rows, FP8_BLOCK, width, FP8_BLOCK)
    scale = squares.abs().amax(dim=(1, 3), keepdim=True) / 448
    codes = (squares / scale).to(torch.float8_e4m3fn).view(weight.shape)
    return {name: codes, f"{name}_scale_inv": scale.view(rows, width)}


def as_mxfp4(name: str, weight: torch.Tensor) -> Tensors:
    """gpt-oss's experts: [experts, in, out] in memory, rows of blocks of 32 in the file."""
    turned = weight.transpose(1, 2).contiguous()
    parts = quantize_nibbles(turned, E2M1, 32, "E8M0")
    experts, rows, width = turned.shape
    return {
        f"{name}_blocks": parts["codes"].view(experts, rows, width // 32, 16),
        f"{name}_scales": parts["scales"].view(experts, rows, width // 32),
    }


GROUP = 32  # columns that share a scale, of the integer codes


def in_four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, columns], zeros and float16 scales [rows, groups]: w = (q - z) s, on each group's range with 0 in it."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float().unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 15)
    return codes.flatten(1).long(), zeros.long(), scales


def as_gptq(name: str, weight: torch.Tensor) -> Tensors:
    """AutoGPTQ's, version 1: zeros less one."""
    base, (codes, zeros, scales) = name.removesuffix(".weight"), in_four_bits(weight)
    return {
        f"{base}.qweight": test_foreign.packed(codes, 4).t(),
        f"{base}.qzeros": (test_foreign.packed(zeros.t(), 4).long() - 0x11111111).to(torch.int32),
        f"{base}.scales": scales.t(),
        f"{base}.g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def as_awq(name: str, weight: torch.Tensor) -> Tensors:
    """AutoAWQ's "gemm"."""
    base, (codes, zeros, scales) = name.removesuffix(".weight"), in_four_bits(weight)
    return {
        f"{base}.qweight": test_foreign.awq_words(codes),
        f"{base}.qzeros": test_foreign.awq_words(zeros),
        f"{base}.scales": scales.t(),
    }


def as_compressed(name: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors' "pack-quantized" with zeros."""
    base, (codes, zeros, scales) = name.removesuffix(".weight"), in_four_bits(weight)
    return {
        f"{base}.weight_packed": test_foreign.packed(codes, 4),
        f"{base}.weight_scale": scales.bfloat16(),
        f"{base}.weight_zero_point": test_foreign.packed(zeros.t(), 4).t(),
        f"{base}.weight_shape": torch.tensor(weight.shape),
    }


def as_modelopt(name: str, weight: torch.Tensor) -> Tensors:
    """FP8 with a scale for a tensor."""
    scale = weight.float().abs().amax() / 448
    return {
        name: (weight.float() / scale).to(torch.float8_e4m3fn),
        f"{name}_scale": scale,
        name.removesuffix("weight") + "input_scale": torch.ones(()),
    }


def is_linear(name: str, weight: torch.Tensor) -> bool:
    return name.endswith("proj.weight") and weight.dim() == 2


def is_of_experts(name: str, weight: torch.Tensor) -> bool:
    return name.endswith(("experts.gate_up_proj", "experts.down_proj"))


KINDS: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "bitsandbytes": (
        "llama",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        as_bitsandbytes,
        is_linear,
    ),
    "fp8": (
        "qwen3",
        {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]},
        as_fp8,
        is_linear,
    ),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, as_mxfp4, is_of_experts),
    "gptq": ("qwen3", test_foreign.gptq_config(group_size=GROUP), as_gptq, is_linear),
    "awq": ("llama", test_foreign.AWQ | {"group_size": GROUP}, as_awq, is_linear),
    "modelopt": (
        "llama",
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        as_modelopt,
        is_linear,
    ),
    "compressed-tensors": (
        "qwen3_moe",
        test_foreign.compressed_config(symmetric=False, group_size=GROUP),
        as_compressed,
        is_linear,
    ),
}


def quantized(kind: str, folder: Path) -> tuple[str, Path, Any]:
    """A tiny model in the form that another library writes: its name, folder and class."""
    name, config, convert, is_wanted = KINDS[kind]
    base = tiny_models.build(name, dtype=torch.bfloat16)
    tiny_models.save(base, folder)
    count, tensors = 0, Tensors()
    for path in sorted(folder.glob("model*.safetensors*")):
        for key, weight in load_file(path).items() if path.suffix == ".safetensors" else ():
            count += is_wanted(key, weight)
            tensors |= convert(key, weight) if is_wanted(key, weight) else {key: weight}
        path.unlink()
    assert count >= 8
    write_aligned(tensors, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    return name, folder, type(base)


@pytest.mark.parametrize(("kind", "dtype"), by_turns(KINDS))
def test_it_trains_as_its_decoded_twin(
    kind: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    name, folder, model_class = quantized(kind, tmp_path / "quantized")
    before = digests(folder)
    twin = unpacked_twin(folder, tmp_path / "twin", dtype)
    adapt = partial(with_lora, targets=["q_proj", "o_proj"])
    plain = adapt(model_class.from_pretrained(twin, dtype=dtype))
    streamed = adapt(stream(folder, model_class=model_class, dtype=str(dtype).removeprefix("torch.")))  # fmt: skip
    pair = Pair(name, folder, plain, streamed)
    assert_same_training(
        pair, [tiny_models.batch(name, 4, 17 - s, seed=s) for s in range(2)], num_micro=2
    )
    assert any(block.is_packed for block in pair.engine.plan.blocks)
    assert digests(folder) == before


# What writers wrote before they put it into config.json.
SIDECARS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": (
        "quantize_config.json",
        {"bits": 4, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False, "sym": False},
    ),
    "awq": (
        "quant_config.json",
        {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"},
    ),
    "modelopt": (
        "hf_quant_config.json",
        {
            "producer": {"name": "modelopt", "version": "0.23.0"},
            "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        },
    ),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_a_file_beside_says_how_weights_are_quantized_where_the_config_does_not(
    kind: str, tmp_path: Path
) -> None:
    _, folder, _ = quantized(kind, tmp_path / "quantized")
    expected = build_meta(folder).checkpoint.tensors
    assert any(isinstance(entry, PackedEntry) for entry in expected.values())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    name, said = SIDECARS[kind]
    beside = folder / name
    beside.write_text(json.dumps(said))
    assert build_meta(folder).checkpoint.tensors == expected

    for lie, words in (
        (json.dumps({"quant_method": "eetq"}), '"eetq": not supported'),
        ("[]", "not how weights"),
        ('{"bits": 4, "bits": 4}', "not valid JSON"),
    ):
        beside.write_text(lie)
        with pytest.raises(CheckpointError, match=f"(?s){name}.*{words}"):
            build_meta(folder)


@pytest.mark.parametrize("kind", SIDECARS)
def test_quantized_weights_that_no_file_describes_are_no_incomplete_download(
    kind: str, tmp_path: Path
) -> None:
    _, folder, _ = quantized(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    words = r"(?s)quantiz.* config\.json .*belongs to"
    with pytest.raises(SSDTuneError, match=words) as raised:  # noqa: PT012 (one or the other)
        meta = build_meta(folder)
        place(meta.model, meta.checkpoint.tensors)
    assert "incomplete" not in str(raised.value)


def test_a_file_beside_plain_weights_says_nothing(tmp_path: Path) -> None:
    tiny_models.save(tiny_models.build("llama", dtype=torch.bfloat16), tmp_path)
    for name, said in SIDECARS.values():
        (tmp_path / name).write_text(json.dumps(said))
    tensors = build_meta(tmp_path).checkpoint.tensors
    assert not any(isinstance(entry, PackedEntry) for entry in tensors.values())


def test_a_quantized_model_is_not_packed(tmp_path: Path) -> None:
    _, folder, _ = quantized("fp8", tmp_path / "quantized")
    with pytest.raises(PackError, match="quantized already"):
        groups_of(build_meta(folder), Wanted().chosen())
    build_planned(folder, quantization="fp8")  # which it is, by whomever
    with pytest.raises(PackError, match="packed already"):
        build_planned(folder, quantization="8")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "gemma", "gemma3"])
def test_a_gguf_file_trains_as_its_decoded_twin(name: str, tmp_path: Path, stream: Stream) -> None:
    path, model = test_gguf.saved(tmp_path, name)
    given = {"config": model.config} if name in test_gguf.UNTOLD else {}
    meta = build_meta(path, **given)
    twin = tmp_path / "twin"
    model.config.save_pretrained(twin)
    values = test_gguf.placed(open_gguf(path), meta.config, type(model))
    write_aligned({n: v.float() for n, v in values.items()}, twin / "model.safetensors")
    adapt = partial(with_lora, targets=["q_proj", "o_proj"])
    plain = adapt(type(model).from_pretrained(twin, dtype=torch.float32))
    streamed = adapt(stream(path, model_class=type(model), dtype="float32", **given))
    pair = Pair(name, path, plain, streamed)
    assert_same_training(
        pair, [tiny_models.batch(name, 4, 17 - s % 2, seed=s) for s in range(5)], num_micro=2
    )
    assert any(block.is_packed for block in pair.engine.plan.blocks)
