"""Machines that one does not have: the parts, how they are put together, and that the shipped configurations fit the
cards that their names promise."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import tomllib
from pathlib import Path

import pytest

from ssdtune import cli
from ssdtune.config import load_config
from ssdtune.jobs import Jobs, Source
from ssdtune.machines import (
    MachineError,
    devices_known,
    drives_known,
    entries,
    hosts_known,
    machine_from,
)
from ssdtune.planning.ways import decide
from ssdtune.profiles import save_profile
from ssdtune.schedule.cost import Operator
from ssdtune.schedule.machine import DTYPES, MODEL_SHARE, PASS_SHARE, curve
from ssdtune.schedule.outcome import Outcome
from ssdtune.schedule.plan import Direction
from ssdtune.schedule.profile import (
    BUSY_CORES,
    OPERATORS,
    PERTURB,
    PERTURB_SIGNS,
    TRANSFERS,
    ProfileError,
)
from ssdtune.sizes import parse_size

ROOT = Path(__file__).parent.parent
GB = 10**9


@pytest.mark.parametrize("kind", ["devices", "drives", "hosts", "boxes"])
def test_every_part_has_a_source_and_positive_figures(kind: str) -> None:
    for key, entry in entries(kind).items():
        assert entry["source"], key
        assert set(entry["assumed"]) <= set(entry), key
        for name in ("bandwidth", "tflops", "pcie", "watts", "read", "write", "sustained_write"):
            assert float(entry.get(name, 1)) > 0, (key, name)
    names = [str(n).lower() for k, e in entries(kind).items() for n in (k, *e["aliases"])]
    assert len(names) == len(set(names)), "a name stands for one part"


def test_the_parts_go_into_a_wheel() -> None:
    found = {p.name for p in importlib.resources.files("ssdtune.hardware").iterdir()}
    assert {"devices.yaml", "drives.yaml", "hosts.yaml", "boxes.yaml"} <= found
    assert {entry["profile"] for entry in entries("boxes").values()} <= found
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert "*.yaml" in data["ssdtune.hardware"]


@pytest.mark.parametrize("device", devices_known())
def test_every_device_has_whole_and_rising_curves(device: str) -> None:
    profile = machine_from(device).profile
    assert profile is not None
    kinds = (*OPERATORS, PERTURB, PERTURB_SIGNS)
    curves = [profile.operator(dtype, kind) for dtype in DTYPES for kind in kinds]
    curves += [profile.transfer(name) for name in TRANSFERS]
    for each in curves:
        times = [each.seconds(10.0**power) for power in range(3, 14)]
        assert times == sorted(times)
        assert times[0] > 0


def test_a_large_product_runs_at_the_models_share_of_the_published_rate() -> None:
    machine = machine_from("rtx4090")
    assert machine.profile is not None
    seconds = machine.profile.operator("bfloat16", "matmul").seconds(1e14)
    assert seconds == pytest.approx(1e14 / (MODEL_SHARE * 179.2e12), rel=0.01)


@pytest.mark.parametrize("kind", [PERTURB, PERTURB_SIGNS])
def test_perturbing_weights_takes_the_time_of_its_bytes_and_is_said(kind: str) -> None:
    machine = machine_from("rtx4090")
    assert machine.profile is not None
    assert machine.device is not None
    assert machine.device.bandwidth is not None
    seconds = Operator(kind, 1e9).seconds(machine.profile, "bfloat16")
    assert seconds == pytest.approx(4e9 / (PASS_SHARE * machine.device.bandwidth), rel=0.01)
    assert any("perturbing weights" in words for words in machine.assumed)


def test_a_curve_is_latency_and_rate() -> None:
    found = curve(1e9, 1e-5)
    assert found.seconds(1e9) == pytest.approx(1.0, rel=1e-3)
    assert found.seconds(1e4) == pytest.approx(2e-5, rel=1e-6)
    assert found.seconds(1) >= 1e-5


@pytest.mark.parametrize(
    "spec", ["rtx4090+2x990pro+128GB", "128GB + 2X990-Pro + RTX-4090", "4090+128gb+2x990pro"]
)
def test_parts_come_in_any_order_and_spelling(spec: str) -> None:
    machine = machine_from(spec)
    one = drives_known()["990pro"]
    assert machine.device == devices_known()["rtx4090"]
    assert machine.drive.read == 2 * one.read  # type: ignore[operator]
    assert machine.drive.endurance_bytes == 2 * one.endurance_bytes  # type: ignore[operator]
    assert machine.ram_bytes == 128 * GB - hosts_known()["desktop"].reserved_bytes
    assert machine == machine_from("rtx4090+2x990pro+128GB")


def test_what_is_left_out_is_a_desktop_with_one_drive() -> None:
    machine = machine_from("rtx3090")
    assert machine.drive == drives_known()["990pro"]
    assert machine.ram_bytes == 60 * GB
    assert "pcie of RTX 3090" in machine.assumed


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rtx4080+990pro", "Did you mean rtx4090"),
        ("990pro", "0 devices"),
        ("rtx4090+rtx3090", "2 devices"),
        ("rtx4090+2xrtx3090", "no part that is known"),
        ("rtx4090+64", "no part that is known"),
        ("own.yaml+990pro", "takes no other parts"),
        ("epyc-2core+64GB", "takes no other parts"),
    ],
)
def test_a_part_that_is_not_known_is_named_with_the_nearest(spec: str, words: str) -> None:
    with pytest.raises(MachineError, match=words):
        machine_from(spec)


def test_a_measured_machine_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    with pytest.raises(ProfileError, match="can't read it"):
        machine_from(str(path))


def test_a_file_that_was_measured_on_a_device_is_a_machine_with_one(tmp_path: Path) -> None:
    path, profile = tmp_path / "other.yaml", machine_from("rtx4090").profile
    assert profile is not None
    save_profile(dataclasses.replace(profile, device_bytes=22 * GB), path)
    machine = machine_from(str(path))
    assert machine.device_bytes == 22 * GB
    assert machine.is_measured
    path.write_text(path.read_text().replace(f"device_bytes: {22 * GB}", "device_bytes: 23GB"))
    assert machine_from(str(path)).device_bytes == 23 * GB, "as its owner may write it"
    save_profile(profile, path)
    with pytest.raises(MachineError, match="for instance device_bytes: 22GB"):
        machine_from(str(path))
    links = ("h2d", "d2h", "d2d")
    alone = {name: curve for name, curve in profile.transfers.items() if name not in links}
    save_profile(dataclasses.replace(profile, transfers=alone), path)
    assert machine_from(str(path)).device is None


@pytest.mark.parametrize("box", entries("boxes"))
def test_a_whole_machine_has_no_device_and_is_measured(box: str) -> None:
    machine = machine_from(box)
    assert machine.device is None
    assert machine.is_measured
    assert machine.profile is not None
    assert not machine.profile.lacks, "of what a probe measures now"
    assert machine.profile.busy_cores <= BUSY_CORES
    assert {"float32", "bfloat16"} <= machine.profile.operators.keys()
    assert machine.ram_bytes < parse_size(entries("boxes")[box]["ram"])
    assert all(machine_from(alias) == machine for alias in entries("boxes")[box]["aliases"])


def test_the_list_shows_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["hardware"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*devices_known(), *drives_known(), *entries("boxes")])


# ------------------------------------------------------------------ the shipped configurations

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
MODELS = {  # sizes as their config.json on the hub has them
    "llama3-8b-8gb": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-32b-16gb": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama33-70b-24gb": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
}
MODELS |= {
    "llama3-8b-zo-4gb": MODELS["llama3-8b-8gb"],
    "llama33-70b-zo-12gb": MODELS["llama33-70b-24gb"],
    "llama33-70b-qlora-12gb": MODELS["llama33-70b-24gb"],
    "opt-175b-zo-18gb": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 50272,
        "hidden_size": 12288,
        "ffn_dim": 49152,
        "num_attention_heads": 96,
        "num_hidden_layers": 96,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 12288,
    },
}
RAM = {name: 32 if "-8b-" in name else 64 for name in MODELS}
# GB: cards of about so much; else one that computes faster, which is harder to keep busy.
CARDS = dict.fromkeys((4, 12), "rtx3060")


# Of one card's two methods or one method's two cards, one at once: each takes seconds to open and to plan.
SLOW = ("llama33-70b-24gb", "llama3-8b-zo-4gb", "llama33-70b-zo-12gb")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
)
def test_a_shipped_configuration_fits_the_card_in_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
    config = load_config(ROOT / "configs" / f"{name}.yaml", []).config
    source = Source.of(config, str(path), on_device=True)
    job = Jobs(source)()
    billions = float(name.split("-")[1].removesuffix("b"))
    assert job.num_parameters == pytest.approx(billions * 1e9, rel=0.03)
    card = int(name.split("-")[-1].removesuffix("gb"))
    free = int(0.93 * card * GB)
    machine = machine_from(f"{CARDS.get(card, 'rtx4090')}+{RAM[name]}GB")
    assert machine.device is not None
    card_device = dataclasses.replace(machine.device, memory_bytes=free)
    machine = dataclasses.replace(machine, device=card_device)
    first = decide(Jobs(source), machine, config).points[0].found
    assert isinstance(first, Outcome), first
    assert first.peak.device_bytes <= free
    assert first.is_hidden, "so many tokens a step hide the drive"
    if "-zo-" in name:
        assert job.kind == "forward"
        sequence = first.plan.sequences["forward"]
        assert first.read_bytes <= sum(b.file_bytes for b in job.blocks), "each block once a step"
        assert {visit.direction for visit in sequence.visits} == {Direction.FORWARD}
