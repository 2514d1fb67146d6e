"""On a CUDA device the engine is as exact as on a CPU, whatever runs late: copies, readers, reads.

Streams are slowed on purpose (`torch.cuda._sleep`), so that a missing wait shows as wrong bytes.
"""

import dataclasses
import gc
import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from engines import B, Blocks, F, check_slot, make_engine, run_step, write_blocks
from peft import LoraConfig, get_peft_model
from support import accumulate, assert_equal, cut, gradients, num_items, trained, weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import E2M1, NF4, SCALE_DTYPES, NestedNibbles, Nibbles, Nvfp4
from ssdtune.kernels.noise import GAUSSIAN, KINDS, Direction, add_directions
from ssdtune.kernels.quantize_affine import quantize_affine
from ssdtune.kernels.requantize import requantize
from ssdtune.kernels.rotated import Rotated
from ssdtune.kernels.transfer import format_of, pack
from ssdtune.kernels.unpack import unpack
from ssdtune.kernels.unpack_add import Move
from ssdtune.schedule import trace as traces
from ssdtune.schedule.plan import Budgets, Kind, Lane, Tier
from ssdtune.swap.engine import Engine
from ssdtune.swap.gds import GdsChoice, choose_gds
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.assemble import assemble
from ssdtune.visit.build import build_meta
from ssdtune.visit.draft import Options, smallest_budgets
from ssdtune.zeroth_order import Fold, MeZO, ZerothOrder

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
LONG = 50_000_000  # clock cycles of a device: some 30 ms
SIZES = {  # of device and RAM, in multiples of the smallest that works
    "smallest": (1.0, 1.0),
    "some in RAM": (3.0, 4.0),
    "some resident": (3.4, 2.0),
    "all resident": (100.0, 3.0),
}


@pytest.fixture(scope="module")
def gds(tmp_path_factory: pytest.TempPathFactory) -> GdsChoice:
    """Whether files can be read straight into the device's memory here."""
    file = tmp_path_factory.mktemp("gds") / "large"
    file.write_bytes(random.Random(0).randbytes(64 * 2**20))
    os.sync()
    return choose_gds(file)


