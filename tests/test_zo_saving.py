"""What `save_pretrained` makes of a model whose weights a run of forward passes has moved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_runs
import torch
from test_zo_trainer import SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssdtune.errors import SSDTuneError
from ssdtune.run_files import LOG_NAME
from ssdtune.trainer import ZOTrainer
from ssdtune.visit.saving import SaveError
from ssdtune.zeroth_order import LOZO, Fold, read_log, replayed

Stream = Callable[..., Any]


def base(folder: Path, dtype: torch.dtype) -> Path:
    return tiny_runs.save(tiny_runs.llama(dtype=dtype, **SIZES), folder)


def train(model: Any, folder: Path, **more: Any) -> ZOTrainer:
    """Five steps of all weights. more: of a ZOTrainer."""
    trainer = ZOTrainer(
        model,
        tiny_runs.arguments(folder, max_steps=5, per_device_train_batch_size=2),
        lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
        train_dataset=[{key: [5, 6, 7, k] for key in ("input_ids", "labels")} for k in range(6)],
        **more,
    )
    trainer.train()
    return trainer


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["all", "masters", "low_rank"])
def test_the_weights_as_they_are_now_are_loaded_again(
    kind: str, stream: Stream, tmp_path: Path
) -> None:
    """Steps that no block has taken yet among them, amid a window; those of its log at any step, too."""
    folder = base(tmp_path / "base", torch.bfloat16)
    before = support.digests(folder)
    more: dict[str, Any] = {
        "all": {"fold": Fold(tmp_path, 2)},
        "masters": {"master": True},
        "low_rank": {"low_rank": True, "estimator": LOZO(rank=2, window=3)},
    }[kind]
    # Of the smallest RAM, which is for weights of 16 bits.
    factor = 4.2 if kind == "masters" else 1.0
    model = stream(folder, factor=factor)
    train(model, tmp_path / "run", **more)
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new")
    now = {name: t.clone() for name, t in model.state_dict().items()}
    new, old = loaded(tmp_path / "new"), loaded(folder)
    assert new.dtype == torch.bfloat16
    support.assert_equal(now, new.state_dict(), "weights")
    assert not any(torch.equal(t, now[n]) for n, t in old.state_dict().items() if "norm" not in n)
    assert AutoTokenizer.from_pretrained(tmp_path / "new").eos_token == "<|im_end|>"

    log = read_log((tmp_path / "run" / LOG_NAME).read_bytes(), "log")
    for num_steps, wanted in ((5, new), (0, old)):
        again = stream(folder, factor=factor)
        replayed(again, log, num_steps=num_steps)
        out = tmp_path / f"at {num_steps}"
        again.save_pretrained(str(out))
        support.assert_equal(wanted.state_dict(), loaded(out).state_dict(), f"{num_steps} steps")
    assert support.digests(folder) == before


def test_the_config_is_the_models_own(stream: Stream, tmp_path: Path) -> None:
    """Files of bfloat16 that train in float32 are read back to the bit by whoever asks for no dtype."""
    folder = base(tmp_path / "base", torch.bfloat16)
    model = stream(folder, dtype=torch.float32)
    train(model, tmp_path / "run")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "new")
    new = loaded(tmp_path / "new")
    assert new.dtype == torch.float32
    assert new.generation_config.max_new_tokens == 7
    assert json.loads((tmp_path / "new" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name).clone(), new.get_parameter(name))


def test_nothing_that_is_there_is_written_over(stream: Stream, tmp_path: Path) -> None:
    folder = base(tmp_path / "base", torch.float32)
    before, model = support.digests(folder), stream(folder)
    with pytest.raises(SSDTuneError, match="unchanged"):
        model.save_pretrained(tmp_path / "new")
    trainer = train(model, tmp_path / "run")
    for taken in (folder, tmp_path / "run"):
        with pytest.raises(SaveError, match="is there already"):
            model.save_pretrained(taken)
    with pytest.raises(SSDTuneError, match=r"save_pretrained\(max_shard_size\)"):
        model.save_pretrained(tmp_path / "new", max_shard_size="1MB")
    assert support.digests(folder) == before
    assert not (tmp_path / "new").exists()
    trainer.release()


def test_of_several_processes_the_first_one_writes(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them call `save_pretrained` with the same folder, as of any model of transformers."""
    model = stream(base(tmp_path / "base", torch.float32))
    trainer = train(model, tmp_path / "run")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        model.save_pretrained(tmp_path / "new")
        assert (tmp_path / "new").exists() == (rank == 0)
    trainer.release()


def test_a_base_whose_adapter_was_trained_is_not_saved(stream: Stream, tmp_path: Path) -> None:
    model = support.with_lora(stream(base(tmp_path / "base", torch.float32)))
    train(model, tmp_path / "run")
    with pytest.raises(SSDTuneError, match="Save the adapter instead"):
        model.get_base_model().save_pretrained(tmp_path / "new")
