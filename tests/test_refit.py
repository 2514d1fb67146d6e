"""What runs found this machine's profile to be off by: how far it is believed, where it is kept, when it goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ssdtune import probe
from ssdtune.profiles import keep_refit, own_profile, own_profile_path, refit_path, save_profile
from ssdtune.schedule.choices import Request
from ssdtune.schedule.cost import Operator, StepWork, Work, predict_step
from ssdtune.schedule.plan import BlockShape, Budgets, Direction, Lane
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.schedule.profile import OPERATORS, Profile, ProfileError
from ssdtune.schedule.refit import MOST, refitted, work_name
from ssdtune.schedule.saved_profile import profile_from

TRAIN = work_name("train", "float32", None)


def a_profile() -> Profile:
    content = {
        "name": "made up",
        "operators": {"float32": {kind: [[1, 1e-9], [10**9, 1.0]] for kind in OPERATORS}},
        "transfers": {"nvme_read": [[1, 1e-9], [10**9, 1.0]]},
    }
    return profile_from(content, "here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))


def own_refit() -> dict[str, dict[str, float]]:
    profile = own_profile()
    assert profile is not None
    return {work: dict(factors) for work, factors in profile.refit.items()}


# ------------------------------------------------------------------ one more run


def test_factors_move_half_of_the_way_and_end_where_runs_agree() -> None:
    true = {"compute": 1.2, "nvme_read": 0.9}
    kept: dict[str, float] = {}
    for num in range(12):
        seconds = {lane: (kept.get(lane, 1.0), factor) for lane, factor in true.items()}
        found = refitted(kept, {"step": (1.0, 1.2), **seconds})
        assert found is not None
        if not num:
            assert found["compute"] == pytest.approx(1.2**0.5, rel=1e-3)
        kept = found
    assert kept == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("off", [1.3, 1 / 1.3])
def test_a_lane_that_is_off_by_too_much_says_nothing_of_any(off: float) -> None:
    compared = {"step": (1.0, 1.0), "compute": (1.0, 1.05), "nvme_read": (0.5, 0.5 * off)}
    assert refitted({}, compared) is None
    nearly = {**compared, "nvme_read": (0.5, 0.5 * off**0.8)}
    assert refitted({}, nearly) is not None
    assert refitted({"nvme_read": off**0.5}, nearly) is None, "runs together go no farther either"


def test_a_lane_with_hardly_any_work_is_left_alone() -> None:
    compared = {"step": (1.0, 1.1), "compute": (1.0, 1.1), "cpu": (0.01, 0.04)}
    assert refitted({}, compared) == {"compute": pytest.approx(1.1**0.5, rel=1e-3)}


def test_a_prediction_has_the_factors_of_its_own_kind_of_step_and_format() -> None:
    shapes = tuple(BlockShape(name=n, slot_bytes=10**6, file_bytes=10**6) for n in "abc")
    plan = make_plan(
        Request(blocks=shapes, orders=plain_orders(3), budgets=Budgets(ram_bytes=2 * 10**6))
    )
    one = [Work({Operator("matmul", 1e6): 1})]
    passes = {(i, d): one for i in range(3) for d in Direction}
    work = StepWork(passes={"train": passes, "forward": passes}, between=Work({}), dtype="float32")
    plain = a_profile()
    factors = {"compute": 1.1, "nvme_read": 0.9}
    found = dataclasses.replace(plain, refit={TRAIN: factors})

    def busy(profile: Profile, kind: str) -> dict[Lane, float]:
        return dict(predict_step(plan, kind, work, profile, num_micro_batches=2).busy_s)

    before, after = busy(plain, "train"), busy(found, "train")
    assert after == pytest.approx({lane: factors[lane] * s for lane, s in before.items()})
    assert busy(found, "forward") == busy(plain, "forward")
    assert work_name("train", "float32", "bfloat16") != TRAIN


# ------------------------------------------------------------------ the file


def test_it_is_kept_beside_the_profile_and_goes_with_it() -> None:
    save_profile(a_profile(), own_profile_path())
    measured = own_profile_path().read_bytes()
    assert own_refit() == {}
    keep_refit(TRAIN, {"compute": 1.08})
    keep_refit("forward bfloat16", {"nvme_read": 0.95})
    assert own_refit() == {TRAIN: {"compute": 1.08}, "forward bfloat16": {"nvme_read": 0.95}}
    keep_refit(TRAIN, {"compute": 1.04})
    assert own_refit()[TRAIN] == {"compute": 1.04}
    assert own_profile_path().read_bytes() == measured, "the probe's figures stay as they are"


def test_a_new_probe_discards_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile(a_profile(), own_profile_path())
    keep_refit(TRAIN, {"compute": 1.08})
    newer = dataclasses.replace(a_profile(), reading_takes=1e-11)
    monkeypatch.setattr(probe, "measure", lambda *given: newer)
    monkeypatch.setattr(probe, "profile_lines", lambda profile: [])
    assert probe.print_probe(tmp_path, own_profile_path()) == 0
    assert own_profile() == newer
    keep_refit("forward float32", {"compute": 0.9})
    assert own_refit() == {"forward float32": {"compute": 0.9}}, "what was older does not come back"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("1.08", str(MOST + 0.01), r"train float32: 'compute' is 1\.26"),
        ("1.08", ".nan", "'compute' is nan"),
        ("compute", "computer", "'computer' is 1.08"),
        ("refit:", "refit: [", "can't read it"),
        ("{compute: 1.08}", "much", "train float32: must be a mapping"),
    ],
)
def test_a_file_that_somebody_spoilt_is_refused(old: str, new: str, words: str) -> None:
    save_profile(a_profile(), own_profile_path())
    keep_refit(TRAIN, {"compute": 1.08})
    text = refit_path().read_text()
    assert old in text
    refit_path().write_text(text.replace(old, new))
    with pytest.raises(ProfileError, match=rf"profile-refit\.yaml.*{words}"):
        own_profile()