@pytest.fixture(params=["RAM", "device"])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the buffers are. On the device, small reads too go there directly."""
    if request.param == "RAM":
        yield "RAM"
        return
    choice = request.getfixturevalue("gds")
    if choice.open_pool is None:
        pytest.skip(choice.reason)
    import kvikio.defaults

    with kvikio.defaults.set("gds_threshold", 1):
        yield "device"


# ------------------------------------------------------------------ whole models


def streamed(
    folder: Path,
    dtype: torch.dtype,
    size: str,
    gds: GdsChoice | None = None,
    scratch: Path | None = None,
) -> Any:
    """The model of `folder` streamed to the device within a budget of that size; gds: with the buffers there; scratch:
    with activations there."""
    meta = build_meta(folder, dtype=dtype)
    storage = choose_storage(folder).storage
    options = Options(
        device=DEVICE,
        budgets=Budgets(ram_bytes=1, device_bytes=1),  # replaced below
        storage=storage,
        micro_batch_size=2,
        scratch=scratch,
        timeout_s=30.0,
    )
    on_device, in_ram = SIZES[size]
    buffer_bytes = smallest_budgets(meta, options).ram_bytes
    if gds is not None:
        options = dataclasses.replace(options, open_device_pool=gds.open_pool)
        in_ram -= 1.0
    least = smallest_budgets(meta, options)
    budgets = Budgets(
        ram_bytes=int(buffer_bytes * in_ram),
        device_bytes=int(least.device_bytes * on_device),
        nvme_activation_bytes=0 if scratch is None else 10**9,
    )
    return assemble(meta, dataclasses.replace(options, budgets=budgets))


def adapted(model: Any, targets: list[str]) -> Any:
    """LoRA with the same random values in every model, none of them zero."""
    torch.manual_seed(2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for _, parameter in trained(model):
            parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=0.05)
    return model.train()


def batch_on_device(name: str, seed: int) -> dict[str, torch.Tensor]:
    made = tiny_models.batch(name, 8, 17 - seed % 2, seed=seed)
    return {key: value.to(DEVICE) for key, value in made.items()}


@pytest.fixture
def one_kernel() -> Iterator[None]:
    """One attention kernel whose backward adds in one order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_streamed_training_equals_training_in_memory(
    name: str, size: str, dtype: torch.dtype, where: str, gds: GdsChoice, tmp_path: Path
) -> None:
    """Losses, gradients and weights of three AdamW steps, bit for bit."""
    base = tiny_models.build(name, dtype=dtype)
    tiny_models.save(base, tmp_path)
    targets = tiny_models.lora_targets(base)
    in_memory: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    plain = adapted(in_memory.to(DEVICE), targets)
    ours = adapted(streamed(tmp_path, dtype, size, gds if where == "device" else None), targets)
    streamer = ours.get_base_model().ssdtune
    models = plain, ours
    optimizers = [torch.optim.AdamW([p for _, p in trained(m)], lr=1e-2) for m in models]
    try:
        for seed in range(3):
            batch = batch_on_device(name, seed)
            pieces = cut(batch, 4)
            items = num_items(pieces)
            expected = accumulate(plain, pieces, items)
            loss = ours(**batch, num_items_in_batch=items).loss
            loss.backward()
            assert_equal({"loss": expected}, {"loss": loss.detach()}, "losses")
            assert_equal(gradients(plain), gradients(ours))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_equal(weights(plain), weights(ours), "weights")
        assert not any(op.is_miss for op in streamer.engine.trace)
        assert streamer.engine.plan.buffers_on_device == (where == "device")
        if size == "some in RAM":
            assert Tier.RAM in streamer.engine.plan.tiers
        if "resident" in size:
            assert Tier.DEVICE in streamer.engine.plan.tiers
    finally:
        streamer.close()


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_that_wait_on_nvme_keep_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_models.build("llama", dtype=dtype)
    tiny_models.save(base, tmp_path / "model")
    found = []
    for scratch in (None, tmp_path / "scratch"):
        model = streamed(tmp_path / "model", dtype, "smallest", scratch=scratch)
        ours = adapted(model, tiny_models.lora_targets(base))
        activations = ours.get_base_model().ssdtune.activations
        if activations.store is not None:
            activations.store.min_bytes = 1
        loss = ours(**batch_on_device("llama", 0)).loss
        loss.backward()
        found.append({**gradients(ours), "loss": loss.detach()})
        assert (activations.num_stored > 0) == (scratch is not None)
        ours.get_base_model().ssdtune.close()
    assert_equal(*found)


def test_a_step_never_waits_for_the_whole_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("torch.cuda.synchronize was called in a step")

    base = tiny_models.build("llama")
    tiny_models.save(base, tmp_path)
    model = adapted(streamed(tmp_path, torch.float32, "smallest"), ["q_proj"])
    try:
        model(**batch_on_device("llama", 0)).loss.backward()
        monkeypatch.setattr(torch.cuda, "synchronize", refuse)
        for seed in (1, 2):
            model(**batch_on_device("llama", seed)).loss.backward()
    finally:
        model.get_base_model().ssdtune.close()


# ------------------------------------------------------------------ the engine alone

MakeEngine = Callable[..., tuple[Engine, Blocks]]


@pytest.fixture
def make(tmp_path: Path, where: str) -> Iterator[MakeEngine]:
    """An engine of seven packed blocks on the device; closed after the test."""
    made: list[Engine] = []

    def make_one(**options: Any) -> tuple[Engine, Blocks]:
        if where == "device":
            import kvikio

            options = {"kvikio": kvikio, **options}
        blocks = write_blocks(tmp_path, ["packed"] * 7)
        options = {"num_slots": 0.0, "device_slots": 2.0, "prefetch": 1, **options}
        made.append(make_engine(blocks, device=DEVICE, **options))
        return made[-1], blocks

    yield make_one
    for engine in made:
        engine.close()


