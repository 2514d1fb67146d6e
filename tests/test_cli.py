"""The command line answers at once, prints messages instead of tracebacks, and hands over."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ssdtune import cli, planning
from ssdtune.config import Loaded, TrainConfig
from ssdtune.errors import SSDTuneError
from ssdtune.settings import walk_settings

ROOT = Path(__file__).parent.parent
CONFIG = "model_name_or_path: some/model\ndataset: chats.jsonl\noutput_dir: runs/x\n"


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def calls(monkeypatch):
    """What each verb handed over: the functions behind the verbs are replaced by recorders, mostly with their modules."""
    received: dict[str, tuple] = {}

    def recorder(function_name: str):
        def record(*args, **kwargs):
            received[function_name] = (args, kwargs)
            return received.get("result")

        return record

    def stand_in(module_name: str, function_name: str) -> None:
        module = ModuleType(module_name)
        setattr(module, function_name, recorder(function_name))
        monkeypatch.setitem(sys.modules, module_name, module)

    stand_in("ssdtune.trainer", "train_from_config")
    monkeypatch.setattr(planning, "print_plan", recorder("print_plan"))
    stand_in("ssdtune.doctor", "print_doctor")
    stand_in("ssdtune.generate", "generate_from_run")
    return received


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ssdtune", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False, **options
    )


def childrens_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["doctor", "-h"]]
)
def test_help_and_version_answer_within_half_a_second(words):
    """Of the processor's: the machine may be busy with something else."""
    seconds = []
    for _ in range(3):
        before = childrens_cpu_seconds()
        result = run(*words)
        seconds.append(childrens_cpu_seconds() - before)
        assert result.returncode == 0
        assert result.stderr == ""
        assert "ssdtune" in result.stdout
    assert min(seconds) < 0.5


