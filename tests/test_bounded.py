"""Memory: bounded whatever the depth, under a limit that the weights alone pass three times over, and as predicted.

Each run is a process of its own in a memory cgroup, whose limit leaves a third of the weights' bytes over what the
bare process holds. Where no group can be made, its measured peak is held against the same number.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import padded, with_lora
from transformers import LlamaConfig

from ssdtune.schedule.choices import Request
from ssdtune.schedule.memory import (
    HOLES,
    HOLES_SHARE,
    INPUTS,
    SPARE_SHARE,
    Fixed,
    Footprint,
    Peak,
    predict_peak,
    room_for_weights,
)
from ssdtune.schedule.plan import BlockShape, Budgets, Tier
from ssdtune.schedule.planner import make_plan, plain_orders
from ssdtune.swap.inputs import staging_bytes
from ssdtune.visit import memory
from ssdtune.visit.live_bytes import LiveBytes
from ssdtune.visit.rehearsal import rehearse

CHILD = Path(__file__).parent / "bounded_child.py"
VOCAB = 1024
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama-shaped model in fp32 and the batch it trains on. `shallow`, `deep`: numbers of layers."""

    hidden: int
    shallow: int
    deep: int
    tokens: int
    rows: int = 4

    def config(self, layers: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            vocab_size=VOCAB,
            use_cache=False,
            architectures=["LlamaForCausalLM"],
            dtype="float32",
        )


SMALL = Size(hidden=640, shallow=8, deep=24, tokens=32)
LARGE = Size(hidden=1408, shallow=24, deep=48, tokens=512)


# ------------------------------------------------------------------ a model on disk, never in memory


def write_model(size: Size, folder: Path) -> None:
    """`folder/<layers>` for both depths: one shard per layer, written one by one; shards are shared by links."""
    from safetensors.torch import save_file

    h, inner = size.hidden, size.hidden * 11 // 4
    random = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * 0.02

    norms = {
        "input_layernorm.weight": torch.ones(h),
        "post_attention_layernorm.weight": torch.ones(h),
    }
    layer = {f"self_attn.{n}_proj.weight": weight(h, h) for n in "qkvo"} | norms
    layer |= {f"mlp.{n}_proj.weight": weight(inner, h) for n in ("gate", "up")}
    layer["mlp.down_proj.weight"] = weight(h, inner)
    for layers in (size.deep, size.shallow):
        own = folder / str(layers)
        own.mkdir(parents=True)
        size.config(layers).save_pretrained(own)
        outer = {
            "model.embed_tokens.weight": weight(VOCAB, h),
            "model.norm.weight": torch.ones(h),
            "lm_head.weight": weight(VOCAB, h),
        }
        save_file(outer, own / "model-outer.safetensors", metadata={"format": "pt"})
        places = dict.fromkeys(outer, "model-outer.safetensors")
        for i in range(layers):
            shard = f"model-{i:03}.safetensors"
            named = {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
            places |= dict.fromkeys(named, shard)
            if layers == size.deep:
                save_file(named, own / shard, metadata={"format": "pt"})
            else:
                os.link(folder / str(size.deep) / shard, own / shard)
        index = {"metadata": {}, "weight_map": places}
        (own / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Size], Path]]:
    """Folders of models, each written once, gone after this file's tests."""
    made: dict[Size, Path] = {}

    def folder_of(size: Size) -> Path:
        if size not in made:
            made[size] = tmp_path_factory.mktemp(f"hidden{size.hidden}-")
            write_model(size, made[size])
        return made[size]

    yield folder_of
    for folder in made.values():
        for file in folder.rglob("*.safetensors"):
            file.unlink()


# ------------------------------------------------------------------ a process with a limit


