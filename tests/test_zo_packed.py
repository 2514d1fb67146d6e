"""Zeroth-order training on a packed base whose slots stay packed: the bits of training in memory, written plainly."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_zeroth_order
import tiny_models
import torch
from support import digests, num_misses, with_lora
from test_packing import FORMATS, NORM, flip_a_bit, make_pair
from test_zeroth_order import ESTIMATORS, FEW, NUM_STEPS, SEED, InMemory, all_weights, train_both
from test_zeroth_order_work import step

from ssdtune.kernels import philox, unpack_add
from ssdtune.kernels.affine import Affine, join_slices, zero_of
from ssdtune.schedule.plan import Lane
from ssdtune.schedule.profile import DECODE, PERTURB
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.build import build_meta
from ssdtune.zeroth_order import Fold, ZerothOrder, packed, updates
from ssdtune.zeroth_order.packed import KEPT, MOVED, PackedError

Stream = Callable[..., Any]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[type, int]]:
    """Format and number of moves of every tensor that was decoded and moved in one pass, as it happens."""
    seen: list[tuple[type, int]] = []

    def watched(format: Any, parts: Any, out: torch.Tensor, moves: Sequence[Any]) -> None:
        seen.append((type(format), len(moves)))
        unpack_add.unpack_add(format, parts, out, moves)

    monkeypatch.setattr(packed, "unpack_add", watched)
    return seen


def assert_same_weights(pair: Any, trained: dict[str, torch.Tensor]) -> None:
    for key, value in trained.items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key


@pytest.mark.parametrize(
    ("kind", "estimator", "num_steps"),
    [
        ("4", "mezo", 3),
        ("4", "mezo", NUM_STEPS),
        ("nf4", "fzoo", 2),
        ("4", "lozo", 2),
        *(
            pytest.param(kind, "mezo", 3, marks=pytest.mark.slow)
            for kind in ("3", "8", "mxfp4", "nvfp4", "fp8", "lossless")
        ),
    ],
)
def test_weights_that_are_kept_packed_train_as_decoded_ones(
    kind: str,
    estimator: str,
    num_steps: int,
    tmp_path: Path,
    stream: Stream,
    fused: list[tuple[type, int]],
) -> None:
    """All weights, from the log's steps; each variant is made from the packed bytes in one pass."""
    pair = make_pair(
        "llama", tmp_path, stream, FORMATS[kind], dtype=torch.bfloat16, adapt=lambda m: m
    )
    before = digests(tmp_path)
    chosen = (FEW if num_steps == NUM_STEPS else ESTIMATORS)[estimator]
    method = ZerothOrder(pair.streamed, chosen, seed=SEED, packed=KEPT)
    trained = all_weights(pair.plain)
    reference = InMemory(pair.plain, chosen, trained)
    for expected, found in train_both(pair, method, reference, num_steps):
        assert found == expected
    assert_same_weights(pair, trained)
    assert digests(tmp_path) == before, "the user's files"
    engine = pair.streamed.ssdtune.engine
    assert num_misses(engine) == 0
    has_fused = {most for _, most in fused} == set(
        range(0 if estimator == "fzoo" else 1, num_steps + 1)
    )
    assert has_fused != (estimator == "lozo"), "low rank takes several passes"


def test_slots_hold_packed_bytes_and_variants_one_block(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, FORMATS["4"], adapt=lambda m: m)
    decoded = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED)
    before = pair.streamed.ssdtune.engine.plan
    largest = max(before.slots)
    more = decoded.extra_bytes()
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, packed=KEPT)
    plan = pair.streamed.ssdtune.engine.plan
    assert method.extra_bytes() == more
    assert more["a variant of a block"] == largest
    for packed_block, block in zip(plan.blocks, before.blocks, strict=True):
        assert packed_block.slot_bytes == block.file_bytes < block.slot_bytes
    assert plan.buffer_bytes == 0 < before.buffer_bytes, "bytes are read where they stay"


@pytest.mark.parametrize(("kind", "dtype"), [("4", torch.float32), ("nf4", torch.bfloat16)])
def test_adapters_on_a_base_that_is_kept_packed(
    kind: str, dtype: torch.dtype, tmp_path: Path, stream: Stream, fused: list[tuple[type, int]]
) -> None:
    """The base takes no step: it is decoded once a visit, for all variants of the adapter."""
    adapt = partial(with_lora, targets=["q_proj", "down_proj"])
    pair = make_pair("llama", tmp_path, stream, FORMATS[kind], dtype=dtype, adapt=adapt)
    method = ZerothOrder(pair.streamed, ESTIMATORS["fzoo"], seed=SEED, packed=KEPT)
    trained = {n: p for n, p in pair.plain.named_parameters() if p.requires_grad}
    reference = InMemory(pair.plain, ESTIMATORS["fzoo"], trained)
    for expected, found in train_both(pair, method, reference, 4):
        assert found == expected
    for key, value in trained.items():
        assert torch.equal(pair.streamed.get_parameter(key), value), key
    recipes = pair.streamed.ssdtune.engine.recipes
    num_packed = sum(len(r.unpacking.copies) for r in recipes if r.unpacking is not None)
    assert {most for _, most in fused} == {0}
    assert 4 * num_packed // 2 < len(fused) <= 4 * num_packed


