"""Objectives of generated text: each variant's answers are those of the same weights in memory, drawn ones too."""

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
from support import streamed

from ssdtune.data import CausalCollator
from ssdtune.trainer import TrainerError, ZOTrainer
from ssdtune.trainer.generations import Drawn, Generation, GenerationError, answers, prompts
from ssdtune.zeroth_order import FZOO, MeZO
from ssdtune.zeroth_order.rules import Term

NEW = 4
COLLATE = CausalCollator(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_runs.llama(vocab_size=60), tmp_path_factory.mktemp("model"))


def rows() -> list[dict[str, Any]]:
    """Prompts of three to six tokens, each with a trained one behind, which nobody may see."""
    made = []
    for k in range(8):
        prompt = [5 + (k + j) % 50 for j in range(3 + k % 4)]
        row = {"input_ids": [*prompt, 9], "labels": [*[-100] * len(prompt), 9]}
        made.append({**row, "answer": f"row {k}"})
    return made


def made_trainer(
    model: Any,
    folder: Path,
    generation: Generation | None,
    objective: Any,
    collate: Any = COLLATE,
    **more: Any,
) -> Any:
    """more: arguments that differ."""
    arguments = tiny_runs.arguments(folder, per_device_train_batch_size=2, seed=3, **more)
    trainer = ZOTrainer(
        model,
        arguments,
        collate,
        train_dataset=rows(),
        estimator=MeZO(eps=5e-2),
        objective=objective,
        generation=generation,
    )
    return tiny_runs.in_order(trainer)


