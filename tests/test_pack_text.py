"""Inputs of weights on a text: as a model in memory has them, what they change, and texts that are refused."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import test_pack_bits
import tiny_models
import torch
from support import digests, streamed
from test_data import make_tokenizer
from test_pack_bits import bits_per_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from ssdtune.cli import main
from ssdtune.errors import SSDTuneError
from ssdtune.pack.inputs import check_seen, mean_squares
from ssdtune.pack.text import Text, load_text
from ssdtune.packing.errors import WIDTHS, Sampled, affine
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.mixed import weights_of, within
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.build import build_meta

own_cache, source, text = test_pack_bits.own_cache, test_pack_bits.source, test_pack_bits.text


def some_rows(name: str) -> Text:
    """Three rows of different lengths, from the model's own batches."""
    rows = [tiny_models.batch(name, 1, 9 + 4 * i, seed=i) for i in range(3)]
    return Text("rows", rows, [9 + 4 * i - 1 for i in range(3)])


def in_memory(model: Any, rows: Text) -> dict[str, float]:
    """Mean squares by the modules' own hooks."""
    sums: dict[str, float] = defaultdict(float)

    def hook(name: str, module: nn.Module, args: Any) -> None:
        (value,) = args[:1]
        if isinstance(module, nn.Embedding):
            sums[name] += value.numel() / module.num_embeddings
        else:
            sums[name] += float(value.double().square().sum()) / value.shape[-1]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            module.register_forward_pre_hook(
                lambda m, args, name=f"{name}.weight": hook(name, m, args)
            )
    with torch.no_grad():
        for row in rows.batches:
            model(**row)
    return {name: total / rows.num_tokens for name, total in sums.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_inputs_are_those_of_a_model_in_memory(name: str, tmp_path: Path) -> None:
    base = tiny_models.build(name)
    tiny_models.save(base, tmp_path)
    rows = some_rows(name)
    model = streamed(tmp_path, micro_batch_size=1, model_class=type(base))
    meta = build_meta(tmp_path, model_class=type(base))
    try:
        found = mean_squares(model, meta, rows)
    finally:
        model.ssdtune.close()
    plain = type(base).from_pretrained(tmp_path).eval()
    expected = in_memory(plain, rows)
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    if tied:
        expected["transformer.wte.weight"] += expected.pop("lm_head.weight")
    shared = expected.keys() & found.keys()
    assert len(shared) > 10
    for each in shared:
        assert found[each] == pytest.approx(expected[each], rel=1e-4), each
    packable = {n for g in groups_of(meta, affine(4, 64)) for n in g.formats}
    assert packable <= found.keys()


def test_experts_of_a_stack_share_a_mean(tmp_path: Path) -> None:
    """Each token is an input of some experts; what the others get is nothing."""
    base = tiny_models.build("qwen3_moe")
    tiny_models.save(base, tmp_path)
    rows = some_rows("qwen3_moe")
    model = streamed(tmp_path, micro_batch_size=1)
    try:
        found = mean_squares(model, build_meta(tmp_path), rows)
    finally:
        model.ssdtune.close()
    plain = type(base).from_pretrained(tmp_path).eval()
    experts = plain.model.layers[0].mlp.experts
    seen: list[torch.Tensor] = []
    experts.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for row in rows.batches:
            plain(**row)
    hidden = torch.cat(seen).double()
    share = plain.config.num_experts_per_tok / plain.config.num_experts
    expected = float(hidden.square().mean()) * share
    names = [n for n in found if n.startswith("model.layers.0.mlp.experts.") and "gate_proj" in n]
    assert len(names) == plain.config.num_experts
    for name in names:
        assert found[name] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------ the choice


def test_inputs_move_bits_to_the_tensors_that_meet_larger_ones(source: Path) -> None:
    groups = groups_of(build_meta(source), affine(2, 64))
    names = [n for g in groups for n in g.formats]
    found = dict.fromkeys(names, Sampled({bits: 4.0**-bits for bits in WIDTHS}, 1.0))
    inputs = {**dict.fromkeys(names, 1.0), names[3]: 30.0, names[4]: 1 / 30}
    bits: list[dict[str, int]] = []
    for given in (None, inputs):
        chosen = within(groups, 6.5, 64, found, weights_of(groups, found, given))
        bits.append({n: getattr(f, "bits", 16) for g in chosen for n, f in g.formats.items()})
    without, weighed = bits
    assert weighed.get(names[3], 16) > without[names[3]]
    assert weighed[names[4]] < without[names[4]]


def with_large_inputs(source: Path, folder: Path) -> Path:
    """The same model; what the third layer's first products get is many times as large."""
    model = tiny_models.auto_class("llama").from_pretrained(source)
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight.mul_(50)
    tiny_models.save(model, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def widths(folder: Path) -> dict[str, int]:
    entries = build_meta(folder).checkpoint.tensors
    return {n: getattr(e.format, "bits", 16) if isinstance(e, PackedEntry) else 16 for n, e in entries.items()}  # fmt: skip


def test_the_command_weighs_errors_by_inputs(
    source: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    there, out = with_large_inputs(source, tmp_path / "source"), tmp_path / "p"
    before = digests(there)
    command = ["pack", str(there), "--target_bpw", "5.5", "--out", str(out)]
    assert main([*command, "--text", str(text)]) == 0
    assert digests(there) == before
    told = capsys.readouterr().out
    assert "inputs    of " in told
    assert f"tokens of {text}, in " in told
    found = widths(out)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert found[name.format(2)] > found[name.format(0)], "alike, but for their inputs"
    assert bits_per_weight(out) <= 5.5


# ------------------------------------------------------------------ texts that are refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no"),
        ("", ""),
        ('{"text": "a"\n', ""),
        (json.dumps({"something": 1}) + "\n", ""),
    ],
    ids=["missing", "empty", "broken", "no text"],
)
def test_a_bad_text_is_refused_before_anything_is_packed(
    content: str | None, message: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    path, out = tmp_path / "t.jsonl", tmp_path / "p"
    if content is not None:
        path.write_text(content)
    command = ["pack", str(source), "--out", str(out), "--target_bpw", "5.5"]
    assert main([*command, "--text", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error
    assert not out.exists()


def test_rows_in_which_nothing_is_trained_are_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": "the sky is " * 999, "completion": "blue"}) + "\n")
    with pytest.raises(SSDTuneError, match=str(path)):
        load_text(str(path), str(source))


def test_tensors_that_the_text_does_not_reach_are_named() -> None:
    rows = Text("rows", [], [])
    check_seen(["a"], {"a": 1.0}, rows)
    with pytest.raises(PackError, match=r"inputs of 2 tensors were not seen \(b, "):
        check_seen(["a", "b", "c"], {"a": 1.0, "c": 0.0}, rows)
