"""Activations that wait on NVMe: the same bits, memory that is really free meanwhile, failures that name the block."""

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import (
    Pair,
    assert_equal,
    assert_same_training,
    gradients,
    make_pair,
    num_misses,
    with_lora,
)
from test_activations import PLENTY, kept_by, tensor_bytes
from test_exact import Stream, batches

from ssdtune.schedule.plan import Direction, Kind, Lane, Tier
from ssdtune.schedule.trace import TraceOp
from ssdtune.swap.inputs import make_activation_store
from ssdtune.swap.kept import ACTIVATIONS, INPUTS, Contents, InputsError
from ssdtune.swap.ring import NvmeInputs
from ssdtune.swap.scratch import ScratchError, ScratchFile
from ssdtune.visit.leaving import Leaving

CPU = torch.device("cpu")
CHUNK = 16 * 1024


class Drive(ScratchFile):
    """Fails at what it is told to."""

    fails_to: str = ""

    def write(self, offset: int, content: memoryview) -> None:
        self._perhaps("write")
        super().write(offset, content)

    def read(self, offset: int, buffer: memoryview) -> None:
        self._perhaps("read")
        super().read(offset, buffer)

    def _perhaps(self, what: str) -> None:
        if self.fails_to == what:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Ring(NvmeInputs):
    """Three small chunks, tensors of any size, and all that it did."""

    def __init__(self, folder: Path, contents: Contents = ACTIVATIONS) -> None:
        self.ops: list[TraceOp] = []
        super().__init__(
            Drive(folder, contents.many),
            device=CPU,
            contents=contents,
            trace=self.ops.append,
            timeout_s=20.0,
            min_bytes=256,
            chunk_bytes=CHUNK,
            num_chunks=3,
        )


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    made = Ring(tmp_path / "ring")
    yield made
    made.close()


def stored_pair(
    name: str, folder: Path, stream: Stream, *, inputs: Tier = Tier.DEVICE, **options: Any
) -> tuple[Pair, Ring]:
    """All activations, small as they are, go through a ring of three chunks; block inputs too where they leave."""
    budgets = {"nvme_activation_bytes": PLENTY, **options}
    made = {"block_inputs": inputs, "scratch": folder / "scratch"}
    pair = make_pair(name, folder / "model", stream, options=made, **budgets)
    ring = Ring(folder / "scratch")
    kept_by(pair.streamed).wait_in(ring)
    streamer = pair.streamed.get_base_model().ssdtune
    if inputs is Tier.NVME:
        streamer.input_store.close()
        streamer.input_store = Ring(folder / "scratch", INPUTS)
    return pair, ring


# ------------------------------------------------------------------ bits


FAST = {("llama", Tier.DEVICE), ("gemma3", Tier.NVME), ("mixtral", Tier.NVME)}
CASES = [
    pytest.param(name, tier, marks=[] if (name, tier) in FAST else [pytest.mark.slow])
    for name in ("llama", "gemma3", "gpt2", "mixtral")
    for tier in (Tier.DEVICE, Tier.NVME)
]


@pytest.mark.parametrize(("name", "inputs"), CASES)
def test_training_equals_training_in_memory(
    name: str, inputs: Tier, tmp_path: Path, stream: Stream
) -> None:
    pair, ring = stored_pair(name, tmp_path, stream, inputs=inputs)
    assert_same_training(pair, batches(name, 2))
    kept = kept_by(pair.streamed)
    assert kept.num_stored > 0
    assert (kept.num_kept, kept.num_over) == (0, 0)
    assert (kept.held_bytes, kept.stored_bytes) == (0, 0)
    assert num_misses(pair.engine) == 0
    ring.begin_step(99)
    assert ring.used_bytes == 0


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_so_it_does_in_bf16(name: str, tmp_path: Path, stream: Stream) -> None:
    more = {"dtype": torch.bfloat16, "micro_batch_size": 4}
    pair, _ = stored_pair(name, tmp_path, stream, **more)
    assert_same_training(pair, batches(name, 2), num_micro=2)
    assert kept_by(pair.streamed).num_stored > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_casts_are_as_without(autocast: bool, tmp_path: Path, stream: Stream) -> None:
    found = []
    base = tiny_models.build("llama", dtype=torch.float32)
    tiny_models.save(base, tmp_path / "model")
    batch = tiny_models.batch("llama", 4, 12)
    for budget in (0, PLENTY):
        opened = stream(
            tmp_path / "model", nvme_activation_bytes=budget, options={"scratch": tmp_path}
        )
        if budget:
            opened.ssdtune.activations.wait_in(Ring(tmp_path))
        model = with_lora(opened, lora_dropout=0.3)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach()})
        assert (kept_by(model).num_stored > 0) == bool(budget)
    assert_equal(*found)