def snapshot(engine: Engine, block: int, slot: int) -> list[torch.Tensor]:
    """Copies of the block's tensors, queued on the current stream; the host does not wait."""
    return [tensor.clone() for tensor in engine.slots.tensors(block, slot)]


def assert_all_right(found: list[tuple[int, list[torch.Tensor]]], blocks: Blocks) -> None:
    for block, tensors in found:
        for tensor, wanted in zip(tensors, blocks.expected[block], strict=True):
            assert torch.equal(tensor.cpu(), wanted), (
                f"layers.{block} was read too early or too late"
            )


def planned(engine: Engine, times: int = 2) -> Iterator[tuple[int, Any]]:
    """Begins steps and yields their visits."""
    for _ in range(times):
        engine.begin_step("train")
        for visit in engine.plan.sequences["train"].visits:
            yield visit.block, visit.direction
    engine.leave()


@pytest.mark.parametrize("device_slots", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("num_slots", [0.0, 3.0])
def test_every_visit_finds_its_block(
    device_slots: float, num_slots: float, make: MakeEngine
) -> None:
    engine, blocks = make(device_slots=device_slots, num_slots=num_slots)
    for _ in range(3):
        run_step(engine, blocks)
    assert not any(op.is_miss for op in engine.trace)


def test_a_slot_is_not_refilled_under_a_slow_reader(make: MakeEngine) -> None:
    """The host is visits ahead of the device when it asks for the refill."""
    engine, blocks = make(device_slots=1.0, prefetch=0)
    found = []
    for block, direction in planned(engine):
        slot = engine.enter(block, direction)
        torch.cuda._sleep(LONG)
        found.append((block, snapshot(engine, block, slot)))
    assert_all_right(found, blocks)


def test_a_reader_waits_for_a_slow_copy(make: MakeEngine) -> None:
    engine, blocks = make()
    uploads = engine._lanes._uploads
    assert uploads is not None
    found = []
    for block, direction in planned(engine):
        with torch.cuda.stream(uploads):
            torch.cuda._sleep(LONG // 4)
        found.append((block, snapshot(engine, block, engine.enter(block, direction))))
    assert_all_right(found, blocks)


def test_a_buffer_is_not_read_into_under_a_slow_copy(make: MakeEngine) -> None:
    """One buffer, four slots: the next block is read while the last is still on its way."""
    engine, blocks = make(device_slots=4.0, prefetch=1)
    assert len(engine.plan.buffers) == 1
    uploads = engine._lanes._uploads
    assert uploads is not None
    found = []
    for block, direction in planned(engine, times=3):
        with torch.cuda.stream(uploads):
            torch.cuda._sleep(LONG)
        found.append((block, snapshot(engine, block, engine.enter(block, direction))))
    assert_all_right(found, blocks)


def test_every_stream_that_enters_is_waited_for_and_waits(make: MakeEngine) -> None:
    """Three streams read each visit, the first entered being the slowest."""
    engine, blocks = make(device_slots=1.0, prefetch=0)
    streams = [torch.cuda.Stream(DEVICE) for _ in range(3)]
    found = []
    for block, direction in planned(engine):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                slot = engine.enter(block, direction)
                torch.cuda._sleep(LONG // (1 + 4 * i))
                found.append((block, snapshot(engine, block, slot)))
    for stream in streams:
        stream.synchronize()
    assert_all_right(found, blocks)


def test_the_thread_that_enters_makes_no_difference(make: MakeEngine) -> None:
    """Backward enters from autograd's device thread, and the next step's forward leaves it."""
    engine, blocks = make(device_slots=1.0, prefetch=0)
    found: list[tuple[int, list[torch.Tensor]]] = []

    def visit(block: int, direction: Any) -> None:
        slot = engine.enter(block, direction)
        torch.cuda._sleep(LONG // 4)
        found.append((block, snapshot(engine, block, slot)))

    for block, direction in planned(engine):
        if direction is F:
            visit(block, direction)
        else:
            thread = threading.Thread(target=visit, args=(block, direction))
            thread.start()
            thread.join(30)
    assert len(found) == 2 * len(engine.plan.sequences["train"].visits)
    assert_all_right(found, blocks)


def test_memory_in_use_before_becomes_slots_only_afterwards(make: MakeEngine) -> None:
    """A freed tensor's kernel, still queued, must not write into the slot that gets its memory."""
    slot_bytes = make()[0].plan.slots[0]
    for _ in range(4):
        freed = torch.empty(2 * slot_bytes, dtype=torch.uint8, device=DEVICE)
        torch.cuda._sleep(LONG)
        freed.fill_(7)
        del freed
        engine, blocks = make()
        engine.begin_step("train")
        check_slot(engine, blocks, 0, engine.enter(0, F))


def test_a_visit_queues_its_work_and_waits_for_nothing(make: MakeEngine) -> None:
    """No call that makes the host wait for the device, in any of the engine's threads."""
    engine, blocks = make(device_slots=3.0, prefetch=2)
    run_step(engine, blocks)
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block, direction in planned(engine):
            found.append((block, snapshot(engine, block, engine.enter(block, direction))))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_all_right(found, blocks)


def test_out_of_order_visits_are_right(make: MakeEngine) -> None:
    engine, blocks = make(device_slots=2.0)
    found = []
    engine.begin_step("train")
    for block, direction in [(0, F), (5, F), (5, B), (1, B), (0, F), (6, F), (6, B), (2, F)] * 2:
        slot = engine.enter(block, direction)
        torch.cuda._sleep(LONG // 8)
        found.append((block, snapshot(engine, block, slot)))
    assert_all_right(found, blocks)


def test_a_tensor_is_read_outside_visits(make: MakeEngine) -> None:
    engine, blocks = make()
    run_step(engine, blocks)
    for block in (0, 6):
        for index in (0, 1):
            found = engine.read(block, index)
            assert found.device == DEVICE
            assert torch.equal(found.cpu(), blocks.expected[block][index])


def test_copies_from_buffers_on_the_device_are_on_their_own_lane(
    make: MakeEngine, where: str
) -> None:
    """Blocks that RAM keeps take the link, as ever; times are the device's."""
    engine, blocks = make(num_slots=3.0)
    for _ in range(3):
        run_step(engine, blocks)
    torch.cuda.current_stream().synchronize()
    engine.begin_step("train")
    lanes = Counter((op.kind, op.lane) for op in traces.steps(engine.trace)[2])
    assert lanes[Kind.UPLOAD, Lane.H2D] > 0
    assert (lanes[Kind.UNPACK, Lane.DEVICE_COPY] > 0) == (where == "device")


# ------------------------------------------------------------------ memory, times


def test_memory_is_what_the_plan_says(make: MakeEngine) -> None:
    """On the device: slots, and for a moment what a cast or a strided piece needs. Buffers: exactly
    their bytes, pinned; or there too, with up to a page more to start on one."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine, _ = make(device_slots=3.0, prefetch=2)
    for block, direction in planned(engine, times=3):
        engine.enter(block, direction)
    torch.cuda.current_stream().synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    largest = max(view.num_bytes for view in engine.recipes[0].tensors)
    plan, pages = engine.plan, 0
    if plan.buffers_on_device:
        pages = 4096 + 512
    rounding = 512 * len(plan.slots) + pages * len(plan.buffers)
    assert peak <= plan.device_bytes + rounding + 2 * largest
    for slot in range(len(engine.plan.slots)):
        assert engine.slots.memory[slot].data_ptr() % 256 == 0
    for buffer, num_bytes in zip(engine.slots.buffers._buffers, engine.plan.buffers, strict=True):
        assert buffer.memory.nbytes == num_bytes
        assert buffer.memory.data_ptr() % 4096 == 0
        if plan.buffers_on_device:
            assert buffer.memory.device == DEVICE
        else:
            assert buffer.memory.is_pinned()


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    blocks = write_blocks(tmp_path, ["packed"] * 7)
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = make_engine(blocks, device=DEVICE, num_slots=0.0, device_slots=3.0)
    run_step(engine, blocks)
    engine.close()
    del engine
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 4096


def test_the_trace_has_the_devices_own_times(make: MakeEngine, where: str) -> None:
    """A long kernel is compute, not waiting, though the host has queued it in no time."""
    if where == "device":
        pytest.skip("kvikio reads only after the compute that was queued before: see swap/gds.py")
    engine, _ = make(device_slots=3.0, prefetch=2)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for block, direction in planned(engine, times=3):
        engine.enter(block, direction)
        start.record()
        torch.cuda._sleep(LONG)
        end.record()
    end.synchronize()
    engine.begin_step("train")  # what the device has done since is recorded
    kernel_s = start.elapsed_time(end) / 1e3
    steady = traces.steps(engine.trace)[2]
    computed = [op for op in steady if op.kind is Kind.COMPUTE]
    assert len(computed) == len(engine.plan.sequences["train"].visits)
    for op in computed:
        assert 0.9 * kernel_s <= op.end_s - op.start_s - op.wait_s
    assert traces.stall_seconds(steady) < 0.2 * kernel_s * len(computed)
    uploads = [op for op in steady if op.kind is Kind.UPLOAD]
    assert Counter(op.op_id for op in uploads).most_common(1)[0][1] == 1
    assert all(0 < op.end_s - op.start_s < kernel_s for op in uploads)
    ordered = sorted(computed, key=lambda op: op.start_s)
    assert all(a.end_s <= b.end_s for a, b in itertools.pairwise(ordered))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_directions_have_the_bits_that_the_cpu_has(dtype: torch.dtype, kind: str) -> None:
    """By Triton's kernels where they are installed: nothing fused, every sum in its order."""
    directions = [Direction(0x0123456789ABCDEF + j, 1e-3 * (j - 1.5), kind) for j in range(3)]
    base = torch.randn(5 * 8192 + 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    for more in ({}, {"decay": 0.99}, {"rounding_key": 99, "decay": 1 - 1e-4}):
        for num in (1, 3):
            expected, found = torch.empty_like(base), torch.empty_like(base, device=DEVICE)
            add_directions(expected, base, directions[:num], **more)
            add_directions(found, base.to(DEVICE), directions[:num], **more)
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(found.cpu().view(bits), expected.view(bits))


PACKED = {
    "4 bits": Affine(4, (4, 1, 1, 2)),
    "5 bits": Affine(5, (4, 1), 128),
    "8 bits": Affine(8, (4, 1, 1, 2), 32),
    "nf4": Nibbles(NF4, 64, is_high_first=True),
    "mxfp4": Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"),
    "nvfp4": Nibbles(E2M1, 16, is_high_first=False, scale="F8_E4M3"),
    "fp4-ue5m3": Nibbles(E2M1, 16, is_high_first=False, scale="UE5M3"),
    "odd": Nibbles(NF4, 7, is_high_first=False, scale="F16"),
    "nested": NestedNibbles(NF4, 64, 256, 0.0123456789),
    "nvfp4, one for all": Nvfp4(is_divided=True, num_stored=16),
}
packed = pytest.mark.parametrize("format", PACKED.values(), ids=PACKED)
ROTATED = Rotated(Affine(4, (4, 1, 1, 2), 128))
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def stored(format: Format, num_elements: int, offset: int = 0) -> list[torch.Tensor]:
    """Parts of a packed tensor on the device, of any codes; each begins `offset` of its elements after an allocation.
    Scales of eight bits are below e4m3's NaN."""
    made = []
    for part in format.parts((num_elements,)):
        shape = (offset + part.shape[0],)
        if part.dtype not in ("U8", "F8_E4M3"):
            found = torch.randn(shape, device=DEVICE).to(SCALE_DTYPES[part.dtype])
        else:
            most = 127 if part.suffix == "scales" else 256
            found = torch.randint(0, most, shape, dtype=torch.uint8, device=DEVICE)
            found = found.view(SCALE_DTYPES.get(part.dtype, torch.uint8))
        made.append(found[offset:])
    return made


def defined(
    format: Format, parts: list[torch.Tensor], num: int, dtype: torch.dtype
) -> torch.Tensor:
    """What the format's definition makes of parts, on the CPU."""
    expected = torch.empty(num, dtype=dtype)
    format.by_torch([part.cpu() for part in parts], expected)
    return expected


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.cpu().view(bits), b.cpu().view(bits))


@pytest.mark.parametrize("format", [*PACKED.values(), ROTATED], ids=[*PACKED, "rotated"])
@every_dtype
def test_packed_tensors_have_the_bits_of_their_definition(
    dtype: torch.dtype, format: Format
) -> None:
    """Where a thread's bytes can be joined into one access, and where not; in several programs."""
    for num in (1, 5 * 8192 + 77, 5 * 8192 + 512 + 16):
        for offset in (0, 1):
            parts = stored(format, num, offset)
            found = torch.full((num + offset + 8,), 7.0, dtype=dtype, device=DEVICE)
            unpack(format, parts, found[offset : num + offset])
            assert equal_bits(found[offset : num + offset], defined(format, parts, num, dtype))
            assert (found[:offset] == 7).all()
            assert (found[num + offset :] == 7).all()


@pytest.mark.parametrize("scale", [torch.nan, torch.inf])
def test_what_is_no_number_is_one_nan_on_the_device(scale: float) -> None:
    """Whose bits are the same on every device."""
    pytest.importorskip("triton")
    codes = torch.full((512,), 7, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((8,), scale, dtype=torch.bfloat16, device=DEVICE)
    found = torch.empty(512, dtype=torch.bfloat16, device=DEVICE)
    unpack(Affine(8, (8,)), (codes, scales, codes[:8]), found)  # (7 - 7) x scale
    assert (found.view(torch.int16) == 0x7FC0).all()


@pytest.mark.parametrize(
    "format", [Affine(1, (1,)), Nibbles(NF4, 64, True)], ids=["affine", "nibbles"]
)
def test_packed_tensors_of_more_than_two_billion_elements(format: Format) -> None:
    num, first = 2**31 + 8192 + 77, 2**31 - 512
    if torch.cuda.mem_get_info(DEVICE)[0] < 9e9:
        pytest.skip("needs 9 GB of free device memory")
    parts = stored(format, num)
    found = torch.empty(num, dtype=torch.bfloat16, device=DEVICE)
    unpack(format, parts, found)
    ends = format.parts((first,))  # whole tiles and blocks: the rest is a tensor of its own
    rest = [part[end.shape[0] :] for part, end in zip(parts, ends, strict=True)]
    assert equal_bits(found[first:], defined(format, rest, num - first, torch.bfloat16))


@packed
@floats
def test_packed_tensors_and_directions_in_one_pass(dtype: torch.dtype, format: Format) -> None:
    pytest.importorskip("triton")
    from ssdtune.kernels.unpack_triton import unpack_add_triton

    num = 3 * 8192 + 77
    parts = stored(format, num)
    for kind in KINDS:
        directions = [Direction(2**63 + 2**31 + 1, 0.03, kind), Direction(1, -0.5, kind)]
        for some in (directions[:1], directions):
            found = torch.empty(num, dtype=dtype, device=DEVICE)
            unpack_add_triton(format, parts, found, some)
            expected = defined(format, parts, num, dtype)
            add_directions(expected, expected, some)
            assert equal_bits(found, expected)


@floats
@pytest.mark.parametrize(
    "format", [Affine(4, (4,)), Affine(5, (4, 1), 32), Affine(8, (4, 1, 1, 2), 128)], ids=str
)
def test_products_with_packed_weights(format: Affine, dtype: torch.dtype) -> None:
    """Within the error that its sums may have; the same bits each time."""
    pytest.importorskip("triton")
    from ssdtune.kernels.matmul_triton import matmul_triton

    for rows, columns, tokens in ((1000, 2048, 1), (33, 1088, 5), (4096, 192, 16)):
        parts = stored(format, rows * columns)
        x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
        found = matmul_triton(format, parts, x, rows)
        weights = defined(format, parts, rows * columns, dtype).view(rows, columns).double()
        exact = x.cpu().double() @ weights.t()
        allowed = columns * 2**-23 * (x.cpu().double().abs() @ weights.abs().t())
        assert ((found.cpu() - exact).abs() <= allowed).all()
        assert equal_bits(found, matmul_triton(format, parts, x, rows))


@pytest.mark.parametrize("key", [None, 2**63 + 2**31 + 5])
@every_dtype
def test_activations_in_a_byte_each_have_the_bits_that_the_cpu_makes(
    dtype: torch.dtype, key: int | None
) -> None:
    pytest.importorskip("triton")
    values = torch.randn(77, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[3, 5] = torch.nan
    found, expected = pack(values.to(DEVICE), key=key), pack(values, key=key)
    assert torch.equal(found[0].cpu(), expected[0])
    assert equal_bits(found[1], expected[1])
    out = torch.empty(values.shape, dtype=dtype, device=DEVICE)
    unpack(format_of(128), found, out)
    wanted = torch.empty(values.shape, dtype=dtype)
    unpack(format_of(128), expected, wanted)
    assert torch.equal(out.cpu().nan_to_num(5), wanted.nan_to_num(5))


def test_a_block_comes_back_from_the_device_as_it_was_changed(tmp_path: Path) -> None:
    """Zeroth-order steps of all weights with every block written back: the losses of blocks that take all steps anew."""
    found = []
    base = tiny_models.build("llama", dtype=torch.float32)
    tiny_models.save(base, tmp_path / "model")
    for fold in (None, Fold(tmp_path / "scratch", 1)):
        meta = build_meta(tmp_path / "model")
        storage = choose_storage(tmp_path / "model").storage
        made = Options(device=DEVICE, budgets=Budgets(ram_bytes=0), storage=storage)
        least = smallest_budgets(meta, made)
        model: Any = assemble(
            build_meta(tmp_path / "model"), dataclasses.replace(made, budgets=least)
        )
        method = ZerothOrder(model, MeZO(eps=1e-2), fold=fold)
        batch = {k: v.to(DEVICE) for k, v in tiny_models.batch("llama", 2, 12).items()}
        losses = [
            method.step([lambda m=model, b=batch: m(**b)], learning_rate=1e-3).losses
            for _ in range(5)
        ]
        found.append(losses)
        model.ssdtune.close()
        method.close()
    assert found[0] == found[1]


def test_what_other_libraries_quantized_has_the_bits_of_its_definition() -> None:
    pytest.importorskip("triton")
    import test_device_decoders as decoders
    from test_gguf import blocks_of

    cases = [
        (f, d, decoders.random_parts(f, decoders.SHAPE), decoders.SHAPE) for f, d in decoders.CASES
    ]
    for kind in decoders.KERNELS:
        blocks = blocks_of(kind, 150).reshape(-1)
        shape = (150 * decoders.KINDS[kind].block,)
        cases.append((decoders.Ggml(kind), torch.bfloat16, [blocks], shape))
    for format, dtype, parts, shape in cases:
        expected, found = (
            torch.empty(shape, dtype=dtype),
            torch.empty(shape, dtype=dtype, device=DEVICE),
        )
        format.by_torch(parts, expected)
        unpack(format, [part.to(DEVICE) for part in parts], found)
        bits = decoders.BITS[dtype]
        known = ~expected.isnan()
        assert torch.equal(found.cpu().isnan(), ~known), format
        assert torch.equal(found.cpu().view(bits)[known], expected.view(bits)[known]), format


def test_codes_take_a_step_as_on_a_processor() -> None:
    format, size = Affine(8, (4, 1, 1, 2)), 100_000
    made = quantize_affine(torch.randn(size), format.order)
    here = [made[part.suffix] for part in format.parts((size,))]
    there = [part.to(DEVICE) for part in here]
    move = Move((Direction(5, 0.01, GAUSSIAN),), 0.999, 7)
    for parts in (here, there):
        requantize(format, parts, (size,), move)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, here, strict=True))
