"""Widths by tensor within a target, and what a packing costs: chosen, trained, compared by other routes than the code's."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
from safetensors.torch import save_file
from support import Pair, assert_same_training, digests, num_misses, streamed, with_lora
from test_packing import batches, decoded, unpacked_twin

from ssdtune.cli import EXIT_USER_ERROR, main
from ssdtune.config import load_config
from ssdtune.fidelity.beside import measure
from ssdtune.fidelity.check import paired, reading_of
from ssdtune.fidelity.record import checks_of, keep
from ssdtune.fidelity.text import load_text
from ssdtune.jobs import Jobs, Source
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.nibbles import NF4, Nibbles
from ssdtune.packing.choice import Option, choose, smallest
from ssdtune.packing.convert import pack
from ssdtune.packing.encoding import encoded
from ssdtune.packing.errors import (
    NUM_RUNS,
    WIDTHS,
    Sampled,
    affine,
    errors_by_width,
    relative_error,
    sampled_errors,
)
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.mixed import weights_of, within
from ssdtune.packing.once import build_packed, build_planned
from ssdtune.packing.readings import BETWEEN, TABLE_WORTH
from ssdtune.packing.sample import sample_of
from ssdtune.planning.bits import bits_lines, chosen_for
from ssdtune.profiles import own_profile_path, save_profile
from ssdtune.schedule.bits import Chosen
from ssdtune.schedule.job import Job, Reading, job_from
from ssdtune.schedule.machine import Drive, Machine
from ssdtune.schedule.profile import OPERATORS, Profile
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import open_checkpoint
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.build import build_meta

Stream = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tokenized rows are cached; not in the user's cache."""
    with tiny_runs.own_datasets_cache(tmp_path_factory.mktemp("datasets-cache")):
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, bfloat16; one layer's weights are far from normal, so that few bits cost it more."""
    model = tiny_runs.llama(3, dtype=torch.bfloat16, num_hidden_layers=3)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.mul_(weight.square())
    return tiny_runs.save(model, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    return tiny_runs.write_rows(path, tiny_runs.texts(5))


# ------------------------------------------------------------------ the choice


def a_problem(seed: int, most: int = 5) -> tuple[list[list[Option]], int]:
    """A few tensors with a few options, errors that need not be convex, and a budget."""
    chance = Random(seed)
    tensors = []
    for _ in range(chance.randint(1, most)):
        size = chance.randint(1, 40)
        options = [Option(size * b, size * chance.uniform(0.2, 1) * 4.0**-b) for b in (2, 3, 4, 6)]
        tensors.append(chance.sample(options, len(options)))
    largest = sum(max(o.num_bytes for o in t) for t in tensors)
    return tensors, chance.randint(smallest(tensors), largest)


def best_error(tensors: list[list[Option]], budget: int) -> float:
    """By trying everything."""
    return min(
        sum(o.error for o in chosen)
        for chosen in itertools.product(*tensors)
        if sum(o.num_bytes for o in chosen) <= budget
    )


def test_the_choice_is_within_one_step_of_brute_force() -> None:
    num_best = 0
    for seed in range(300):
        tensors, budget = a_problem(seed)
        chosen = [o[i] for o, i in zip(tensors, choose(tensors, budget), strict=True)]
        assert sum(o.num_bytes for o in chosen) <= budget
        found, best = sum(o.error for o in chosen), best_error(tensors, budget)
        largest = max(max(o.error for o in t) - min(o.error for o in t) for t in tensors)
        assert best <= found + 1e-12
        assert found <= best + largest
        num_best += found < best + 1e-12
    assert num_best > 200, "most are the optimum"


def test_the_choice_for_many_tensors_is_close_to_a_bound() -> None:
    """Lagrange's: whatever a byte is said to cost, no choice within the budget has less error than that."""
    for seed in range(20):
        tensors, budget = a_problem(seed, 400)
        chosen = [o[i] for o, i in zip(tensors, choose(tensors, budget), strict=True)]
        bound = max(
            sum(min(o.error + price * o.num_bytes for o in options) for options in tensors)
            - price * budget
            for price in (2.0**-k for k in range(20))
        )
        step = max(o.error for options in tensors for o in options)
        assert sum(o.error for o in chosen) <= 1.1 * bound + step


def test_nothing_is_left_that_could_be_used() -> None:
    for seed in range(100):
        tensors, budget = a_problem(seed)
        chosen = choose(tensors, budget)
        left = budget - sum(t[i].num_bytes for t, i in zip(tensors, chosen, strict=True))
        for options, i in zip(tensors, chosen, strict=True):
            assert not any(
                o.error < options[i].error and o.num_bytes - options[i].num_bytes <= left
                for o in options
            )


# ------------------------------------------------------------------ errors


def test_an_error_is_that_of_what_is_decoded(source: Path) -> None:
    meta = build_meta(source)
    groups = groups_of(meta, affine(2, 64))
    found = sampled_errors(groups, 64)
    errors = {name: each.errors for name, each in found.items()}
    values = decoded(meta.checkpoint, torch.float32)
    assert errors.keys() == {n for g in groups for n in g.formats}
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
        assert found[name].mean_square == pytest.approx(float(values[name].square().mean()))
        for bits, error in errors[name].items():
            assert error == relative_error(values[name].flatten(), affine(bits, 64))
        falling = [errors[name][bits] for bits in WIDTHS]
        assert falling == sorted(falling, reverse=True)
    odd, usual = (errors[f"model.layers.{i}.mlp.up_proj.weight"][3] for i in (1, 2))
    assert odd > 1.2 * usual


def test_a_sample_is_spread_over_the_tensor_and_says_what_all_of_it_says(tmp_path: Path) -> None:
    values = torch.randn(700, 1000) * torch.linspace(0.5, 2, 700).unsqueeze(1)
    save_file({"w": values}, tmp_path / "model.safetensors")
    sample = sample_of(open_checkpoint(tmp_path).tensors["w"], NUM_RUNS)
    assert sample.numel() < values.numel() / 9
    assert sample[:64].equal(values.flatten()[:64])
    assert sample[-64:].equal(values.flatten()[: 4096 * 170][-64:])
    for bits in (2, 4):
        found, all_of_it = (relative_error(v.flatten(), affine(bits, 64)) for v in (sample, values))
        assert found == pytest.approx(all_of_it, rel=0.03)


def test_codes_read_at_one_width_alone_take_no_scales_for_others(
    source: Path, tmp_path: Path
) -> None:
    """3, 5, 6 and 7 bits lie in slices; what is never read at fewer bits has one scale a group, and is as good."""
    values = torch.randn(64, 512)
    for bits in WIDTHS:
        format = affine(bits, 64)
        nested = Affine(bits, format.order, 64)
        assert relative_error(values.flatten(), format) <= 1.02 * relative_error(values.flatten(), nested)  # fmt: skip
    meta = build_meta(source)
    pack(
        meta, groups_of(meta, affine(6, 64)), tmp_path / "p", storage=choose_storage(source).storage
    )
    for asked in (None, 4, 6):
        entries = build_meta(tmp_path / "p", bits=asked).checkpoint.tensors.values()
        formats = {e.format for e in entries if isinstance(e, PackedEntry)}
        assert formats == {affine(6, 64)}, "a narrower reading is not there"
    header = (tmp_path / "p" / "model-00001-of-00001.safetensors").read_bytes()[:4000]
    assert b"scales.4" not in header


# ------------------------------------------------------------------ widths by tensor


def mixed(source: Path, out: Path, target: float) -> Path:
    assert main(["pack", str(source), "--out", str(out), "--target_bpw", str(target)]) == 0
    return out


def bits_per_weight(folder: Path) -> float:
    """Of all that the files hold."""
    num_weights = sum(math.prod(e.shape) for e in build_meta(folder).checkpoint.tensors.values())
    return 8 * sum(p.stat().st_size for p in folder.glob("*.safetensors")) / num_weights


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5.5 bits a weight."""
    before = digests(source)
    there = mixed(source, tmp_path_factory.mktemp("packed") / "p", 5.5)
    assert digests(source) == before
    return there


def test_a_target_is_met_from_below(packed: Path) -> None:
    assert 5.1 < bits_per_weight(packed) <= 5.5
    there = packed
    entries = build_meta(there).checkpoint.tensors
    widths = {e.format.bits for e in entries.values() if isinstance(e, PackedEntry)}  # pyright: ignore[reportAttributeAccessIssue]
    assert len(widths) > 1


def test_what_loses_more_gets_more_bits(source: Path) -> None:
    meta = build_meta(source)
    groups = groups_of(meta, affine(2, 64))
    names = [n for g in groups for n in g.formats]
    usual = {bits: 4.0**-bits for bits in WIDTHS}
    found = dict.fromkeys(names, Sampled(usual, 1.0))
    found[names[3]] = Sampled({bits: 100 * error for bits, error in usual.items()}, 1.0)
    chosen = within(groups, 5.5, 64, found, weights_of(groups, found))
    formats = {n: f for g in chosen for n, f in g.formats.items()}
    bits = [format.bits for format in formats.values() if isinstance(format, Affine)]
    assert formats[names[3]].bits > sum(bits) / len(bits) + 2


def test_what_other_threads_round_to_changes_no_width(source: Path) -> None:
    """Tensors of one size and error: which of them gets the last bits must not hang on noise."""
    meta = build_meta(source)
    groups = groups_of(meta, affine(2, 64))
    names = [n for g in groups for n in g.formats]
    chance, chosen = Random(0), []
    for noise in (0.0, 1e-9, 1e-9, 1e-9):
        found = {
            name: Sampled({b: 4.0**-b * chance.uniform(1 - noise, 1 + noise) for b in WIDTHS}, 1.0)
            for name in names
        }
        chosen.append(within(groups, 5.5, 64, found, weights_of(groups, found)))
    assert all(each == chosen[0] for each in chosen)


def test_a_packing_goes_on_in_the_widths_that_were_chosen(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whatever they would be now: other threads round otherwise, gradients above all."""
    out = tmp_path / "p"
    command = ["pack", str(source), "--out", str(out), "--target_bpw"]

    def stopping(name: str, *given: Any) -> Any:
        if name == "lm_head.weight":
            raise KeyboardInterrupt
        return encoded(name, *given)

    with monkeypatch.context() as first:
        first.setattr("ssdtune.packing.convert.encoded", stopping)
        assert main([*command, "5.5"]) == 130
    assert not (out / "config.json").exists()
    usual = sampled_errors(groups_of(build_meta(source), affine(2, 64)), 64)
    turned = dict(zip(usual, reversed(usual.values()), strict=True))
    monkeypatch.setattr("ssdtune.pack.sampled_errors", lambda *given: turned)
    assert main([*command, "5.4"]) == 2
    assert "an unfinished packing of another kind" in capsys.readouterr().err
    assert main([*command, "5.5"]) == 0
    assert "in the widths that were chosen when it was begun" in capsys.readouterr().out
    assert digests(out) == digests(packed)
    other = mixed(source, tmp_path / "other", 5.5)
    assert digests(other) != digests(packed), "what is begun anew has the widths of now"


def test_a_target_below_the_least_names_the_least(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "p"
    assert main(["pack", str(source), "--out", str(out), "--target_bpw", "1.5"]) == 2
    message = capsys.readouterr().err
    assert "are the least for this model" in message
    assert not out.exists()
    least = message.split("Give --target_bpw ")[1].split()[0]
    assert bits_per_weight(mixed(source, out, float(least))) <= float(least)


@pytest.mark.parametrize("target", [40.0, math.inf])
def test_a_target_at_which_nothing_would_be_packed_is_refused(target: float, source: Path) -> None:
    meta = build_meta(source)
    groups = groups_of(meta, affine(2, 64))
    found = {n: Sampled(dict.fromkeys(WIDTHS, 0.1), 1.0) for g in groups for n in g.formats}
    weights = weights_of(groups, found)
    stored = 8 * sum(t.num_bytes for g in groups for t in g.tensors)
    stored /= sum(math.prod(t.shape) for g in groups for t in g.tensors)
    with pytest.raises(PackError, match=f"the model has {stored:g} bits a weight"):
        within(groups, target, 64, found, weights)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_bpw", "4", "--bits", "4"], "--target_bpw chooses widths itself"),
        (["--target_bpw", "4", "--format", "nf4"], "--format nf4 has one"),
        (["--target_bpw", "4", "--group", "7"], "32, 64, 128"),
        (["--target_bpw", "nan"], "--target_bpw nan"),
        (["--check_bits", "4"], "--check"),
        (["--bits", "4", "--text", "t.jsonl"], "--text is for --target_bpw"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], message: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["pack", str(source), "--out", str(tmp_path / "p"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="fp32", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, id="bf16"),
    ],
)
def test_mixed_widths_train_as_the_decoded_weights_do(
    dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    base = tiny_models.build("llama", dtype=dtype)
    tiny_models.save(base, tmp_path / "source")
    there = mixed(tmp_path / "source", tmp_path / "p", 7.0)
    twin = unpacked_twin(there, tmp_path / "twin", dtype)
    adapt = partial(with_lora, targets=tiny_models.lora_targets(base))
    plain = adapt(type(base).from_pretrained(twin, dtype=dtype))
    pair = Pair("llama", there, plain, adapt(stream(there, micro_batch_size=2)))
    assert_same_training(pair, batches("llama"), num_micro=2)
    assert num_misses(pair.engine) == 0
    assert any(len({c.source.format for c in r.copies if hasattr(c.source, "format")}) > 1 for r in pair.streamed.get_base_model().ssdtune.open_engine.recipes)  # fmt: skip


# ------------------------------------------------------------------ what packing costs


def test_the_check_measures_what_two_models_in_memory_differ_by(
    source: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    there = packed
    rows = load_text(str(text), str(source))
    model = streamed(source, micro_batch_size=1, factor=1.5)
    try:
        found = measure(model, build_meta(there), rows, choose_storage(there).storage)
        assert model.ssdtune.method is None
    finally:
        model.ssdtune.close()
    twin = unpacked_twin(there, tmp_path / "twin", torch.bfloat16)
    kind = tiny_models.auto_class("llama")
    pair = [kind.from_pretrained(f, dtype=torch.bfloat16).eval() for f in (source, twin)]
    hidden: list[list[list[torch.Tensor]]] = []
    for variant, plain in enumerate(pair):
        with torch.no_grad():
            outs = [plain(**b, output_hidden_states=True) for b in rows.batches]
        assert [float(o.loss) for o in outs] == found.losses[variant]
        hidden.append([list(o.hidden_states) for o in outs])
    for i in range(2):  # the last layer's hidden states are told behind the last norm
        pairs = [(p[i + 1].float(), s[i + 1].float()) for s, p in zip(*hidden, strict=True)]
        expected = sum((p - s).square().sum() for p, s in pairs) / sum(s.square().sum() for _, s in pairs)  # fmt: skip
        assert found.outputs[f"model.layers.{i}"].relative == pytest.approx(float(expected), rel=1e-4)  # fmt: skip
    weights = [m.state_dict() for m in pair]
    names = [n for n in weights[0] if n.startswith("model.layers.2.")]
    off = sum((weights[1][n].float() - weights[0][n].float()).square().sum() for n in names)
    whole = sum(weights[0][n].float().square().sum() for n in names)
    assert found.weights["model.layers.2"].relative == pytest.approx(float(off / whole), rel=1e-4)


def test_the_uncertainty_is_that_of_a_ratio_over_rows() -> None:
    torch.manual_seed(0)
    counts = torch.randint(5, 50, (4000,)).tolist()
    source = torch.rand(4000).tolist()
    packed = [s + 0.1 + 0.05 * float(x) for s, x in zip(source, torch.randn(4000), strict=True)]
    costs = paired((source, packed), counts)
    assert costs.packed - costs.source == pytest.approx(0.1, abs=4 * 0.05 / 60)
    by_rows = 0.05 * math.sqrt(sum(n * n for n in counts)) / sum(counts)
    assert costs.standard_error == pytest.approx(by_rows, rel=0.05)
    assert paired(([1.0], [1.5]), [3]).standard_error is None


def test_the_command_packs_checks_and_checks_again(
    source: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "p"
    checks = ["--check", "--check_text", str(text)]
    command = ["pack", str(source), "--out", str(out)]
    packs = ["--bits", "8", "--order", "4,1,1,2"]
    assert main([*command, *packs, *checks]) == 0
    told = capsys.readouterr().out
    assert "model.layers.2" in told
    assert "loss " in told
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert main([*command, *checks, "--check_bits", "4"]) == 0, "what is packed is checked as it is"
    assert main([*command, *packs, *checks]) == 0, "or found to be what is asked for"
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} == before
    found = checks_of(out)
    assert found.keys() == {"8", "4"}
    worse, better = (found[bits]["blocks"][2]["weights"] for bits in ("4", "8"))
    assert worse > 50 * better > 0
    assert found["4"]["tokens"] == sum(load_text(str(text), str(source)).counts)
    capsys.readouterr()
    assert main([*command, "--bits", "3", *checks]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_a_folder_that_is_not_packed_has_nothing_to_check(
    source: Path, text: Path, capsys: Any
) -> None:
    assert main(["pack", str(source), "--out", str(source), "--check", "--check_text", str(text)]) == 2  # fmt: skip
    assert "is not packed" in capsys.readouterr().err
    assert not (source / "pack_check.json").exists()


def test_another_models_packing_is_refused(
    packed: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tiny_runs.save(tiny_runs.llama(intermediate_size=96), tmp_path / "other")
    there = packed
    assert main(["pack", str(other), "--out", str(there), "--check", "--check_text", str(text)]) == 2  # fmt: skip
    assert "Give the model that it was packed from" in capsys.readouterr().err


# ------------------------------------------------------------------ auto


def write_config(folder: Path, source: Path, text: Path) -> Path:
    path = folder / "train.yaml"
    path.write_text(
        f"model_name_or_path: {source}\ndataset: {text}\noutput_dir: {folder}/run\nquantization: auto\n"
        "max_length: 16\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 2\nlora_r: 4\nmax_steps: 2\n"
        f"save_steps: 1\noffload: {{path: {folder}/nvme, ram: 200KB, activations: none}}\n"
    )
    return path


@pytest.fixture
def config_path(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    return write_config(tmp_path, source, text)


@pytest.fixture(scope="module")
def planned(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    """A configuration with auto, and its job."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSDTUNE_CACHE", str(folder / "cache"))
        path = write_config(folder, source, text)
        return path, a_job_with_readings(path)


def a_job_with_readings(config_path: Path, *flags: str) -> Job:
    config = load_config(config_path, flags).config
    return Jobs(Source.of(config, None, on_device=False))()


def chosen_at(job: Job, config_path: Path, read_rate: float, **drive: Any) -> Chosen:
    """What is chosen where the drive reads so many bytes a second and compute is the same."""
    machine = Machine(
        name="made up",
        ram_bytes=10**10,
        profile=profile_at(read_rate),
        drive=Drive(name="/nvme", **drive),
    )
    return chosen_for(job, machine, load_config(config_path, []).config)


def profile_at(read_rate: float) -> Profile:
    rates = {"nvme_read": read_rate, "nvme_write": read_rate, "unpack": 1e9, "h2d": 1e10}
    content = {
        "name": "made up",
        "operators": {"bfloat16": {kind: [[1, 1e-9], [10**9, 1]] for kind in OPERATORS}},
        "transfers": {name: [[1, 1 / r], [10**9, 10**9 / r]] for name, r in rates.items()},
    }
    return profile_from(content, "here")


def test_a_reading_is_planned_as_the_key_with_its_value_is(
    planned: tuple[Path, Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config_path, job = planned
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path))
    readings = [r for r in job.readings if not r.is_mixed]
    assert [r.bits for r in readings] == [16, pytest.approx(12, abs=0.1), 8, 6, 5, 4, 3, 2]
    assert job_from(job.to_json()) == job
    assert [r.quantization for r in readings[4:7]] == ["5/8", "nf4", "3/8"]
    for reading in readings[4:7]:
        alone = a_job_with_readings(config_path, "--quantization", reading.quantization)
        assert alone.blocks == reading.blocks
        assert not alone.readings
    sizes = [sum(b.file_bytes for b in r.blocks) for r in readings]
    assert sizes == sorted(sizes, reverse=True)
    assert len({r.folder for r in readings[2:5]}) == 1, "one file for 8, 6 and 5"
    assert not list(config_path.parent.glob("**/*.safetensors")), "a plan packs nothing"


def test_a_nested_file_is_as_it_was_planned(source: Path, tmp_path: Path) -> None:
    """Byte for byte: what lies between the parts that are read counts."""
    built = build_packed(
        source,
        quantization="5/8",
        beside=tmp_path,
        choose_storage=lambda files: choose_storage(files[0]).storage,
    )
    ahead = build_planned(source, quantization="5/8").checkpoint.tensors
    there = built.checkpoint.tensors
    formats = {e.format for e in there.values() if isinstance(e, PackedEntry)}
    assert formats == {Affine(5, (4, 1, 1, 2))}
    assert {n: e.num_bytes for n, e in there.items()} == {n: e.num_bytes for n, e in ahead.items()}
    starts = [
        [
            p.start
            for n, e in tensors.items()
            if ".layers.1." in n and isinstance(e, PackedEntry)
            for p in e.parts
        ]
        for tensors in (there, {n: ahead[n] for n in there})
    ]
    distances = [[start - each[0] for start in each] for each in starts]
    assert distances[0] == distances[1]


def test_auto_takes_the_most_bits_whose_reading_is_hidden(planned: tuple[Path, Job]) -> None:
    config_path, job = planned
    rates = (1e12, *(4e7 * 0.7**k for k in range(9)), 1e4)
    chosen = [chosen_at(job, config_path, rate) for rate in rates]
    bits = [each.reading.bits for each in chosen]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 16
    assert bits[-1] == 4, "time alone is no reason for fewer"
    for each in chosen:
        steps = {t.reading.bits: t for t in each.tried}
        wider = [t for b, t in steps.items() if b > each.reading.bits]
        assert not any(t.is_hidden for t in wider)
        if not steps[each.reading.bits].is_hidden:
            assert each.reading.bits >= 4
            known = [t.step_s for b, t in steps.items() if b >= 4 and t.step_s]
            assert steps[each.reading.bits].step_s <= 1.02 * min(known)  # pyright: ignore[reportOptionalOperand]
    assert any(4 < b < 12 for b in bits), "the rates step over what lies between"
    assert len([b for b in bits if 11 < b < 16]) > 0, "all bits before fewer of them"


def test_all_bits_in_fewer_bytes_are_a_reading_of_bfloat16_files(
    planned: tuple[Path, Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As large as the key's own plan has it, but for escapes, which a sample has counted."""
    config_path, job = planned
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path))
    reading = job.readings[1]
    assert reading.quantization == "lossless"
    assert job.lossless_ratio is not None
    assert reading.bits == pytest.approx(16 / job.lossless_ratio, abs=0.01)
    alone = a_job_with_readings(config_path, "--quantization", "lossless")
    assert reading.folder == alone.packed_folder
    for own, other in zip(reading.blocks, alone.blocks, strict=True):
        assert own.decoding == other.decoding
        assert own.file_bytes == pytest.approx(other.file_bytes * reading.bits / 12, abs=1)
    said = list(bits_lines(Chosen(reading=reading, why="so", tried=()), "m"))
    assert said[0] == f"quantization: auto is lossless ({reading.bits:g} bits): so"
    assert said[1:] == ["that costs nothing: the weights keep all their bits"]
    begun_at_loss = a_job_with_readings(config_path, "--init_lora_weights", "loftq")
    assert "lossless" not in [r.quantization for r in begun_at_loss.readings]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose matrices are normal numbers, as trained ones nearly are, and numbers of a grid of 16."""
    made: dict[str, Path] = {}
    for kind in ("normal", "grid"):
        torch.manual_seed(0)
        model = tiny_runs.llama(3, dtype=torch.bfloat16, num_hidden_layers=3)
        with torch.no_grad():
            for weight in (p for p in model.parameters() if p.ndim == 2):
                if kind == "normal":
                    weight.normal_(0, 0.02)
                else:
                    weight.copy_(torch.randint(-8, 8, weight.shape) * 2.0**-8)
        made[kind] = tiny_runs.save(model, tmp_path_factory.mktemp(kind))
    return made


@pytest.mark.parametrize(("kind", "word"), [("normal", "nf4"), ("grid", "4/8")])
def test_four_bits_are_those_that_lose_less_for_their_bytes(
    kind: str, word: str, config_path: Path, drawn: dict[str, Path]
) -> None:
    """By whole matrices: nf4 has 4.25 bits a weight, affine codes 4.375."""
    values = decoded(build_meta(drawn[kind]).checkpoint, torch.float32)
    whole = values["model.layers.0.mlp.up_proj.weight"].flatten()
    nested = errors_by_width([whole], Affine(8, (4, 1, 1, 2)))[0][4]
    table = errors_by_width([whole], Nibbles(NF4, 64, False, "BF16"))[0][4]
    assert (TABLE_WORTH * table < nested * 4**0.125) == (word == "nf4")
    job = a_job_with_readings(config_path, "--model_name_or_path", str(drawn[kind]))
    (found,) = (r for r in job.readings if r.bits == 4)
    assert found.quantization == word
    assert found.error == pytest.approx(table if word == "nf4" else nested, rel=0.5)
    moved = ("--method", "zo", "--zo_trains", "all", "--zo_packed", "moved")
    job = a_job_with_readings(config_path, "--model_name_or_path", str(drawn[kind]), *moved)
    words = {r.quantization for r in job.readings}
    assert "4/8" in words
    assert not {"nf4", "lossless"} & words, "only affine codes are moved"


def test_four_bits_of_headers_alone_are_nf4(config_path: Path, source: Path) -> None:
    """Whose weights nobody knows; as on the models that were measured."""
    config = load_config(config_path, []).config
    job = Jobs(Source.of(config, str(source / "config.json"), on_device=False))()
    assert [r.quantization for r in job.readings if r.bits == 4] == ["nf4"]


def test_no_widths_are_mixed_that_another_reading_beats(
    config_path: Path, drawn: dict[str, Path]
) -> None:
    """In bytes and in errors, of which nf4's count less: so on SmolLM2 4.5/8 lost more than nf4 in fewer bytes did."""
    job = a_job_with_readings(config_path, "--model_name_or_path", str(drawn["normal"]))
    known = [
        (sum(b.file_bytes for b in r.blocks), r.error * (TABLE_WORTH if r.quantization == "nf4" else 1), r)
        for r in job.readings
        if r.error is not None
    ]  # fmt: skip
    (nf4,) = (each for each in known if each[2].quantization == "nf4")
    mixed = [each for each in known if each[2].is_mixed]
    assert mixed
    assert not any(
        more > num_bytes and worse > error for more, worse, _ in mixed for num_bytes, error, _ in known
    )  # fmt: skip
    assert not any(num_bytes >= nf4[0] for num_bytes, _, r in mixed if r.bits < 4)
    assert len([r for _, _, r in mixed if 4 < r.bits < 5]) < len(BETWEEN)


def test_between_nf4_and_five_bits_there_are_mixed_widths_of_another_file(
    config_path: Path, drawn: dict[str, Path]
) -> None:
    job = a_job_with_readings(config_path, "--model_name_or_path", str(drawn["normal"]))
    five, nf4 = (next(r for r in job.readings if r.quantization == w) for w in ("5/8", "nf4"))

    def times(reading: Reading, factor: int) -> Reading:
        blocks = (dataclasses.replace(b, file_bytes=factor * b.slot_bytes // 8) for b in nf4.blocks)
        return dataclasses.replace(reading, blocks=tuple(blocks))

    mixed = dataclasses.replace(five, quantization="4.5/8", bits=4.5, is_mixed=True)
    readings = (times(five, 4), times(mixed, 2), times(nf4, 1))
    job = dataclasses.replace(job, readings=readings)
    found = [chosen_at(job, config_path, 1e9 * 0.8**k).reading.bits for k in range(60)]
    assert list(dict.fromkeys(found))[:3] == [5, 4.5, 4]


def test_weights_of_other_types_and_such_as_gain_nothing_are_not_packed_without_loss(
    config_path: Path, source: Path, tmp_path: Path
) -> None:
    noise = tiny_runs.llama(3, dtype=torch.bfloat16, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in noise.parameters():
            bits = torch.randint(0, 0x7F80, parameter.shape, dtype=torch.int16)  # no infinities
            parameter.copy_(bits.view(torch.bfloat16))
    wide = tiny_runs.llama(3, dtype=torch.float32, num_hidden_layers=1)
    for model in (noise, wide):
        folder = tiny_runs.save(model, tmp_path / str(model.dtype))
        job = a_job_with_readings(config_path, "--model_name_or_path", str(folder))
        assert "lossless" not in [r.quantization for r in job.readings]


def test_auto_packs_nothing_for_which_the_drive_has_no_room(planned: tuple[Path, Job]) -> None:
    config_path, job = planned
    assert chosen_at(job, config_path, 1e4, free_bytes=1000).reading.quantization == "none"
    folder = Path(chosen_at(job, config_path, 1e4).reading.folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert chosen_at(job, config_path, 1e4, free_bytes=1000).reading.quantization == "nf4"


def test_what_is_packed_is_chosen_among_its_own_widths(
    config_path: Path, source: Path, packed: Path, tmp_path: Path
) -> None:
    nested = tmp_path / "nested"
    command = ["pack", str(source), "--out", str(nested), "--bits", "8", "--order", "4,1,1,2"]
    assert main(command) == 0
    job = a_job_with_readings(config_path, "--model_name_or_path", str(nested))
    alike = [r.quantization for r in job.readings if not r.is_mixed]
    assert alike == ["8", "6", "5", "4"]
    assert all(not r.packed_bytes for r in job.readings)
    job = a_job_with_readings(config_path, "--model_name_or_path", str(packed))
    assert [r.quantization for r in job.readings] == ["none"], (
        "widths by tensor are read as they are"
    )


def test_rotated_codes_are_chosen_among_their_widths_too(
    config_path: Path, source: Path, tmp_path: Path
) -> None:
    there = tmp_path / "rotated"
    assert main(["pack", str(source), "--out", str(there), "--bits", "5", "--rotate"]) == 0
    job = a_job_with_readings(config_path, "--model_name_or_path", str(there))
    alike = [r for r in job.readings if not r.is_mixed]
    assert [r.quantization for r in alike] == ["5", "4"]
    whole, fewer = (r.error for r in alike)
    assert whole == 0
    assert fewer is not None
    assert 1e-4 < fewer < 0.02
    sizes = [sum(b.file_bytes for b in r.blocks) for r in alike]
    assert sizes[0] > sizes[1]
    for bits in (4, 5):
        assert reading_of(build_meta(there, bits=bits).checkpoint) == str(bits), "its checks' name"


@pytest.mark.slow
def test_a_run_with_auto_packs_trains_and_goes_on_with_its_bits(
    config_path: Path, tmp_path: Path, capsys: Any
) -> None:
    save_profile(profile_at(1e4), own_profile_path())
    assert main(["plan", str(config_path)]) == 0
    told = capsys.readouterr().out
    assert "quantization: auto is nf4 (4 bits): the fastest of 4 and more" in told
    assert "not measured: `ssdtune pack --check` tells, once it is packed" in told
    assert main(["train", str(config_path), "--max_steps", "1"]) == 0
    told = capsys.readouterr().out
    assert "quantization: auto is nf4" in told
    record = load_config(tmp_path / "run" / "ssdtune.yaml").config
    assert record.quantization == "nf4"
    (there,) = (tmp_path / "nvme" / "packed").glob("*/config.json")
    assert main(["plan", str(config_path)]) == 0
    assert f"--out {there.parent} --check\n" in capsys.readouterr().out
    check = {"packed_loss": 2.02, "source_loss": 2.0, "standard_error": 0.001, "tokens": 100}
    keep(there.parent, reading_of(build_meta(there.parent).checkpoint), check)
    assert main(["plan", str(config_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "nf4"
    assert main(["plan", str(config_path)]) == 0
    assert "costs +1.0% loss (+0.0200 ± 0.0010 on 100 tokens" in capsys.readouterr().out
    save_profile(profile_at(1e12), own_profile_path())
    assert main(["train", str(config_path)]) == 0
    told = capsys.readouterr().out
    assert "auto is nf4, as when the run began" in told
    assert "resuming" in told


def test_auto_among_several_processes_is_refused(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(config_path)]) == 2
    assert "Give the bits that `ssdtune plan` prints" in capsys.readouterr().err


def test_a_plan_is_refused_as_training_is_where_an_earlier_version_packed(
    source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(tmp_path, source, text)
    with monkeypatch.context() as earlier:
        earlier.setattr("ssdtune.packing.convert.encoder_of", lambda format: 1)
        older = build_packed(
            source,
            quantization="3",
            beside=tmp_path / "nvme",
            choose_storage=lambda files: choose_storage(files[0]).storage,
        ).folder
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    for verb in ("plan", "train"):
        assert main([verb, str(path), "--quantization", "3"]) == EXIT_USER_ERROR
        assert f"goes on with model_name_or_path: {older}." in capsys.readouterr().err