@pytest.mark.parametrize("inputs", [Tier.DEVICE, Tier.NVME])
def test_a_second_backward_computes_again(inputs: Tier, tmp_path: Path, stream: Stream) -> None:
    pair, _ = stored_pair("llama", tmp_path, stream, inputs=inputs)
    loss = pair.streamed(**batches("llama")[0]).loss
    loss.backward(retain_graph=True)
    first = gradients(pair.streamed)
    pair.streamed.zero_grad()
    loss.backward()
    assert_equal(first, gradients(pair.streamed))


def test_a_budget_that_is_too_small_leaves_the_rest_to_be_computed_again(
    tmp_path: Path, stream: Stream
) -> None:
    pair, _ = stored_pair("llama", tmp_path, stream, nvme_activation_bytes=200_000)
    assert_same_training(pair, batches("llama", 2))
    kept = kept_by(pair.streamed)
    assert kept.num_stored > 0
    assert kept.num_over > 0
    assert (kept.held_bytes, kept.stored_bytes) == (0, 0)


def test_what_memory_has_no_room_for_waits_on_nvme(tmp_path: Path, stream: Stream) -> None:
    pair, _ = stored_pair("llama", tmp_path, stream, activation_bytes=400_000)
    assert_same_training(pair, batches("llama", 2))
    kept = kept_by(pair.streamed)
    assert kept.num_kept > 0
    assert kept.num_stored > 0


def test_layers_are_computed_once(tmp_path: Path, stream: Stream) -> None:
    pair, _ = stored_pair("llama", tmp_path, stream)
    calls: list[int] = []
    layer = pair.streamed.get_base_model().model.layers[1].mlp
    layer.register_forward_hook(lambda *_: calls.append(1))
    pair.streamed(**batches("llama")[0]).loss.backward()
    assert len(calls) == 4


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("inputs", [Tier.DEVICE, Tier.NVME])
@pytest.mark.parametrize("stores", [False, True])
def test_nothing_that_was_stored_is_in_memory_until_backward(
    stores: bool, inputs: Tier, tmp_path: Path, stream: Stream
) -> None:
    """Storages inside of a layer, and its input, seen from its own modules."""
    budgets = {} if stores else {"nvme_activation_bytes": 0, "activation_bytes": PLENTY}
    pair, _ = stored_pair("llama", tmp_path, stream, inputs=inputs, **budgets)
    seen: dict[str, list[Any]] = {"inside": [], "input": []}

    def watch(what: str, module: Any) -> None:
        module.register_forward_pre_hook(
            lambda _, args: seen[what].append(weakref.ref(args[0].untyped_storage()))
        )

    layers = pair.streamed.get_base_model().model.layers
    watch("inside", layers[1].mlp.down_proj)
    watch("input", layers[1].input_layernorm)
    loss = pair.streamed(**batches("llama")[0]).loss
    gc.collect()
    alive = {what: sum(ref() is not None for ref in refs) for what, refs in seen.items()}
    assert alive["inside"] == (0 if stores else 4)
    if stores:
        assert alive["input"] == (0 if inputs is Tier.NVME else 4)
        assert kept_by(pair.streamed).stored_bytes > 10 * kept_by(pair.streamed).held_bytes
    loss.backward()
    assert all(ref() is None for refs in seen.values() for ref in refs)


