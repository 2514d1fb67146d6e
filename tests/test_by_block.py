"""Blocks of one nested file read in widths of their own: chosen, planned, trained, kept."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_pack_bits
import tiny_models
import torch
from support import Pair, assert_same_training, digests, num_misses, with_lora
from test_pack_bits import a_job_with_readings, chosen_at, profile_at
from test_packing import batches, decoded, packed, unpacked_twin

from ssdtune.cli import main
from ssdtune.config import ConfigError, load_config
from ssdtune.fidelity.record import checks_of
from ssdtune.generate import GenerateError, generate_from_run
from ssdtune.kernels.affine import Affine
from ssdtune.opened import source as opened
from ssdtune.packing.by_block import Block, best_widths, error_of, mean_bits, packed_file
from ssdtune.packing.layout import PackError
from ssdtune.packing.once import build_packed, build_planned, listed
from ssdtune.packing.sample import NUM_RUNS, runs_of, sample_of
from ssdtune.packing.wanted import Wanted
from ssdtune.packing.widths import is_by_block, mean_of, widths_of, written
from ssdtune.planning.bits import bits_lines
from ssdtune.planning.settle import settled
from ssdtune.profiles import own_profile_path, save_profile
from ssdtune.swap.packed import PackedEntry, reading_of
from ssdtune.swap.storage import choose_storage
from ssdtune.trainer.checkpoint import RunIdentity
from ssdtune.visit.build import build_meta
from ssdtune.visit.outline import write_outline

Stream = Callable[..., Any]
NESTED = Wanted(bits=8, order=(4, 1, 1, 2))
# Embedding, three layers, head. The second layer's weights are far from normal.
own_cache, source, text = test_pack_bits.own_cache, test_pack_bits.source, test_pack_bits.text
config_path = test_pack_bits.config_path


@pytest.fixture(scope="module")
def nested(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(source, tmp_path_factory.mktemp("nested") / "p", NESTED)


def bits_by_name(meta: Any) -> dict[str, int]:
    return {
        name: entry.format.bits
        for name, entry in meta.checkpoint.tensors.items()
        if isinstance(entry, PackedEntry)
    }


# ------------------------------------------------------------------ words


@pytest.mark.parametrize("widths", [(4,), (4, 4), (5, 4, 4, 6), (8, 2, 2, 2, 8)])
def test_what_is_written_is_read_back(widths: tuple[int, ...]) -> None:
    value = written(widths)
    assert is_by_block(value)
    assert mean_of(value) is None
    assert widths_of(value) == widths


@pytest.mark.parametrize("value", ["4.5/8", "2.25/8", "5,28x4,6/8", "3x4/8", "5,4/8"])
def test_the_key_takes_bits_by_block(value: str, config_path: Path) -> None:
    assert load_config(config_path, ["--quantization", value]).config.quantization == value


@pytest.mark.parametrize(
    "value", ["4.5", "8.5/8", "1.5/8", "4.5/6", "5,9/8", "x4/8", "5,,4/8", "5,4"]
)
def test_the_key_refuses_what_is_no_list_of_bits(value: str, config_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"4\.5/8, or of each block such as 5,28x4,6/8"):
        load_config(config_path, ["--quantization", value])


# ------------------------------------------------------------------ the choice


def some_blocks() -> list[Block]:
    sizes, factors = (40, 10, 10, 40), (1.0, 30.0, 1.0, 2.0)
    return [
        Block(i, (), n, {b: n * f * 4.0**-b for b in (4, 5, 6, 8)})
        for i, (n, f) in enumerate(zip(sizes, factors, strict=True))
    ]


@pytest.mark.parametrize("mean", [4.0, 4.5, 5.3, 7.9])
def test_the_best_widths_are_near_brute_force(mean: float) -> None:
    blocks = some_blocks()
    widths = best_widths(blocks, mean)
    assert mean_bits(blocks, widths) <= mean
    every = itertools.product((4, 5, 6, 8), repeat=len(blocks))
    allowed = [w for w in every if mean_bits(blocks, w) <= mean]
    least = min(error_of(blocks, w) for w in allowed)
    assert error_of(blocks, widths) <= 1.5 * least
    assert widths[1] == max(widths), "the block that loses most"


def test_an_average_below_all_widths_is_refused() -> None:
    with pytest.raises(PackError, match="4 bits are the least"):
        best_widths(some_blocks(), 3.5)


def test_a_model_without_weights_is_planned_with_the_average(source: Path, tmp_path: Path) -> None:
    """Its files are headers before a hole, so that no width loses anything."""
    blocks = [dataclasses.replace(b, lost=dict.fromkeys(b.lost, 0.0)) for b in some_blocks()]
    assert mean_bits(blocks, best_widths(blocks, 4.5)) == 4.5
    write_outline(source / "config.json", tmp_path)
    meta = build_planned(tmp_path, quantization="5.5/8")
    entries = [e for e in meta.checkpoint.tensors.values() if isinstance(e, PackedEntry)]
    numels = [torch.Size(e.shape).numel() for e in entries]
    bits = sum(n * e.format.bits for n, e in zip(numels, entries, strict=True))
    assert 5.2 <= bits / sum(numels) <= 5.5


def test_a_sample_has_the_same_elements_packed_or_not(source: Path, nested: Path) -> None:
    name = "model.embed_tokens.weight"
    plain, there = (build_meta(folder).checkpoint for folder in (source, nested))
    elements = [i for run in runs_of(400 * 64, NUM_RUNS) for i in run]
    assert 0 < len(elements) < 400 * 64, "some are left out"
    for checkpoint in (plain, there):
        whole = decoded(checkpoint, torch.float32)[name].flatten()
        assert sample_of(checkpoint.tensors[name]).equal(whole[elements])
    small = "model.layers.0.self_attn.k_proj.weight"
    for checkpoint in (plain, there):
        whole = decoded(checkpoint, torch.float32)[small].flatten()
        assert sample_of(checkpoint.tensors[small]).equal(whole)


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_an_average_gives_more_bits_to_what_loses_more(
    is_packed: bool, source: Path, nested: Path
) -> None:
    folder = nested if is_packed else source
    found = listed(folder, quantization="4.25/8")
    assert widths_of(found.quantization) == (4, 4, 5, 4, 4)
    meta = build_planned(folder, quantization="4.25/8")
    bits = bits_by_name(meta)
    assert {b for n, b in bits.items() if ".layers.1." in n} == {5}
    numels = {n: e.num_bytes and torch.Size(e.shape).numel() for n, e in meta.checkpoint.tensors.items()}  # fmt: skip
    assert sum(numels[n] * b for n, b in bits.items()) <= 4.25 * sum(numels[n] for n in bits)
    assert found.alike[5] < found.error < found.alike[4]


def test_a_packed_file_and_its_source_choose_alike(source: Path, nested: Path) -> None:
    assert listed(source, quantization="4.5/8").quantization == listed(nested, quantization="4.5/8").quantization  # fmt: skip


# ------------------------------------------------------------------ what is read


def built(source: Path, quantization: str, beside: Path) -> Any:
    return build_packed(
        source,
        quantization=quantization,
        beside=beside,
        choose_storage=lambda files: choose_storage(files[0]).storage,
    )


def test_a_plain_model_is_packed_once_and_read_as_planned(source: Path, tmp_path: Path) -> None:
    before = digests(source)
    values: list[dict[str, torch.Tensor]] = []
    for quantization in ("6,5,4,8,4/8", "4.5/8"):
        meta = built(source, quantization, tmp_path)
        ahead = build_planned(source, quantization=quantization)
        assert bits_by_name(meta) == bits_by_name(ahead)
        sizes = [{n: e.num_bytes for n, e in m.checkpoint.tensors.items()} for m in (meta, ahead)]
        assert sizes[0] == sizes[1]
        values.append(decoded(meta.checkpoint, torch.bfloat16))
    assert len(list((tmp_path / "packed").glob("*/config.json"))) == 1, "one file for both"
    assert any(not values[0][name].equal(values[1][name]) for name in values[0])
    assert digests(source) == before


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("5,4/8", "lists 2 blocks; .* has 5 that hold packed weights"),
        ("5x3/8", "can't be read at 3 bits, only at 4, 5, 6, 8"),
        ("3.5/8", "4 bits are the least"),
    ],
)
def test_what_the_file_cannot_be_read_in_is_refused(
    quantization: str, message: str, nested: Path
) -> None:
    with pytest.raises(PackError, match=message):
        build_planned(nested, quantization=quantization)


def test_codes_of_one_width_have_no_widths_by_block(source: Path, tmp_path: Path) -> None:
    there = packed(source, tmp_path / "p", Wanted("nf4"))
    with pytest.raises(PackError, match="not packed in nested codes of one kind"):
        build_planned(there, quantization="4.5/8")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        ("gpt2", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),
    ],
)
def test_mixed_widths_train_as_the_decoded_weights_do(
    name: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    base = tiny_models.build(name, dtype=dtype)
    tiny_models.save(base, tmp_path / "source")
    there = packed(tmp_path / "source", tmp_path / "packed", NESTED)
    blocks = len(packed_blocks(there))
    widths = list(itertools.islice(itertools.cycle((5, 4, 8, 6)), blocks))
    meta = build_planned(there, quantization=written(widths))
    assert sorted(set(bits_by_name(meta).values())) == sorted(set(widths))
    twin = unpacked_twin(there, tmp_path / "twin", dtype, checkpoint=meta.checkpoint)
    before = digests(tmp_path)
    adapt = partial(with_lora, targets=tiny_models.lora_targets(base))
    plain = adapt(type(base).from_pretrained(twin, dtype=dtype))
    streamed = stream(there, meta=meta, micro_batch_size=2)
    pair = Pair(name, there, plain, adapt(streamed))
    assert_same_training(pair, batches(name, 3), num_micro=2)
    assert num_misses(pair.engine) == 0
    assert digests(tmp_path) == before
    formats = [{c.source.format.bits for c in r.copies if hasattr(c.source, "format")} for r in pair.engine.recipes]  # fmt: skip
    assert [bits for bits in formats if bits] == [{bits} for bits in widths]


def packed_blocks(folder: Path) -> list[int]:
    """Places of the blocks that hold nested weights."""
    from ssdtune.packing.by_block import blocks_of

    meta = build_meta(folder)
    file = dataclasses.replace(packed_file(meta), errors=None)
    return [block.place for block in blocks_of(meta, file)]


# ------------------------------------------------------------------ auto


def test_auto_fills_what_is_hidden_with_bits_of_single_blocks(
    config_path: Path, source: Path
) -> None:
    job = a_job_with_readings(config_path)
    mixed = [reading for reading in job.readings if reading.is_mixed]
    assert mixed
    chosen = (chosen_at(job, config_path, 4e7 * 0.8**k) for k in range(14))
    found = next(each for each in chosen if each.reading.is_mixed)
    wider = [t for t in found.tried if t.reading.bits > found.reading.bits]
    (own,) = [t for t in found.tried if t.reading == found.reading]
    assert own.is_hidden
    assert wider
    assert not any(t.is_hidden for t in wider)
    alone = a_job_with_readings(config_path, "--quantization", found.reading.quantization)
    assert alone.blocks == found.reading.blocks
    lines = list(bits_lines(found, str(source)))
    assert f"({found.reading.bits:g} bits on average)" in lines[0]
    assert "by a sample" in lines[1]
    assert "everywhere" in lines[1]
    assert (
        f"--check_bits {found.reading.quantization}" in lines[2] or "once it is packed" in lines[2]
    )


def test_readings_of_single_widths_come_first(config_path: Path) -> None:
    """A mixed one is chosen only beside the one that is the best of those."""
    job = a_job_with_readings(config_path)
    alike = dataclasses.replace(job, readings=tuple(r for r in job.readings if not r.is_mixed))
    for rate in (1e12, 1e7, 4e6, 1e4):
        bits, narrower = (chosen_at(j, config_path, rate).reading.bits for j in (job, alike))
        assert bits >= narrower
        wider = [r.bits for r in alike.readings if r.bits > narrower]
        assert bits < min(wider, default=99)


def test_both_keys_that_are_auto_open_the_model_once(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    save_profile(profile_at(1e4), own_profile_path())
    calls: list[Any] = []
    inner = opened.open_source
    monkeypatch.setattr(opened, "open_source", lambda source: calls.append(source) or inner(source))
    config = settled(load_config(config_path, ["--offload.micro_batch_size", "auto"])).config
    assert len(calls) == 1
    assert config.quantization == "nf4"
    assert isinstance(config.offload.micro_batch_size, int)
    told = capsys.readouterr().out
    assert "quantization: auto is nf4" in told
    assert "offload.micro_batch_size: auto is" in told


# ------------------------------------------------------------------ a run, and its check


def test_a_run_lists_the_bits_of_an_average(config_path: Path, nested: Path, capsys: Any) -> None:
    flags = ["--quantization", "4.5/8", "--model_name_or_path", str(nested)]
    config = settled(load_config(config_path, flags)).config
    assert widths_of(config.quantization)
    assert mean_of(config.quantization) is None
    told = capsys.readouterr().out
    assert f"quantization: 4.5/8 is {config.quantization}" in told
    assert "by a sample" in told


def test_other_bits_of_the_same_files_are_another_run(nested: Path) -> None:
    readings = [
        reading_of(build_planned(nested, quantization=q).checkpoint.tensors)
        for q in ("4", "5", "5,4,4,4,4/8", "4,5,4,4,4/8", "4.5/8")
    ]
    assert readings[:2] == ["4", "5"]
    assert all(reading is not None for reading in readings)
    assert len(set(readings)) == 5
    fields = {field.name: None for field in dataclasses.fields(RunIdentity)}
    mine = RunIdentity(**{**fields, "reading": readings[2]})  # pyright: ignore[reportArgumentType]
    assert mine.differences({**fields, "reading": readings[2]}) == []
    (said,) = mine.differences({**fields, "reading": "4"})
    assert said == f"the base's weights were read in 4 bits and are in {readings[2]}"
    del fields["reading"]
    assert mine.differences(fields) == [], "a checkpoint of an older version is not compared"


def test_weights_of_one_width_have_no_reading(source: Path, tmp_path: Path) -> None:
    there = packed(source, tmp_path / "p", Wanted("nf4"))
    assert reading_of(build_meta(there).checkpoint.tensors) is None
    assert reading_of(build_meta(source).checkpoint.tensors) is None


@pytest.mark.slow
def test_a_run_goes_on_with_its_widths_alone(
    config_path: Path, nested: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["train", str(config_path), "--model_name_or_path", str(nested)]
    assert main([*command, "--quantization", "4.5/8", "--max_steps", "1"]) == 0
    record = load_config(tmp_path / "run" / "ssdtune.yaml").config
    assert len(widths_of(record.quantization)) == 5
    assert main([*command, "--quantization", "5"]) == 2
    message = capsys.readouterr().err
    assert "the base's weights were read in 4, 5" in message
    assert "are in 5" in message
    assert main([*command, "--quantization", "4.5/8"]) == 0
    assert "resuming" in capsys.readouterr().out
    save_profile(profile_at(1e12), own_profile_path())
    assert main([*command, "--max_steps", "3"]) == 0, "auto keeps them"
    assert f"auto is {record.quantization}, as when the run began" in capsys.readouterr().out


def test_a_run_answers_in_its_own_bits_alone(
    config_path: Path, nested: Path, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    command = ["train", str(config_path), "--model_name_or_path", str(nested)]
    assert main([*command, "--quantization", "4", "--max_steps", "1"]) == 0
    with pytest.raises(GenerateError, match=r"quantization: 5, but the run was trained with 4"):
        generate_from_run(run, ["the sky"], overrides=["--quantization", "5"])
    shutil.copytree(nested, copy)
    moved = ["--model_name_or_path", str(copy), "--quantization"]
    with pytest.raises(GenerateError, match=r"were read in 4 bits and are in 5\.\nLeave out"):
        generate_from_run(run, ["the sky"], overrides=[*moved, "5"])
    assert len(generate_from_run(run, ["the sky"], max_new_tokens=1, overrides=[*moved, "4"])) == 1


def test_a_check_is_kept_under_the_list(
    source: Path, nested: Path, text: Path, capsys: Any
) -> None:
    command = ["pack", str(source), "--out", str(nested), "--check", "--check_text", str(text)]
    assert main([*command, "--check_bits", "4.5/8"]) == 0
    (name,) = checks_of(nested)
    assert name == listed(nested, quantization="4.5/8").quantization
    capsys.readouterr()
    assert main([*command, "--check_bits", "9"]) == 2
    assert "--check_bits 9: 1 to 8, 4.5/8 or 5,28x4,6/8" in capsys.readouterr().err


def test_every_width_has_its_format(nested: Path) -> None:
    meta = build_planned(nested, quantization="4,5,6,8,4/8")
    formats = {e.format for e in meta.checkpoint.tensors.values() if isinstance(e, PackedEntry)}
    assert formats == {Affine(bits, (4, 1, 1, 2)) for bits in (4, 5, 6, 8)}
