"""What a rehearsal counts: operators of a visit, for a streamed model and for one that has no weights yet."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import tiny_models
import torch
from support import with_lora
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssdtune.schedule.cost import Operator
from ssdtune.schedule.plan import Budgets, Direction
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.build import build_meta
from ssdtune.visit.counting import WorkCounter
from ssdtune.visit.draft import draft
from ssdtune.visit.outline import write_outline
from ssdtune.visit.rehearsal import rehearse, rehearse_draft


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_models.save(tiny_models.build("llama", dtype=torch.float32), tmp_path)
    return tmp_path


def test_a_counter_knows_products_attention_and_passes_over_values() -> None:
    x, w = torch.randn(6, 8), torch.randn(8, 4)
    q = torch.randn(1, 2, 16, 8)
    with WorkCounter() as counter:
        y = (x @ w).t()
        torch.exp(y)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.nn.functional.embedding(torch.tensor([1, 2]), torch.randn(1000, 4))
        torch.nn.functional.linear(x, torch.randn(3, 8))
    kinds = {op.kind: op.size for op in counter.counts}
    assert counter.counts[Operator("matmul", 2.0 * 6 * 8 * 4, 4.0 * (48 + 32 + 24), 6)] == 1
    assert kinds["matmul_transposed"] == 2 * 6 * 8 * 3
    assert counter.counts[Operator("special", 2.0 * 4 * 24)] == 1
    assert kinds["attention"] == 4 * 2 * 16 * 16 * 8 / 2
    assert counter.counts[Operator("pointwise", 2.0 * 2 * 4 * 4)] == 1, (
        "a lookup reads no whole table"
    )


MODELS = [
    *"llama gpt2 gemma3 mixtral t5 gemma3_vlm".split(),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "qwen3_moe", "bart")),
]


@pytest.mark.parametrize("name", MODELS)
def test_products_of_a_step_are_those_that_torch_counts(
    name: str, tmp_path: Path, stream: Callable[..., Any]
) -> None:
    """All visits of a micro-batch against FlopCounterMode around the model in memory, and the layers' forward again."""
    base = tiny_models.build(name, dtype=torch.float32)
    tiny_models.save(base, tmp_path)
    model = stream(tmp_path, model_class=type(base), micro_batch_size=2)
    adapted = with_lora(model, tiny_models.lora_targets(base))
    batch = tiny_models.batch(name, 2, 16)
    work = rehearse(adapted, batch).work
    assert work is not None
    counted = sum(
        size * number
        for works in work.passes["train"].values()
        for each in works
        for (kind, size, *_), number in each.operators.items()
        if kind.startswith("matmul")
    )
    if hasattr(base.config, "num_local_experts") or hasattr(base.config, "num_experts"):
        base.set_experts_implementation(
            "eager"
        )  # one after the other: torch counts no grouped products
    plain = with_lora(base, tiny_models.lora_targets(base))
    with FlopCounterMode(display=False) as forward:
        loss = plain(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    answered = batch["labels" if name in tiny_models.SEQ2SEQ else "input_ids"]
    head = 2 * answered.numel() * base.get_output_embeddings().weight.numel()
    wanted = 2 * forward.get_total_flops() - head + backward.get_total_flops()
    # The first block's input needs no gradient, which a rehearsed block of its kind has. What lies between a tower and
    # the text model is no block.
    least = 0.9 if name in tiny_models.VISION else 0.98
    assert least * wanted <= counted <= 1.25 * wanted


def test_large_results_are_counted_as_fresh_memory_once_each() -> None:
    """Results of 32 MiB and more are mapped anew by the C library; what is written in place, or a view, is not."""
    with FakeTensorMode(), WorkCounter() as counter:
        large = torch.empty(2**23)
        small = torch.empty(2**10)
        _ = large * 2
        _ = large.view(2, -1)
        large.add_(1)
        _ = small * 2
    fresh = {key: n for key, n in counter.counts.items() if key.kind == "fresh"}
    assert fresh == {Operator("fresh", 4.0 * 2**23): 2}, "the tensor itself and the product"


def test_a_model_without_weights_is_counted_like_the_streamed_one(
    llama: Path, stream: Callable[..., Any]
) -> None:
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    streamed = rehearse(with_lora(stream(llama, micro_batch_size=2)), batch)
    meta = build_meta(llama)
    options = support.cpu_options(choose_storage(llama).storage, Budgets(ram_bytes=10**8))
    drafted = draft(meta, options)
    with torch.device("meta"):
        adapted = with_lora(meta.model)
    plain = rehearse_draft(adapted, drafted, options, batch)
    assert plain.work is not None
    assert streamed.work is not None
    assert plain.work.passes == streamed.work.passes
    assert plain.work.between == streamed.work.between
    assert plain.footprint == streamed.footprint
    assert all(p.is_meta for p in meta.model.parameters()), "it is as it was"
    assert "forward" not in vars(drafted.points[1].module)


def test_forward_alone_has_no_gradient_of_the_loss(llama: Path, stream: Callable[..., Any]) -> None:
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    work = rehearse(with_lora(stream(llama, micro_batch_size=2)), batch).work
    assert work is not None
    train, alone = work.passes["train"], work.passes["forward"]
    head = next(k for k in train if train[k] != alone[k])
    assert head[1] is Direction.FORWARD
    assert train[head][-1].flop == 2 * alone[head][-1].flop


@pytest.mark.parametrize("name", ["bart", "t5", "gemma3_vlm"])
def test_towers_and_both_halves_of_an_encoder_decoder_have_times_and_bytes(
    name: str, tmp_path: Path
) -> None:
    """All blocks' visits are counted, and none by formula."""
    base = tiny_models.build(name, dtype=torch.float32)
    tiny_models.save(base, tmp_path)
    meta = build_meta(tmp_path)
    options = support.cpu_options(choose_storage(tmp_path).storage, Budgets(ram_bytes=10**8))
    drafted = draft(meta, options)
    with torch.device("meta"):
        adapted = with_lora(meta.model, tiny_models.lora_targets(base))
    found = rehearse_draft(adapted, drafted, options, tiny_models.batch(name, 2, 16))
    assert found.footprint.how.startswith("rehearsed")
    assert found.work is not None
    likely = drafted.replanner.request.orders["forward"]
    visits = {key: len(works) for key, works in found.work.passes["forward"].items()}
    assert {key for key in visits if key[1] is Direction.FORWARD} == set(likely)
    # A tied embedding is met on both sides and in the head, and may be a point that nobody calls besides.
    assert all(visits[key] <= n for key, n in Counter(likely).items())
    size = meta.config.get_text_config().hidden_size * 2 * 8 * 4  # two rows, eight tokens
    assert found.footprint.kept_bytes >= 4 * size
    assert all(found.work.behind[block] for block in range(1, len(drafted.groups)))


def test_images_are_not_asked_for_where_rows_are_text(tmp_path: Path) -> None:
    base = tiny_models.build("gemma3_vlm", dtype=torch.float32)
    tiny_models.save(base, tmp_path)
    meta = build_meta(tmp_path)
    options = support.cpu_options(choose_storage(tmp_path).storage, Budgets(ram_bytes=10**8))
    drafted = draft(meta, options)
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    work = rehearse_draft(meta.model, drafted, options, batch).work
    assert work is not None
    names = [group.label for group in drafted.groups]
    visited = {names[block] for block, _ in work.passes["train"]}
    assert not any("vision" in name for name in visited)


@pytest.mark.parametrize("name", ["llama", "bart", "gemma3_vlm"])
def test_a_config_alone_stands_for_a_model_of_its_kind(name: str, tmp_path: Path) -> None:
    """Encoder, decoder and tower are all in the outline that is made of it."""
    base = tiny_models.build(name, dtype=torch.float32)
    base.config.save_pretrained(tmp_path)
    write_outline(tmp_path / "config.json", tmp_path / "outline")
    meta = build_meta(tmp_path / "outline")
    assert type(meta.model) is type(base)
    shapes = {n: p.shape for n, p in base.named_parameters()}
    assert {n: p.shape for n, p in meta.model.named_parameters()} == shapes
