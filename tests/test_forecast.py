"""Before the first step a run says what it will hold, saves RAM where it is short, and reserves its disk."""

import errno
import os
from pathlib import Path

import pytest
import support
import tiny_models
import torch

from ssdtune.data import CausalCollator
from ssdtune.profiles import own_profile_path, save_profile
from ssdtune.schedule.memory import INPUTS, Peak
from ssdtune.schedule.plan import Tier
from ssdtune.schedule.profile import OPERATORS
from ssdtune.schedule.saved_profile import profile_from
from ssdtune.swap.scratch import ScratchError
from ssdtune.trainer import SSDConfig, SSDTrainer
from ssdtune.trainer import forecast as forecast_module
from ssdtune.trainer.forecast import Rehearsals, forecast, schedule_of
from ssdtune.visit.memory import HeapKeeper, resident_set_bytes
from ssdtune.visit.rehearsal import rehearse

ROWS, LENGTH, MICRO = 2, 12, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    tiny_models.save(tiny_models.build("llama", dtype=torch.float32), made)
    return made


@pytest.fixture
def make(folder: Path, tmp_path: Path):
    """A trainer of a streamed model whose block inputs lie on the tier; closed after the test."""
    opened = []

    def trainer(tier: Tier = Tier.DEVICE, optim: str = "adamw_torch") -> SSDTrainer:
        options = {"block_inputs": tier, "scratch": tmp_path}
        model = support.streamed(folder, factor=2.3, options=options)
        opened.append(model)
        args = SSDConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=MICRO,
            optim=optim,
            report_to="none",
            use_cpu=True,
        )
        rows = [{"input_ids": [3] * LENGTH, "labels": [3] * LENGTH}] * ROWS * MICRO
        return SSDTrainer(support.with_lora(model), args, CausalCollator(0), train_dataset=rows)

    yield trainer
    for model in opened:
        model.ssdtune.close()


def predicted(trainer: SSDTrainer) -> tuple[Peak, list[str]]:
    lines: list[str] = []
    base = resident_set_bytes()
    return forecast(
        Rehearsals(trainer), longest_row=LENGTH, base_bytes=base, say=lines.append
    ), lines


def test_a_peak_is_said_with_the_parts_that_matter(make) -> None:
    peak, lines = predicted(make())
    assert lines[0].startswith("peak      ")
    assert "RAM predicted (rehearsed" in lines[0]
    assert "RAM: process before the model" in lines[1]
    assert peak.ram[INPUTS] >= MICRO * ROWS * LENGTH * 4
    assert len(lines) == 2, "there is RAM enough: no warning"


def test_optimizers_without_states_take_less(make) -> None:
    adam, sgd = predicted(make())[0], predicted(make(optim="sgd"))[0]
    assert adam.ram["optimizer states"] == 2 * adam.ram["adapters"] > 0, "two each"
    assert sgd.ram["optimizer states"] == 0


@pytest.mark.parametrize(("free", "is_held", "warns"), [(10**12, False, False), (1, True, True)])
def test_the_heap_is_held_to_it_where_ram_is_short(
    make, monkeypatch: pytest.MonkeyPatch, free: int, is_held: bool, warns: bool
) -> None:
    monkeypatch.setattr(forecast_module, "free_ram", lambda: free)
    trainer = make()
    _, lines = predicted(trainer)
    assert isinstance(trainer.streamer.before_pass, HeapKeeper) == is_held
    assert any("warning" in line and "offload.ram" in line for line in lines) == warns


def test_room_for_block_inputs_is_reserved_before_the_first_step(make) -> None:
    trainer = make(Tier.NVME)
    peak, lines = predicted(trainer)
    assert "of NVMe" in lines[0]
    assert INPUTS not in peak.ram
    assert trainer.streamer.input_store.reserved_bytes >= peak.nvme[INPUTS] > 0


def test_a_full_drive_is_an_error_before_the_first_step(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(Tier.NVME)

    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer.streamer.input_store.file.num_bytes = 0
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ScratchError, match="No space left"):
        predicted(trainer)


def test_a_step_is_predicted_where_the_machine_was_measured(
    make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make()
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    assert schedule_of(Rehearsals(trainer), [LENGTH] * 6) is None
    rate = [[1, 1e-9], [10**9, 1.0]]  # a FLOP or byte takes a nanosecond
    content = {
        "name": "slow",
        "operators": {"float32": dict.fromkeys(OPERATORS, rate)},
        "transfers": {"nvme_read": rate, "unpack": rate},
    }
    save_profile(profile_from(content, "here"), own_profile_path())
    schedule = schedule_of(Rehearsals(trainer), [LENGTH, 2, 3, LENGTH - 2])
    assert schedule is not None
    found = schedule.predicted()
    padded = rehearse(trainer.model, {"input_ids": torch.zeros(ROWS, LENGTH - 1, dtype=torch.long)})
    assert padded.work is not None
    flop = sum(w.flop for works in padded.work.passes["train"].values() for w in works)
    assert found.busy_s["compute"] > MICRO * flop * 1e-9
    assert found.step_s >= found.two_pass_s * 0.8
    assert f"a step of {ROWS * (LENGTH - 1) * MICRO} tokens" in next(schedule.lines())


def test_a_run_that_autocasts_is_rehearsed_so(make) -> None:
    trainer = make()
    plain = Rehearsals(trainer)(LENGTH).work
    trainer.args.bf16 = True
    cast = Rehearsals(trainer)(LENGTH).work
    assert plain is not None
    assert cast is not None
    assert (plain.autocast, cast.autocast) == (None, "bfloat16")
    assert cast.dtype == plain.dtype == "float32"
