"""The quickstart's options, its numbers, and what it tells a user who errs."""

from pathlib import Path

import pytest

from ssdtune import assets, quickstart
from ssdtune.config import load_config


def job_of(*argv):
    return quickstart.make_job(quickstart.parse_options(argv), Path("/cache"))


def config_of(*argv):
    return load_config(None, job_of(*argv).flags).config


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-1.safetensors").write_bytes(bytes(1000))
    (folder / "model-2.safetensors").write_bytes(bytes(500))
    (folder / "config.json").write_text("{}")
    return folder


def test_it_trains_the_real_model_on_the_reference_by_default():
    config = config_of()
    assert config.model_name_or_path == f"/cache/{assets.MODEL_NAME}"
    assert [source.path for source in config.dataset] == [f"/cache/{assets.TRAIN_NAME}"]
    assert job_of().eval_path == f"/cache/{assets.EVAL_NAME}"


def test_each_quickstart_is_a_fresh_run():
    assert config_of().resume_from_checkpoint is False


def test_options_become_keys():
    config = config_of("--steps", "7", "--ram", "90MB")
    assert (config.max_steps, config.offload.ram) == (7, 90_000_000)


def test_big_is_the_random_model_under_one_gigabyte():
    config = config_of("--big")
    assert config.model_name_or_path.endswith(assets.BIG_MODEL_NAME)
    assert (config.max_steps, config.offload.ram) == (quickstart.BIG_STEPS, 10**9)
    assert config_of("--big", "--ram", "2GB", "--steps", "1").offload.ram == 2 * 10**9
    assert config.output_dir != config_of().output_dir


def test_a_users_own_file_is_not_mixed_with_ours(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}\n')
    config = config_of("--dataset", str(path))
    assert [source.path for source in config.dataset] == [str(path)]
    assert job_of("--dataset", str(path)).eval_path is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset", "/nowhere/rows.jsonl"], "no such file"),
        (["--ram", "lots"], "not a size"),
        (["--ram", "3"], "did you mean 3GB"),
    ],
)
def test_a_slip_is_told_in_a_line_before_anything_is_made(
    argv, words, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    assert quickstart.main(argv) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 4
    assert out == ""
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--epochs", "3"]])
def test_an_option_it_does_not_have_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.parse_options(argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_a_changed_byte_in_a_model_file_is_seen(model_folder):
    before = quickstart.fingerprint(model_folder)
    assert set(before) == {"config.json", "model-1.safetensors", "model-2.safetensors"}
    assert quickstart.fingerprint(model_folder) == before
    with (model_folder / "model-2.safetensors").open("r+b") as file:
        file.seek(321)
        file.write(b"\x01")
    after = quickstart.fingerprint(model_folder)
    assert [name for name in before if after[name] != before[name]] == ["model-2.safetensors"]


def test_only_weight_files_count_as_weights(model_folder):
    assert quickstart.file_num_bytes(model_folder) == 1500


def test_only_the_real_model_on_the_reference_is_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "hello"}\n')
    assert job_of().asks
    assert not job_of("--big").asks
    assert not job_of("--dataset", str(path)).asks


def test_what_to_try_next_does_not_send_in_circles(capsys):
    quickstart.show_next(job_of())
    assert "--big" in capsys.readouterr().out
    quickstart.show_next(job_of("--big"))
    assert "--big" not in capsys.readouterr().out


def test_memory_that_was_held_once_stays_in_the_peak():
    before = quickstart.peak_num_bytes()
    held = bytearray(before + 50_000_000)
    held[::4096] = b"x" * len(held[::4096])
    del held
    assert quickstart.peak_num_bytes() >= before + 50_000_000