def test_prompts_stand_before_the_labels_and_end_together() -> None:
    batch = COLLATE(rows()[:2])
    ids, mask = prompts(batch, 7)
    assert ids.tolist() == [[7, 5, 6, 7], [6, 7, 8, 9]]
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    marked = {**batch, "attention_mask": batch["attention_mask"].bool()}
    assert prompts(marked, 7)[0].equal(ids)
    assert marked["attention_mask"].equal(batch["attention_mask"].bool()), "the batch stays whole"
    alone = {"input_ids": torch.tensor([[5, 9], [6, 9]])}
    assert prompts(alone, 7)[0].tolist() == [[5, 9], [6, 9]]
    with pytest.raises(GenerationError, match="no prompt"):
        prompts({**batch, "labels": batch["input_ids"]}, 0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_variants_answer_as_in_memory(temperature: float, model: Path, tmp_path: Path) -> None:
    how = Generation(max_new_tokens=NEW, temperature=temperature)
    seen: list[list[list[int]]] = []

    def objective(found: list[list[int]], batch: Any) -> list[float]:
        seen.append(found)
        return [float(sum(ids)) for ids in found]

    trainer = made_trainer(streamed(model, micro_batch_size=None), tmp_path, how, objective)
    trainer.train()
    trainer.model.ssdtune.close()
    plain: Any = tiny_models.auto_class("llama").from_pretrained(model).eval()
    directions, parameters = trainer.method.weights.directions, dict(plain.named_parameters())
    expected = []
    for step, update in enumerate(trainer.method.weights.updates):
        pristine = {n: p.clone() for n, p in parameters.items()}
        groups = [COLLATE(rows()[4 * step + 2 * k : 4 * step + 2 * k + 2]) for k in range(2)]
        for scale in (5e-2, -5e-2):
            for name, p in parameters.items():
                directions.make(p.data, pristine[name], name, Term(step, 0, scale))
            for batch in groups:
                made = answers(plain, batch, how, seed=3, step=step, pad_token_id=0)
                expected.append(made.tolist())
        for name, p in parameters.items():
            p.data.copy_(pristine[name])
            directions.apply(p.data, name, [update])
    assert len(seen) == 2 * 2 * 2
    assert sorted(seen) == sorted(expected)
    assert trainer.method.num_steps == 2


@pytest.mark.parametrize("how", [None, Generation(max_new_tokens=2)], ids=["output", "answers"])
def test_an_objective_sees_the_references_that_a_batch_has(
    how: Generation | None, model: Path, tmp_path: Path
) -> None:
    """Texts and numbers that forward knows nothing of; nor does evaluation, by the model's own loss."""
    asked: list[str] = []
    taken: set[str] = set()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [row["answer"] for row in rows]
        gold = torch.tensor([[len(answer) for answer in answers]])
        return {"answers": answers, "gold": gold, **COLLATE(rows)}

    def objective(judged: Any, batch: Any) -> torch.Tensor:
        assert batch["gold"].shape == (1, len(batch["answers"])) == (1, 2)
        assert len(judged if how else judged.logits) == 2
        asked.extend(batch["answers"])
        return batch["gold"][0]

    base: Any = streamed(model)
    forward = base.forward.inner

    @functools.wraps(forward)
    def watched(*args: Any, **given: Any) -> Any:
        taken.update(given)
        return forward(*args, **given)

    base.forward = watched
    trainer = made_trainer(
        base, tmp_path, how, objective, collate, remove_unused_columns=False, max_steps=1
    )
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    base.ssdtune.close()
    assert sorted(asked) == sorted([f"row {k}" for k in range(4)] * 2), "of both variants"
    assert trainer.last_step.loss == -len("row 0")
    assert {"input_ids", "labels"} <= taken
    assert not {"answers", "gold"} & taken


@pytest.mark.parametrize("name", tiny_models.SEQ2SEQ)
def test_a_decoder_answers_all_that_its_encoder_reads(name: str, tmp_path: Path) -> None:
    """Padded as it comes: not every encoder knows its positions by the mask. Of FZOO's variants the first is the model."""
    folder = tiny_models.save(tiny_models.build(name), tmp_path / "model")
    batch, seen = tiny_models.batch(name, 2, 7), []
    batch["attention_mask"][0, 5:] = 0

    def objective(found: list[list[int]], batch: Any) -> list[float]:
        seen.append(found)
        return [float(sum(ids)) for ids in found]

    base: Any = streamed(folder, micro_batch_size=None)
    trainer = ZOTrainer(
        base,
        tiny_runs.arguments(tmp_path / "run", per_device_train_batch_size=2, max_steps=1),
        lambda rows: dict(batch),
        train_dataset=rows()[:2],
        estimator=FZOO(eps=5e-2, num_directions=2),
        objective=objective,
        generation=Generation(max_new_tokens=NEW),
    )
    trainer.train()
    base.ssdtune.close()
    plain: Any = tiny_models.auto_class(name).from_pretrained(folder).eval()
    mask = batch["attention_mask"]
    made = plain.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=NEW)
    assert made[:, 1:].tolist() in seen
    assert len(seen) == 3


def test_what_no_answer_is_made_of_is_refused(model: Path, tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        made = COLLATE(rows)
        return {**made, "position_ids": made["attention_mask"].cumsum(1) - 1}

    base: Any = streamed(model)
    how, objective = Generation(max_new_tokens=2), lambda found, batch: [0.0] * len(found)
    trainer = made_trainer(base, tmp_path, how, objective, collate, max_steps=1)
    with pytest.raises(TrainerError, match="has position_ids besides"):
        trainer.train()
    base.ssdtune.close()


def test_what_is_drawn_is_drawn_again_and_follows_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(4000, 3)
    ids = torch.zeros(4000, 5, dtype=torch.long)
    first, again, other = (Drawn(key, 0.5)(ids, logits).argmax(-1) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    shares = torch.bincount(first, minlength=3) / 4000
    assert torch.allclose(shares, (logits[0] / 0.5).softmax(-1), atol=0.03)


def test_what_makes_no_answer_is_refused() -> None:
    with pytest.raises(GenerationError, match="max_new_tokens is 0"):
        Generation(max_new_tokens=0)
    with pytest.raises(GenerationError, match="temperature -1"):
        Generation(temperature=-1.0)