def test_a_loss_that_is_dropped_gives_its_space_back(tmp_path: Path, stream: Stream) -> None:
    pair, ring = stored_pair("llama", tmp_path, stream)
    loss = pair.streamed(**batches("llama")[0]).loss
    assert ring.used_bytes >= kept_by(pair.streamed).stored_bytes > 0
    del loss
    gc.collect()
    assert kept_by(pair.streamed).stored_bytes == 0
    assert ring.used_bytes == 0


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.NVME])
def test_after_a_loss_that_was_dropped_all_is_free_and_the_next_steps_are_right(
    tier: Tier, tmp_path: Path, stream: Stream
) -> None:
    """At once, without looking for garbage: the next forward wants that memory."""
    in_memory = {"nvme_activation_bytes": 0, "activation_bytes": PLENTY}
    budgets = in_memory if tier is Tier.DEVICE else {}
    pair, ring = stored_pair("llama", tmp_path, stream, inputs=Tier.NVME, **budgets)
    kept, inputs = kept_by(pair.streamed), pair.streamed.get_base_model().ssdtune.input_store
    alive = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            loss = pair.streamed(**batches("llama")[0]).loss
            assert (kept.held_bytes, kept.stored_bytes)[tier is Tier.NVME] > 100_000
            del loss
            assert (kept.held_bytes, kept.stored_bytes) == (0, 0)
            for store in (ring, inputs):
                assert store.used_bytes == 0
                assert not any(chunk.record for chunk in store._idle)
            alive.append(tensor_bytes())
    finally:
        gc.enable()
    assert alive[1] == alive[2]
    reserved = ring.reserved_bytes, inputs.reserved_bytes
    assert_same_training(pair, batches("llama", 2))
    assert (ring.reserved_bytes, inputs.reserved_bytes) == reserved


def test_the_file_does_not_grow_from_step_to_step(tmp_path: Path, stream: Stream) -> None:
    pair, ring = stored_pair("llama", tmp_path, stream)
    reserved = []
    for _ in range(4):
        pair.streamed(**batches("llama")[0]).loss.backward()
        reserved.append(ring.reserved_bytes)
    assert len(set(reserved)) == 1
    assert os.listdir(tmp_path / "scratch") == []


# ------------------------------------------------------------------ storages


def test_what_tensors_share_is_stored_once_and_each_finds_its_place(ring: Ring) -> None:
    base = torch.randn(40, 64)
    views = {
        "whole": base,
        "transposed": base.t(),
        "cut": base[10:20, 3:7],
        "expanded": base[5].expand(8, 64),
        "other type": base.view(torch.int32)[7:],
        "flag": torch.rand(50, 40) > 0.5,
        "of no token": base[9:9],
    }
    expected = {name: view.clone() for name, view in views.items()}
    lines = {name: view.data_ptr() % 64 for name, view in views.items()}
    leaving = Leaving(ring, [])
    places = {name: leaving.view(view) for name, view in views.items()}
    strides = {name: view.stride() for name, view in views.items()}
    leaving.leave("layers.3")
    assert leaving.num_bytes == base.nbytes + 2000
    assert ring.used_bytes <= leaving.num_bytes + 2 * 4096
    dead = [weakref.ref(base.untyped_storage())]
    del base, views
    gc.collect()
    assert dead[0]() is None
    for name, place in reversed(places.items()):
        assert place is not None
        back = place.take()
        assert torch.equal(back, expected[name]), name
        assert back.stride() == strides[name], name
        assert back.data_ptr() % 64 == lines[name], f"{name}: kernels choose by alignment"
    ring.close()
    assert sum(op.num_bytes for op in ring.ops if op.kind is Kind.STORE_ACTIVATIONS) == (
        leaving.num_bytes
    )


