"""Squared gradients on a text: as a model in memory has them, what they change, and texts that are refused."""

import json
from collections import defaultdict
from functools import partial
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

from ssdtune.cli import main
from ssdtune.errors import SSDTuneError
from ssdtune.fidelity.fisher import check_seen, fisher
from ssdtune.fidelity.text import Text, load_text
from ssdtune.packing.errors import WIDTHS, Sampled, affine
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.mixed import weights_of, within
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.build import build_meta

own_cache, source, text = test_pack_bits.own_cache, test_pack_bits.source, test_pack_bits.text


def some_rows(name: str, *lengths: int) -> Text:
    """Rows of those lengths, from the model's own batches."""
    rows = [tiny_models.batch(name, 1, length, seed=i) for i, length in enumerate(lengths)]
    return Text("rows", rows, [length - 1 for length in lengths])


def streamed_fisher(folder: Path, model_class: Any, rows: Text) -> tuple[Any, dict[str, float]]:
    """What there is to pack, and what was found."""
    model: Any = streamed(folder, micro_batch_size=1, model_class=model_class)
    meta = build_meta(folder, model_class=model_class)
    try:
        return meta, fisher(model, meta, rows)
    finally:
        model.ssdtune.close()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_gradients_are_those_of_a_model_in_memory(name: str, tmp_path: Path) -> None:
    """Of rows of two tokens only the first has a gradient, so that its square is that of the whole row's."""
    base = tiny_models.build(name)
    tiny_models.save(base, tmp_path)
    rows = some_rows(name, 2, 2, 2)
    meta, found = streamed_fisher(tmp_path, type(base), rows)
    plain: Any = type(base).from_pretrained(tmp_path).eval()
    sums: dict[str, float] = defaultdict(float)
    for row in rows.batches:
        plain.zero_grad()
        plain(**row).loss.backward()
        for own, parameter in plain.named_parameters():
            assert parameter.grad is not None
            sums[own] += float(parameter.grad.double().square().mean())
    head = plain.get_output_embeddings().weight
    if head is plain.get_input_embeddings().weight:
        del sums["transformer.wte.weight"]  # what comes of both uses is one gradient here
    packable = {n for g in groups_of(meta, affine(4, 64)) for n in g.formats}
    assert packable <= found.keys()
    compared = [n for n in found if parameter_of(n) in sums]
    assert len(compared) > 10
    for each in compared:
        assert found[each] == pytest.approx(sums[parameter_of(each)], rel=1e-3), each


def parameter_of(name: str) -> str:
    """What a file tensor is, or, of an expert, is a part of: all experts lie in two parameters."""
    start, is_expert, part = name.partition(".experts.")
    if not is_expert:
        return name
    return f"{start}.experts.{'down_proj' if 'down' in part else 'gate_up_proj'}"


def test_tokens_are_counted_each_by_itself(tmp_path: Path) -> None:
    """Rows of different lengths: squares are of sums over rows, whose losses are means."""
    base = tiny_models.build("llama")
    tiny_models.save(base, tmp_path)
    rows = some_rows("llama", 9, 13, 17)
    _, found = streamed_fisher(tmp_path, type(base), rows)
    plain: Any = type(base).from_pretrained(tmp_path).eval()
    sums: dict[str, float] = defaultdict(float)

    def forward(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        def backward(gradient: torch.Tensor) -> None:
            squares = gradient.double().square().sum(-1)
            if isinstance(module, nn.Linear):
                squares = squares * args[0].double().square().sum(-1)
            sums[name] += float(squares.sum()) / module.weight.numel()  # pyright: ignore

        output.register_hook(backward)

    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(partial(forward, f"{name}.weight"))
    for row, count in zip(rows.batches, rows.counts, strict=True):
        (plain(**row).loss * count).backward()
    assert sums.keys() == found.keys()
    for each, expected in sums.items():
        assert found[each] == pytest.approx(expected, rel=1e-3), each


# ------------------------------------------------------------------ the choice


def test_gradients_move_bits_to_the_tensors_that_have_larger_ones(source: Path) -> None:
    groups = groups_of(build_meta(source), affine(2, 64))
    names = [n for g in groups for n in g.formats]
    found = dict.fromkeys(names, Sampled({bits: 4.0**-bits for bits in WIDTHS}, 1.0))
    squares = {**dict.fromkeys(names, 1.0), names[3]: 30.0, names[4]: 1 / 30}
    bits: list[dict[str, int]] = []
    for given in (None, squares):
        chosen = within(groups, 6.5, 64, found, weights_of(groups, found, given))
        bits.append({n: getattr(f, "bits", 16) for g in chosen for n, f in g.formats.items()})
    without, weighed = bits
    assert weighed.get(names[3], 16) > without[names[3]]
    assert weighed[names[4]] < without[names[4]]


def with_an_idle_layer(source: Path, folder: Path) -> Path:
    """The same model; of what the first layer's MLP finds next to nothing is handed on."""
    model = tiny_models.auto_class("llama").from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.01)
    tiny_models.save(model, folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def widths(folder: Path) -> dict[str, int]:
    entries = build_meta(folder).checkpoint.tensors
    return {n: getattr(e.format, "bits", 16) if isinstance(e, PackedEntry) else 16 for n, e in entries.items()}  # fmt: skip


def test_the_command_weighs_errors_by_gradients(
    source: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    there, out = with_an_idle_layer(source, tmp_path / "source"), tmp_path / "p"
    before = digests(there)
    command = ["pack", str(there), "--target_bpw", "7.5", "--out", str(out)]
    assert main([*command, "--text", str(text)]) == 0
    assert digests(there) == before
    told = capsys.readouterr().out
    assert "gradients of " in told
    assert f"tokens of {text}, in " in told
    found = widths(out)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert found[name.format(2)] > found[name.format(0)], "alike, but for what comes of them"
    assert bits_per_weight(out) <= 7.5


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
    with pytest.raises(PackError, match=r"gradients of 2 tensors were not seen \(b, "):
        check_seen(["a", "b", "c"], {"a": 1.0, "c": 0.0}, rows)
    with pytest.raises(PackError, match=r"2 tensors are infinite or no numbers \(b, "):
        check_seen(["a", "b", "c"], {"a": 1.0, "b": float("nan"), "c": float("inf")}, rows)