@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma3"))]
)
def test_weights_that_are_put_together_from_packed_ones(
    name: str, tmp_path: Path, stream: Stream
) -> None:
    """Experts, transposed and tied matrices: decoded, then moved."""
    pair = make_pair(name, tmp_path, stream, FORMATS["4"], adapt=lambda m: m)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, packed=KEPT)
    trained = all_weights(pair.plain)
    reference = InMemory(pair.plain, ESTIMATORS["mezo"], trained)
    for expected, found in train_both(pair, method, reference, 2):
        assert found == expected
    assert_same_weights(pair, trained)


# ------------------------------------------------------------------ packed weights that move


class PackedInMemory(InMemory):
    """Codes of all packed weights lie in memory and take each step, as `kernels.requantize` states it."""

    def __init__(self, folder: Path, *given: Any) -> None:
        super().__init__(*given)
        self.codes: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = {}
        checkpoint = build_meta(folder).checkpoint
        from safetensors.torch import load_file

        files = {path: load_file(path) for path in checkpoint.files}
        for name, entry in checkpoint.tensors.items():
            if isinstance(entry, PackedEntry):
                assert isinstance(entry.format, Affine)
                *slices, scales, zeros = (files[p.path][p.name] for p in entry.parts)
                n, group = torch.Size(entry.shape).numel(), entry.format.group
                scale = scales.float().repeat_interleave(group)[:n].view(entry.shape)
                zero = zero_of(zeros, entry.format.bits).repeat_interleave(group)[:n]
                codes = join_slices(slices, entry.format.slices)[:n].float()
                self.codes[name] = (codes.view(entry.shape), scale, zero.view(entry.shape), entry.format.bits)  # fmt: skip

    def update(self, pristine: dict[str, torch.Tensor], gradients: Sequence[float]) -> None:
        super().update(pristine, gradients)  # what is not packed; the rest is put right
        for name, (codes, scale, zero, bits) in self.codes.items():
            decay = torch.tensor(1 - test_zeroth_order.LEARNING_RATE * test_zeroth_order.DECAY - 1)
            by = (codes - zero) * scale * decay.float()
            for j, g in enumerate(gradients):
                if not g:
                    continue
                size = -(test_zeroth_order.LEARNING_RATE * g)
                family = self.estimator.family
                for term in test_zeroth_order.terms(name, by, self.num_steps, j, size, family):
                    by = by + term
            key = philox.key_of(SEED, self.num_steps, philox.number_of(name))
            cpu = torch.device("cpu")
            fields = philox.fields(key, 0, by.numel(), bits=32, domain=philox.CODES, device=cpu)
            u = ((fields >> 8).double() / 2**24).float().view(by.shape)
            codes.add_((by / scale + u).floor()).clamp_(0, 2**bits - 1)
            self.parameters[name].copy_((codes - zero) * scale)