def test_no_heavy_module_is_imported_before_a_verb_needs_it():
    script = (
        "import sys\nfrom ssdtune.cli import main\nmain(['train', '--help'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'peft'} & set(sys.modules)\n"
        "sys.exit(len(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0


def test_help_of_train_lists_every_key(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for key, _ in walk_settings(TrainConfig):
        assert f"--{key} " in shown


def test_help_names_every_verb(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"ssdtune {verb} " in shown for verb in cli.VERBS)


@pytest.mark.parametrize(
    ("verb", "function"), [("train", "train_from_config"), ("plan", "print_plan")]
)
def test_file_and_flags_reach_the_verb(calls, config_path, verb, function):
    assert cli.main([verb, str(config_path), "--lora_r", "32", "--offload.ram", "300MB"]) == 0
    ((loaded, *_), _) = calls[function]
    assert isinstance(loaded, Loaded)
    assert loaded.path == config_path
    assert (loaded.config.lora_r, loaded.config.offload.ram) == (32, 300 * 10**6)


def test_train_works_from_flags_alone(calls):
    flags = ["--model_name_or_path", "m", "--dataset", "d.jsonl", "--output_dir", "o"]
    assert cli.main(["train", *flags]) == 0
    assert calls["train_from_config"][0][0].path is None


def test_what_a_plan_is_asked_for_besides_is_handed_over(calls, config_path):
    words = ["--hardware", "rtx4090", "--hardware=h100", "--json", "--price-per-hour", "0.4"]
    assert cli.main(["plan", str(config_path), *words, "--price_per_kwh=0.3"]) == 0
    (_, wanted), _ = calls["print_plan"]
    assert wanted.hardware == ["rtx4090", "h100"]
    assert wanted.as_json
    assert (wanted.prices.per_hour, wanted.prices.per_kwh) == (0.4, 0.3)


def test_the_verbs_exit_code_is_the_commands(calls, config_path):
    calls["result"] = 7
    assert cli.main(["train", str(config_path)]) == 7
    calls["result"] = object()  # a result that is no exit code is success
    assert cli.main(["train", str(config_path)]) == 0


def test_doctor_takes_a_path_or_none(calls, tmp_path):
    assert cli.main(["doctor"]) == 0
    assert calls["print_doctor"][0] == (None,)
    assert cli.main(["doctor", str(tmp_path)]) == 0
    assert calls["print_doctor"][0] == (tmp_path,)


def test_generate_hands_over_prompts_and_overrides(calls):
    words = ["generate", "runs/x", "-p", "Hello", "-p", "You", "--offload.ram", "1GB"]
    assert cli.main([*words, "--max-new-tokens", "5"]) == 0
    args, kwargs = calls["generate_from_run"]
    assert args == (Path("runs/x"), ["Hello", "You"])
    assert kwargs == {"max_new_tokens": 5, "overrides": ["--offload.ram", "1GB"]}


def test_notes_are_printed_once_however_many_processes_run(calls, config_path, capsys, monkeypatch):
    config_path.write_text(CONFIG + "lora_rank: 3\n")
    assert cli.main(["train", str(config_path)]) == 0
    assert capsys.readouterr().out == f"note: {config_path}:4: lora_rank: read as lora_r\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", str(config_path)]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "says", "remedy"),
    [
        (["tarin", "x.yaml"], "'tarin' is no verb", "Did you mean `ssdtune train`?"),
        (["x.yaml"], "'x.yaml' is no verb", "Did you mean `ssdtune train x.yaml`?"),
        (["merge", "runs/x"], "merge: not supported yet", "Now: train, plan"),
        (["--lora_r", "3"], "'--lora_r' is no verb", "`ssdtune --help`"),
        (["train"], "no configuration was given", "configs/quickstart.yaml"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot read it", "the path of a YAML file"),
        (["train", "{config}", "--lora_rnak", "3"], "lora_rnak: ssdtune has no", "lora_r"),
        (["train", "{config}", "extra"], "'extra' is neither a flag", "`--lora_r 32`"),
        (["doctor", "a", "b"], "one path at most", "ssdtune doctor /path"),
        (["generate", "r", "-p", "x", "--max_new_tokens", "0"], "max_new_tokens: got 0", "64"),
    ],
)
def test_a_wrong_command_is_a_message_with_a_remedy(
    calls, config_path, capsys, words, says, remedy
):
    words = [word.replace("{config}", str(config_path)) for word in words]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert remedy in captured.err
    assert captured.err.count("\n") <= 4
    assert captured.out == ""
    assert not set(calls) & {"train_from_config", "print_doctor", "generate_from_run"}


def test_an_error_of_a_verb_is_printed_and_our_own_bugs_are_not_hidden(config_path, monkeypatch):
    def fails(error):
        def body(words):
            raise error

        return body

    monkeypatch.setattr(cli, "VERBS", {"train": fails(SSDTuneError("the drive is full"))})
    assert cli.main(["train"]) == 2
    monkeypatch.setattr(cli, "VERBS", {"train": fails(KeyboardInterrupt())})
    assert cli.main(["train"]) == 130
    monkeypatch.setattr(cli, "VERBS", {"train": fails(AssertionError("ours"))})
    with pytest.raises(AssertionError):
        cli.main(["train"])


def test_a_wrong_file_ends_a_process_with_code_2_and_no_traceback(config_path):
    config_path.write_text(CONFIG + "lora_rnak: 3\n")
    result = run("train", str(config_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {config_path}:4: lora_rnak: ssdtune has no such key.\n"
        "Did you mean lora_r (also called lora_rank)? `ssdtune train --help` lists them all.\n"
    )


def test_a_reader_that_closes_early_is_no_error():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m ssdtune train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stderr == ""
    assert result.returncode == 0


def test_the_launch_script_is_the_train_verb(calls, config_path):
    script = ROOT / "launch" / "train.py"
    if not script.exists():
        pytest.skip("launch/train.py is not there")
    namespace: dict = {"__name__": "launch_train"}
    exec(compile(script.read_text(), str(script), "exec"), namespace)
    words = namespace["train_arguments"](["--lora_r", "3", "--config", str(config_path)])
    assert cli.main(words) == 0
    assert calls["train_from_config"][0][0].config.lora_r == 3
