"""The quickstart's options, its numbers, what it tells a user who errs, and all of it on a tiny model."""

import re
from pathlib import Path

import pytest
import support
import tiny_runs

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


# ------------------------------------------------------------------ the whole of it


@pytest.mark.slow  # two answers, two evaluations, two steps
def test_it_asks_trains_asks_again_and_leaves_a_table_and_two_pictures(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    model = tiny_runs.save(tiny_runs.llama(), tmp_path / "model")
    rows, held_out = (
        tiny_runs.write_rows(tmp_path / f"{name}.jsonl", tiny_runs.texts(8))
        for name in ("rows", "eval")
    )
    wanted = {
        "model_name_or_path": model,
        "dataset": rows,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "offload.ram": "500KB",
    }
    job = quickstart.Job(
        model=model,
        output=tmp_path / "run",
        flags=tuple(word for key, value in wanted.items() for word in (f"--{key}", str(value))),
        eval_path=str(held_out),
        is_big=False,
    )
    before = support.digests(model)
    monkeypatch.chdir(Path(__file__).parent.parent)  # its configuration is in the checkout
    with tiny_runs.own_datasets_cache(tmp_path / "cache"):
        quickstart.run(job)
    told = capsys.readouterr().out
    for line in (
        r"training  bfloat16 [\d.]+ GFLOP/s, float32 [\d.]+ GFLOP/s: computing in (bfloat16|float32)",
        rf"before training: {quickstart.QUESTION}",
        rf"after training: {quickstart.QUESTION}",
        r"\nloss +\d\.\d+ → \d\.\d+",
        r"\nheld-out loss +\d\.\d+ → \d\.\d+",
        r"\nspeed +[\d,]+ tokens/s, \d+\.\d+ s a step",
        r"\nmemory +weights .* when all are in memory.*, 500 KB allowed here \(\d+%\)",
        r"\nlanes busy .*compute \d+\.\d%",
        r"\nstep / limit +\d+\.\d+ × the time that",
        r"\nread +.* a step from the model's own files, \d+\.\d+ s waited for it",
        r"\nmodel files +untouched",
        rf"\npictures +{job.output}/loss\.png +{job.output}/timeline\.png",
    ):
        assert re.search(line, told), (line, told)
    for name in ("loss.png", "timeline.png"):
        assert (job.output / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (job.output / "adapter_model.safetensors").is_file()
    assert support.digests(model) == before