@pytest.mark.parametrize(
    ("kind", "estimator", "num_steps", "every"),
    [
        ("4", "mezo", 5, 2),
        ("4", "mezo", NUM_STEPS, 3),
        pytest.param("4", "fzoo", 4, 1, marks=pytest.mark.slow),
        ("8", "mezo", 2, None),
        pytest.param("3", "mezo", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_packed_weights_move_as_in_memory(
    kind: str,
    estimator: str,
    num_steps: int,
    every: int | None,
    tmp_path: Path,
    stream: Stream,
    fused: list[tuple[type, int]],
) -> None:
    """Written back packed to a working copy, or taking the steps anew at each read."""
    model = tmp_path / "model"
    model.mkdir()
    pair = make_pair("llama", model, stream, FORMATS[kind], dtype=torch.bfloat16, adapt=lambda m: m)
    before = digests(model)
    fold = None if every is None else Fold(tmp_path / "scratch", every)
    chosen = (FEW if num_steps == NUM_STEPS else ESTIMATORS)[estimator]
    method = ZerothOrder(pair.streamed, chosen, seed=SEED, fold=fold, packed=MOVED)
    trained = all_weights(pair.plain)
    reference = PackedInMemory(pair.folder, pair.plain, chosen, trained)
    at_first = {name: codes.clone() for name, (codes, *_) in reference.codes.items()}
    for expected, found in train_both(pair, method, reference, num_steps):
        assert found == expected
    assert any((reference.codes[name][0] != codes).any() for name, codes in at_first.items())
    assert_same_weights(pair, trained)
    assert {most for _, most in fused} <= {0, 1}
    assert len(fused) > 2 * num_steps
    engine = pair.streamed.ssdtune.engine
    if every is not None:
        stored = [op.num_bytes for op in engine.trace if op.lane is Lane.NVME_WRITE]
        assert stored
        assert max(stored) < max(method.extra_bytes().values()), "packed, not decoded"
    method.close()
    assert digests(model) == before, "the user's files"


def test_what_cannot_be_moved_is_named(tmp_path: Path, stream: Stream) -> None:
    for kind in ("nf4", "4"):
        (tmp_path / kind).mkdir()
    pair = make_pair("llama", tmp_path / "nf4", stream, FORMATS["nf4"], adapt=lambda m: m)
    engine = pair.streamed.ssdtune.engine
    with pytest.raises(PackedError, match=r"embed_tokens\.weight: codes of NF4"):
        ZerothOrder(pair.streamed, ESTIMATORS["mezo"], packed=MOVED)
    assert pair.streamed.ssdtune.engine is engine, "all as it was"
    pair = make_pair("llama", tmp_path / "4", stream, FORMATS["4"], adapt=lambda m: m)
    with pytest.raises(PackedError, match="no plain sums"):
        ZerothOrder(pair.streamed, ESTIMATORS["lozo"], packed=MOVED)
    with pytest.raises(PackedError, match="never"):
        ZerothOrder(pair.streamed, ESTIMATORS["mezo"], packed=KEPT, fold=Fold(tmp_path, 1))


def test_a_plain_base_is_not_kept_packed(tmp_path: Path, stream: Stream) -> None:
    folder = tiny_models.save(tiny_models.build("llama"), tmp_path / "plain")
    with pytest.raises(PackedError, match="nothing of this one is packed"):
        ZerothOrder(stream(folder), ESTIMATORS["mezo"], packed=KEPT)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", NORM])
def test_a_flipped_bit_is_found_before_it_is_used(
    name: str, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair("llama", tmp_path, stream, FORMATS["4"], adapt=lambda m: m)
    flip_a_bit(pair.folder, name)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, packed=KEPT)
    with pytest.raises(Exception, match="is damaged"):
        method.step([lambda: pair.streamed(**tiny_models.batch("llama"))], learning_rate=0.1)


# ------------------------------------------------------------------ predictions


def test_what_stays_packed_is_priced_by_its_kind(tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, FORMATS["rotated"], adapt=lambda m: m)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, packed=KEPT)
    kinds = {op.kind for work in method.moves(5).shifts.values() for op in work.operators}
    assert f"{DECODE}:rotated" in kinds
    assert DECODE not in kinds


SLOWLY = [pytest.param(*case, marks=pytest.mark.slow) for case in ((KEPT, True), (MOVED, False))]


@pytest.mark.parametrize(("way", "adapts"), [(KEPT, False), *SLOWLY])
def test_decoding_and_steps_taken_anew_are_those_predicted(
    way: str, adapts: bool, tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third step of five, which has missed as many as blocks do on average over the run."""
    adapt = partial(with_lora, targets=["q_proj"]) if adapts else lambda m: m
    pair = make_pair("llama", tmp_path, stream, FORMATS["4"], adapt=adapt)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, packed=way)
    step(method, 0)
    step(method, 1)
    done: Counter[str] = Counter()
    add = updates.add_directions

    def decoding(format: Any, parts: Any, out: torch.Tensor, moves: Sequence[Any]) -> None:
        done[DECODE] += out.nbytes
        done[PERTURB] += out.numel() * sum(len(move.directions) for move in moves)
        unpack_add.unpack_add(format, parts, out, moves)

    def adding(to: torch.Tensor, base: torch.Tensor, directions: Any, **more: Any) -> None:
        done[PERTURB] += base.numel() * len(directions)
        add(to, base, directions, **more)

    monkeypatch.setattr(packed, "unpack_add", decoding)
    monkeypatch.setattr(updates, "add_directions", adding)
    step(method, 2)
    moves, wanted = method.moves(5), Counter[str]()
    assert moves.num_missed == 2
    for visit in pair.streamed.ssdtune.engine.plan.sequences["forward"].visits:
        for op, n in moves.shifts[visit.block].operators.items():
            wanted[op.kind] += round(op.size * n)
        for op, n in moves.updates[visit.block].operators.items() if moves.updates else ():
            wanted[op.kind] += round(moves.num_missed * op.size * n)
    assert done[DECODE] == wanted[DECODE] > 0
    assert not [kind for kind in wanted if kind.startswith(f"{DECODE}:")], "of narrow codes alone"
    if way == KEPT and not adapts:
        outside = sum(p.numel() for p in method.weights.residents.outside.values())
        assert done[PERTURB] == wanted[PERTURB] + outside * (4 + 2), "four variants, one step"