def test_what_was_saved_last_is_brought_back_first(ring: Ring) -> None:
    """Also where it was saved before already: backward wants it as late in forward as it was saved."""
    first, second, third = (torch.randn(num) for num in (100, 101, 102))
    leaving = Leaving(ring, [])
    views = [leaving.view(saved) for saved in (first, second, third, first)]
    assert None not in views
    leaving.leave("layers.0")
    assert [record.num_bytes // 4 for record in ring._waiting] == [101, 102, 100]


def test_what_is_small_or_no_plain_memory_stays(ring: Ring) -> None:
    leaving = Leaving(ring, [])
    assert leaving.view(torch.randn(8)) is None
    assert leaving.view(torch.randn(100, dtype=torch.complex64).conj()) is None
    assert leaving.view(torch.randn(100, device="meta")) is None
    off_line = torch.from_numpy(torch.empty(4096).numpy()[2:])
    assert off_line.data_ptr() % 64
    assert leaving.view(off_line) is None
    assert leaving.num_bytes == 0


def test_an_input_that_waits_anyway_is_found_there(ring: Ring) -> None:
    hidden = torch.randn(4, 64)
    kept = ring.keep(hidden, "layers.1")
    assert kept is not None
    leaving = Leaving(ring, [(hidden, kept)])
    place = leaving.view(hidden[1:])
    leaving.leave("layers.1")
    assert leaving.num_bytes == 0
    assert place is not None
    assert torch.equal(place.take(), hidden[1:])


def test_an_input_that_backward_has_no_use_for_is_not_in_the_way_of_others(ring: Ring) -> None:
    """Nobody takes it, and what was kept before it is read ahead all the same."""
    earlier = [torch.randn(CHUNK // 4) for _ in range(6)]
    kept = [ring.keep(tensor, f"layers.{i}") for i, tensor in enumerate(earlier)]
    unused = [torch.randn(CHUNK // 4) for _ in range(3)]
    for tensor in unused:
        place = ring.keep(tensor, "unused")
        assert place is not None
        Leaving(ring, [(tensor, place)]).pass_by()
    assert [record.label for record in ring._waiting] == [f"layers.{i}" for i in range(6)]
    for place, tensor in zip(reversed(kept), reversed(earlier), strict=True):
        assert place is not None
        assert torch.equal(place.take(), tensor)
    ring.close()
    assert "unused" not in {op.block for op in ring.ops if op.kind is Kind.FETCH_ACTIVATIONS}


# ------------------------------------------------------------------ the trace


def test_the_trace_has_each_block_on_its_way_out_and_back(tmp_path: Path, stream: Stream) -> None:
    pair, ring = stored_pair("llama", tmp_path, stream)
    pair.streamed(**batches("llama")[0]).loss.backward()
    ring.close()
    out = [op for op in ring.ops if op.kind is Kind.STORE_ACTIVATIONS]
    back = [op for op in ring.ops if op.kind is Kind.FETCH_ACTIVATIONS]
    blocks = [f"model.layers.{i}" for i in range(4)]
    assert list(dict.fromkeys(op.block for op in out)) == blocks
    assert list(dict.fromkeys(op.block for op in back)) == blocks[::-1]
    assert {(op.lane, op.direction) for op in out} == {(Lane.NVME_WRITE, Direction.FORWARD)}
    assert {(op.lane, op.direction) for op in back} == {(Lane.NVME_READ, Direction.BACKWARD)}
    staged = 3 * CHUNK
    num_out, num_back = (sum(op.num_bytes for op in ops) for ops in (out, back))
    assert num_out - staged <= num_back <= num_out, "what the ring still held is not read again"


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("fails_to", ["write", "read"])
def test_a_drive_that_fails_is_said_with_the_block_and_the_next_step_is_right(
    fails_to: str, tmp_path: Path, stream: Stream
) -> None:
    pair, ring = stored_pair("llama", tmp_path, stream)
    drive: Any = ring.file
    batch = batches("llama")[0]
    drive.fails_to = fails_to
    message = rf"cannot {fails_to} [\d,]+ bytes of an activation of model\.layers\.\d"
    with pytest.raises(InputsError, match=message) as caught:
        pair.streamed(**batch).loss.backward()
    assert str(tmp_path) in str(caught.value)
    del caught
    gc.collect()
    drive.fails_to = ""
    pair.streamed.zero_grad()
    assert_same_training(pair, [batch])
    assert kept_by(pair.streamed).stored_bytes == 0


def test_a_full_drive_is_said_before_a_byte_is_written(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ScratchError, match=r"(?s)bytes\) for activations in .*ENOSPC.*offload\.path"
    ):
        ring.reserve(10**9)
    assert ring.ops == []


def test_without_a_folder_or_with_one_in_ram_it_is_refused() -> None:
    with pytest.raises(InputsError, match=r"(?s)offload\.nvme_activations.*offload\.path"):
        make_activation_store(device=CPU)
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no file system in RAM at /dev/shm")
    with pytest.raises(InputsError, match=r"(?s)lies in RAM.*offload\.nvme_activations to none"):
        make_activation_store(device=CPU, folder=Path("/dev/shm/not/there"))
    assert not os.path.exists("/dev/shm/not")
