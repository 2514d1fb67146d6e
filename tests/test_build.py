"""Models on meta: what from_pretrained makes, minus the weights; and what is refused, and how."""

import json
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from ssdtune.errors import SSDTuneError
from ssdtune.swap.header import CheckpointError
from ssdtune.visit.asked import REFUSED, BuildError
from ssdtune.visit.build import build_meta
from ssdtune.visit.placement import fill, place

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return tiny_models.save(tiny_models.build("llama", torch.bfloat16), folder)


def with_config(folder: Path, **values) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def copy_of(folder: Path, to: Path, **values) -> Path:
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return with_config(to, **values)


def load_into(meta) -> None:
    """Fills the meta model for real, so that it can run."""
    tensors = {k: v for path in meta.checkpoint.files for k, v in load_file(path).items()}
    for name, placement in place(meta.model, meta.checkpoint.tensors).items():
        out = torch.empty(placement.shape, dtype=placement.dtype)
        fill(placement, tensors.__getitem__, out)
        owner, _, key = name.rpartition(".")
        module = meta.model.get_submodule(owner)
        if key in module._parameters:
            module._parameters[key] = torch.nn.Parameter(out)
        else:
            module._buffers[key] = out
    meta.model.tie_weights()


def test_it_is_what_from_pretrained_makes_minus_the_weights(llama):
    expected = transformers.AutoModelForCausalLM.from_pretrained(llama)
    meta = build_meta(llama)
    model = meta.model
    assert type(model) is type(expected)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.name_or_path == model.config._name_or_path == str(llama)
    assert meta.generation_config is model.generation_config
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    mine, theirs = model.config.to_dict(), expected.config.to_dict()
    assert mine.pop("_name_or_path", None) in (None, str(llama))
    assert mine == {k: v for k, v in theirs.items() if k != "_name_or_path"}
    assert model.config._attn_implementation == expected.config._attn_implementation
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == []


@pytest.mark.parametrize("name", ["gemma3", "deepseek_v3", "gemma3_vlm", "bart", "mamba2"])
def test_once_filled_it_computes_the_same_loss(name, tmp_path):
    folder = tiny_models.save(tiny_models.build(name, torch.bfloat16), tmp_path)
    expected = tiny_models.auto_class(name).from_pretrained(folder)
    meta = build_meta(folder)
    load_into(meta)
    batch = tiny_models.batch(name)
    with torch.no_grad():
        assert torch.equal(meta.model(**batch).loss, expected(**batch).loss)


def test_an_8_billion_model_takes_no_memory(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
    )
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        stop = end + 2 * shape.numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, stop]}
        end = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:  # sparse: 16 GB that take no disk
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    meta = build_meta(tmp_path)
    placements = place(meta.model, meta.checkpoint.tensors)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert sum(torch.Size(p.shape).numel() for p in placements.values()) > 6e9
    assert grown_mib < 200


def test_auto_dtype_is_the_configs_or_else_the_files(llama, tmp_path):
    assert build_meta(llama).model.dtype == torch.bfloat16
    folder = copy_of(llama, tmp_path / "m", dtype=None)
    assert build_meta(folder).model.dtype == torch.bfloat16
    assert build_meta(with_config(folder, dtype="float16")).model.dtype == torch.float16
    assert build_meta(folder, dtype="float32").model.dtype == torch.float32
    assert build_meta(folder, dtype=torch.bfloat16).config.dtype == torch.bfloat16


def test_torch_dtype_is_taken_with_one_warning(llama):
    with pytest.warns(UserWarning, match="torch_dtype") as caught:
        meta = build_meta(llama, torch_dtype=torch.float32)
    assert meta.model.dtype == torch.float32
    assert len([w for w in caught if "torch_dtype" in str(w.message)]) == 1


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "fp17", {"": "float32"}])
def test_a_dtype_that_nobody_trains_in_is_refused(dtype, llama):
    with pytest.raises(BuildError, match="dtype"):
        build_meta(llama, dtype=dtype)


def test_attention_and_config_values_are_honoured(llama):
    model = build_meta(llama, attn_implementation="eager", attention_dropout=0.25).model
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    config = transformers.AutoConfig.from_pretrained(llama, num_hidden_layers=2)
    assert len(build_meta(llama, config=config).model.model.layers) == 2