@contextlib.contextmanager
def memory_group() -> Iterator[Path | None]:
    """A fresh memory cgroup below this process's own, or None where it may not be made."""
    group = None
    for root, kind in (
        (Path("/sys/fs/cgroup/memory"), ":memory:"),
        (Path("/sys/fs/cgroup"), "0::"),
    ):
        lines = [x for x in Path("/proc/self/cgroup").read_text().splitlines() if kind in x]
        if not lines:
            continue
        own = lines[0].partition(kind)[2].lstrip("/")
        parent = root / own if (root / own / "cgroup.procs").exists() else root
        candidate = parent / f"ssdtune-test-{os.getpid()}"
        try:
            candidate.mkdir()
        except OSError:
            continue
        if any((candidate / n).exists() for n in ("memory.limit_in_bytes", "memory.max")):
            group = candidate
            break
        candidate.rmdir()
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def run(
    size: Size,
    layers: int,
    folder: Path,
    *,
    mode: str = "streamed",
    inputs: str = "device",
    threads: int = 1,
    is_limited: bool = True,
    freed: int = 0,
) -> tuple[int, dict[str, Any]]:
    """The run's exit status and results. Its limit: a third of the weights over the bare process.

    freed: bytes that the process has taken and freed before."""
    headroom = weight_bytes(folder / str(layers)) // 3
    with memory_group() if is_limited else contextlib.nullcontext() as group:
        job = {
            "folder": str(folder / str(layers)),
            "mode": mode,
            "block_inputs": inputs,
            "scratch": str(folder / "scratch"),
            "group": group and str(group),
            "headroom": headroom,
            "freed": freed,
            "rows": size.rows,
            "tokens": size.tokens,
            "threads": threads,
            "vocab": VOCAB,
        }
        done = subprocess.run(
            [sys.executable, str(CHILD), json.dumps(job)],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    result = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {}
    result |= {"headroom": headroom, "has_group": group is not None, "stderr": done.stderr[-3000:]}
    return done.returncode, result


def run_streamed(size: Size, layers: int, folder: Path, **how: Any) -> dict[str, Any]:
    """A run that must live, and whose peak must be the predicted one within 10 %."""
    status, result = run(size, layers, folder, **how)
    assert status == 0, f"exit status {status}: {result['stderr']}"
    megabytes = {k: round(v / 1e6) for k, v in result.items() if isinstance(v, int) and v > 10**5}
    print(f"{layers} layers, {how}: MB {megabytes}, {result['trims']} trims")
    assert result["how"].startswith("rehearsed")
    assert result["peak"] / result["predicted"] == pytest.approx(1, abs=0.1), megabytes
    if how.get("is_limited", True):
        assert result["peak"] - result["base"] <= result["headroom"], megabytes
    return result


def beyond_nature(result: dict[str, Any]) -> int:
    """The peak without what grows by nature and was announced: adapters, states, kept inputs, masks."""
    return result["peak"] - result["natural"]


def assert_killed(size: Size, layers: int, folder: Path) -> None:
    """Under the same limit a process that holds the weights does not live, or the limit would prove nothing."""
    status, result = run(size, layers, folder, mode="in_memory")
    if not result["has_group"]:
        pytest.skip(
            "no memory cgroup may be made here: the streamed runs' peaks were measured instead"
        )
    assert status == -signal.SIGKILL, (status, result)


def test_weights_three_times_the_limit_train_in_as_little_as_a_third_of_the_layers(
    written: Callable[[Size], Path],
) -> None:
    folder = written(SMALL)
    deep = run_streamed(SMALL, SMALL.deep, folder)
    shallow = run_streamed(SMALL, SMALL.shallow, folder, is_limited=False)
    assert beyond_nature(deep) == pytest.approx(beyond_nature(shallow), rel=0.05)


def test_what_was_freed_before_a_run_is_not_counted_twice(
    written: Callable[[Size], Path],
) -> None:
    """Half a gigabyte of holes in the heap: far more than the run takes."""
    freed = 500 * MIB
    found = run_streamed(SMALL, SMALL.shallow, written(SMALL), is_limited=False, freed=freed)
    assert found["given_back"] > 0.9 * freed


def test_the_same_model_in_memory_does_not_survive_that_limit(
    written: Callable[[Size], Path],
) -> None:
    assert_killed(SMALL, SMALL.deep, written(SMALL))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_24_and_48_layers_take_the_same_and_less_with_block_inputs_on_nvme(
    written: Callable[[Size], Path],
) -> None:
    """4 x 512 tokens, rank 16, each under a limit of a third of its own weights."""
    folder, threads = written(LARGE), os.cpu_count() or 1
    shallow = run_streamed(LARGE, LARGE.shallow, folder, threads=threads)
    deep = run_streamed(LARGE, LARGE.deep, folder, threads=threads)
    on_nvme = run_streamed(LARGE, LARGE.deep, folder, inputs="nvme", threads=threads)
    assert beyond_nature(deep) == pytest.approx(beyond_nature(shallow), rel=0.05)
    kept = LARGE.deep * LARGE.rows * LARGE.tokens * LARGE.hidden * 4
    assert on_nvme["stored"] >= kept
    assert on_nvme["peak"] < deep["peak"] - 0.7 * kept, "inputs on NVMe are not in RAM"
    assert beyond_nature(on_nvme) - staging_bytes(Tier.NVME) == pytest.approx(
        beyond_nature(deep), rel=0.05
    )
    assert on_nvme["loss"] == deep["loss"], "the same bits by another way"
    assert_killed(LARGE, LARGE.deep, folder)


# ------------------------------------------------------------------ the prediction's parts


@pytest.mark.parametrize(
    ("name", "is_padded"),
    [
        *((name, False) for name in ("llama", "gemma3", "mamba2", "mixtral")),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("gpt2", "bloom")),
        ("gemma3", True),
    ],
)
def test_what_is_rehearsed_is_what_a_step_allocates(
    name: str, is_padded: bool, tmp_path: Path, stream: Callable[..., Any]
) -> None:
    """Live bytes of tensors, counted operator by operator in a real step, against the prediction.

    Padded: every micro-batch has masks of its own.
    """
    base = tiny_models.build(name)
    tiny_models.save(base, tmp_path)
    model = stream(tmp_path, model_class=type(base), options={"chunk_tokens": 64})
    adapted = with_lora(model, ["in_proj"] if name == "mamba2" else tiny_models.lora_targets(base))
    batch = tiny_models.batch(name, 8, 128)
    if is_padded:
        batch = padded(batch, [128 - row for row in range(8)])
    before = torch.get_rng_state()
    footprint = rehearse(adapted, {k: v[:2] for k, v in batch.items()}).footprint
    assert torch.equal(torch.get_rng_state(), before)
    assert footprint.how.startswith("rehearsed")
    with LiveBytes() as live:
        adapted(**batch).loss.backward()
    gradients = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    each = footprint.kept_bytes + footprint.held_bytes + footprint.hidden_bytes
    predicted = 4 * each + max(footprint.workspace_bytes, footprint.loss_bytes)
    assert live.peak <= 1.1 * (predicted + gradients)
    assert live.peak >= 0.8 * predicted
    assert adapted(**batch).loss.isfinite(), "the rehearsal left the model as it was"


