"""The README's lines of zeroth-order training, as they stand there, on a tiny model."""

import re
from pathlib import Path

import pytest
import tiny_runs
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent


@pytest.mark.slow  # streams by the front door, whose check of the architecture takes seconds
def test_a_run_without_a_backward_and_its_weights_at_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (lines,) = (each for each in found if "ZOTrainer" in each)
    for there, here in (("max_steps=500", "max_steps=3"), ("num_steps=300", "num_steps=2")):
        assert lines.count(there) == 1
        lines = lines.replace(there, here)
    tiny_runs.save(tiny_runs.llama(), tmp_path / "path/to/model")
    rows = Dataset.from_list([{key: [5, 6, 7, 8] for key in ("input_ids", "labels")}] * 24)
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "README.md", "exec"), {"rows": rows})
    base, at, now = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder).get_parameter("lm_head.weight")
        for folder in ("path/to/model", "at-300", "now")
    )
    assert not torch.equal(base, at)
    assert not torch.equal(at, now)