def test_another_class_can_be_asked_for(llama):
    assert type(build_meta(llama, model_class=transformers.LlamaModel).model).__name__ == (
        "LlamaModel"
    )
    auto = transformers.AutoModelForSequenceClassification
    meta = build_meta(llama, model_class=auto)
    assert type(meta.model).__name__ == "LlamaForSequenceClassification"
    assert meta.generation_config is None
    with pytest.raises(SSDTuneError, match=r"1 tensor .*score\.weight"):  # a new head is in no file
        place(meta.model, meta.checkpoint.tensors)


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(key, llama):
    asked: dict[str, Any] = {key: "auto"}
    with pytest.raises(BuildError, match=key):
        build_meta(llama, **asked)
    asked[key] = None
    build_meta(llama, **asked)


def test_unknown_arguments_are_refused_not_swallowed(llama):
    with pytest.raises(BuildError, match="atn_implementation"):
        build_meta(llama, atn_implementation="sdpa")
    with pytest.raises(BuildError, match="use_safetensors"):
        build_meta(llama, use_safetensors=False)


def test_a_checkpoint_quantized_by_an_unknown_method_is_refused(llama, tmp_path):
    quantization = {"quant_method": "eetq", "weights": "int8"}
    folder = copy_of(llama, tmp_path / "m", quantization_config=quantization)
    with pytest.raises(CheckpointError, match="eetq"):
        build_meta(folder)


def test_a_folder_that_is_none_says_so(tmp_path, llama):
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c", "~/nowhere"):
        with pytest.raises(BuildError, match="no such folder"):
            build_meta(name)
    with pytest.raises(BuildError, match="is a file"):
        build_meta(llama / "config.json")
    with pytest.raises(BuildError, match=r"no config\.json"):
        build_meta(tmp_path)


def test_an_adapters_folder_is_not_a_model(llama, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BuildError, match="adapter"):
        build_meta(tmp_path)
    folder = copy_of(llama, tmp_path / "both")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(BuildError, match="adapter"):
        build_meta(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"model_type": "no_such_model"}', "{}"])
def test_a_bad_config_is_told_with_its_path(text, llama, tmp_path):
    folder = copy_of(llama, tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(BuildError, match=r"config\.json"):
        build_meta(folder)


def test_a_model_that_is_no_language_model_is_refused(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "m")
    transformers.ViTConfig().save_pretrained(folder)
    with pytest.raises(BuildError, match="model_class"):
        build_meta(folder)


def test_ten_million_layers_are_refused_at_once(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "m", num_hidden_layers=10_000_000)
    start = time.perf_counter()
    with pytest.raises(BuildError, match="num_hidden_layers"):
        build_meta(folder)
    assert time.perf_counter() - start < 5


def test_pickled_weights_are_never_read(llama, tmp_path):
    folder = copy_of(llama, tmp_path / "m")
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(SSDTuneError):
        build_meta(folder)


# Tying


@pytest.mark.parametrize("are_equal", [True, False])
@pytest.mark.filterwarnings("ignore:the config ties")
def test_weights_are_tied_unless_the_files_hold_two_different_ones(are_equal, tmp_path):
    model = tiny_models.build("gemma3")
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    if not are_equal:
        tensors["lm_head.weight"][-1, -1] += 1
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    meta = build_meta(tmp_path)
    ties = [m.lm_head.weight is m.model.embed_tokens.weight for m in (expected, meta.model)]
    assert ties == [are_equal, are_equal]
    placements = place(meta.model, meta.checkpoint.tensors)
    assert ("lm_head.weight" in placements) != are_equal
    assert placements.unused == ()


def test_untying_is_said(tmp_path):
    model = tiny_models.build("gemma3")
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="not tied"):
        build_meta(tmp_path)


# The hub, and code that a model brings along


def test_a_hub_id_is_resolved_from_the_cache(llama, tmp_path):
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    copy_of(llama, repository / "snapshots" / commit)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    meta = build_meta("someone/tiny", **hub)
    assert meta.folder.name == commit
    assert meta.model.name_or_path == meta.model.config._name_or_path == "someone/tiny"
    with pytest.raises(BuildError, match=r"someone/other.*cache"):
        build_meta("someone/other", **hub)
    with pytest.raises(BuildError, match="someone/tiny"):
        build_meta("someone/tiny", revision="v2", **hub)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_when_trusted(llama, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = copy_of(llama, tmp_path / "m", model_type="own_llama", auto_map=maps)
    (folder / "own.py").write_text(CODE)
    with pytest.raises(BuildError, match="trust_remote_code"):
        build_meta(folder)
    meta = build_meta(folder, trust_remote_code=True)
    assert type(meta.model).__name__ == "OwnForCausalLM"
    assert len(place(meta.model, meta.checkpoint.tensors)) == 39