@pytest.mark.parametrize(
    ("name", "lengths", "num_masks"),
    [("llama", [17, 12] * 4, 1), ("llama", range(17, 9, -1), 4), ("gemma3", [17, 12] * 4, 2)],
    ids=["llama", "llama, each padded otherwise", "gemma3"],
)
def test_equal_masks_of_micro_batches_are_kept_once(
    name: str,
    lengths: Sequence[int],
    num_masks: int,
    tmp_path: Path,
    stream: Callable[..., Any],
) -> None:
    """By what visits save for backward: a mask of each kind, or one for each way that rows are padded."""
    tiny_models.save(tiny_models.build(name), tmp_path)
    adapted = with_lora(stream(tmp_path, micro_batch_size=2))
    batch = padded(tiny_models.batch(name, 8, 17), lengths)
    # The first time, blocks run with a graph, which saves as well.
    adapted(**batch).loss.backward()
    masks: dict[int, torch.Tensor] = {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape[-2:] == (17, 17):
            masks[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        loss = adapted(**batch).loss
    assert len(masks) == num_masks
    loss.backward()


@pytest.mark.parametrize(("name", "mask_bytes"), [("llama", 2 * 17**2), ("gemma3", 3 * 17**2)])
def test_masks_are_counted_for_each_micro_batch(
    name: str, mask_bytes: int, tmp_path: Path, stream: Callable[..., Any]
) -> None:
    """Booleans [2, 17, 17], for Gemma 3 twice. Without padding Llama has none, Gemma 3 one for both rows."""
    tiny_models.save(tiny_models.build(name), tmp_path)
    adapted = with_lora(stream(tmp_path, micro_batch_size=2))
    batch = tiny_models.batch(name, 2, 17)
    plain, masked = (rehearse(adapted, x).footprint for x in (batch, padded(batch, [17, 12])))
    assert masked.held_bytes - plain.held_bytes == mask_bytes


def test_a_model_that_cannot_be_rehearsed_is_estimated_and_said_to_be(
    tmp_path: Path, stream: Callable[..., Any]
) -> None:
    """A forward that branches on a value, which tensors without memory have not."""
    base = tiny_models.build("llama")
    tiny_models.save(base, tmp_path)
    adapted = with_lora(stream(tmp_path, model_class=type(base)), tiny_models.lora_targets(base))
    norm = adapted.get_base_model().model.norm
    plain = norm.forward
    norm.forward = lambda hidden: plain(hidden if hidden.isfinite().all() else hidden.nan_to_num())
    batch = tiny_models.batch("llama", 2, 32)
    footprint = rehearse(adapted, {"input_ids": batch["input_ids"]}).footprint
    assert "by formula" in footprint.how
    sizes = dataclasses.asdict(footprint)
    for name in ("activation_bytes", "forward_held_bytes"):
        assert not sizes.pop(name), "no formula knows them"
    assert min(size for name, size in sizes.items() if name != "how") > 0


def small_plan(*, on_device: bool, inputs: Tier, directly: bool = False) -> Any:
    blocks = tuple(
        BlockShape(name=f"layers.{i}", slot_bytes=10 * MIB, file_bytes=10 * MIB) for i in range(6)
    )
    return make_plan(
        Request(
            blocks=blocks,
            orders=plain_orders(6),
            budgets=Budgets(
                ram_bytes=25 * MIB, device_bytes=(45 if directly else 25) * MIB * on_device
            ),
            on_device=on_device,
            buffers_on_device=directly,
            block_inputs=inputs,
        )
    )


def grown(before: Peak, after: Peak) -> int:
    """By how many bytes, the allowance for the heap's holes apart."""
    totals = [p.ram_bytes + p.device_bytes - p.ram.get(HOLES, 0) for p in (before, after)]
    return totals[1] - totals[0]


@pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("inputs", list(Tier))
def test_every_part_is_counted_once_and_where_it_is(on_device: bool, inputs: Tier) -> None:
    footprint = Footprint(
        kept_bytes=3 * MIB,
        hidden_bytes=MIB // 2,
        held_bytes=MIB,
        workspace_bytes=7 * MIB,
        loss_bytes=5 * MIB,
        how="given",
    )
    fixed = Fixed(
        base_bytes=100 * MIB,
        resident_bytes=2 * MIB,
        trained_bytes=4 * MIB,
        gradient_bytes=4 * MIB,
        optimizer_bytes=8 * MIB,
    )
    plan = small_plan(on_device=on_device, inputs=inputs)
    four, five = (predict_peak(plan, footprint, fixed, num_micro_batches=n) for n in (4, 5))
    on_nvme = inputs is Tier.NVME
    assert four.natural_bytes == (16 + 4 + (0 if on_nvme else 12)) * MIB
    assert grown(four, five) == (1 + 0.5 + (0 if on_nvme else 3)) * MIB
    in_ram = inputs is Tier.RAM or not on_device
    kept = four.nvme if on_nvme else four.ram if in_ram else four.device
    assert kept[INPUTS] == 12 * MIB
    assert sum(INPUTS in parts for parts in (four.nvme, four.ram, four.device)) == 1
    assert (four.device_bytes > 0) == on_device
    if not on_device:
        assert four.ram_bytes == sum(four.ram.values()) >= (100 + 20 + 2 + 16 + 4 + 2 + 7) * MIB
    text = "\n".join(four.lines())
    assert "predicted (given)" in text
    assert "process before the model" in text


def test_buffers_are_counted_where_they_are() -> None:
    """On the device or in RAM, once; blocks that stay in RAM beside them."""
    footprint = Footprint(
        kept_bytes=0, hidden_bytes=0, held_bytes=0, workspace_bytes=0, loss_bytes=0, how="given"
    )
    fixed = Fixed(
        base_bytes=0, resident_bytes=0, trained_bytes=0, gradient_bytes=0, optimizer_bytes=0
    )
    for directly in (False, True):
        plan = small_plan(on_device=True, inputs=Tier.DEVICE, directly=directly)
        peak = predict_peak(plan, footprint, fixed, num_micro_batches=1)
        with_buffers, without = (peak.device, peak.ram) if directly else (peak.ram, peak.device)
        assert with_buffers["buffers"] == sum(plan.buffers) > 0
        assert "buffers" not in without
        assert peak.device_bytes == plan.device_bytes
        assert peak.ram["weights that stay in RAM"] == 10 * MIB * plan.tiers.count(Tier.RAM)
        assert peak.ram_bytes == plan.ram_bytes + peak.ram["math libraries"]


def test_of_what_is_free_weights_take_a_share_beyond_the_least() -> None:
    """And where it is too little, all that there is: never more than the shortage allows."""
    given = {"weights_bytes": 100, "least_bytes": 100}
    for is_heap, holes in ((False, 1.0), (True, 1 + HOLES_SHARE)):
        room = [
            room_for_weights(free, peak_bytes=950, is_heap=is_heap, **given)
            for free in (2000, 1000, 900)
        ]
        assert room[0] == pytest.approx(100 + SPARE_SHARE * 950 / holes, abs=1)
        assert room[1] == pytest.approx(100, abs=1)
        assert room[2] == pytest.approx(100 - 95 / holes, abs=1)
    # However much of the weights the plan holds whose peak is known.
    other = room_for_weights(
        2000, peak_bytes=1050, weights_bytes=200, least_bytes=100, is_heap=False
    )
    assert other == pytest.approx(100 + SPARE_SHARE * 950, abs=1)


def test_the_heap_is_cleaned_up_only_when_too_much_is_held() -> None:
    held, trims = [90, 99, 101, 100, 150], []
    keeper = memory.HeapKeeper(100, held=lambda: held.pop(0), trim=lambda: trims.append(len(held)))
    for _ in range(5):
        keeper()
    assert trims == [2, 0]
    assert keeper.num_trims == 2
