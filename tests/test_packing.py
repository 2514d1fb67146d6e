"""A packed model trains as its decoded twin does in memory, and a damaged one says what is wrong."""

import json
import math
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_zeroth_order
import tiny_models
import torch
from pairs import by_turns
from safetensors.torch import load_file, save_file
from support import LORA_TARGETS, Pair, assert_same_training, digests, num_misses, with_lora

from ssdtune.cli import main
from ssdtune.durable import LOCK_NAME, DurableError
from ssdtune.errors import SSDTuneError
from ssdtune.kernels import quantize
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.nibbles import E2M1
from ssdtune.kernels.quantize_affine import encoder_of
from ssdtune.kernels.quantize_nibbles import quantize_nibbles
from ssdtune.kernels.rotated import Rotated
from ssdtune.packing.convert import pack
from ssdtune.packing.encoding import encoded
from ssdtune.packing.layout import MIN_ELEMENTS, PackError, groups_of, imagined, is_worth_packing
from ssdtune.packing.once import build_packed, build_planned
from ssdtune.packing.sample import lossless_ratio
from ssdtune.packing.shards import ShardWriter
from ssdtune.packing.squares import Squares
from ssdtune.packing.wanted import FIRST_NVFP4, Wanted
from ssdtune.swap import storage as swap_storage
from ssdtune.swap.beside import copy_beside
from ssdtune.swap.header import CheckpointError, TensorEntry, read_header
from ssdtune.swap.pack_header import VERSION
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.recipe import TensorView
from ssdtune.swap.source import Checkpoint
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.build import build_meta
from ssdtune.visit.placement import FILE_DTYPES
from ssdtune.zeroth_order import Fold, MeZO, ZerothOrder

Stream = Callable[..., Any]
FORMATS = {
    "4": Wanted(bits=4),
    "3": Wanted(bits=3),
    "8": Wanted(bits=8, order=(4, 1, 1, 2)),
    "rotated": Wanted(bits=3, is_rotated=True),
    "nf4": Wanted("nf4"),
    "mxfp4": Wanted("mxfp4"),
    "nvfp4": Wanted("nvfp4"),
    "fp4-ue5m3": Wanted("fp4-ue5m3"),
    "fp8": Wanted("fp8"),
    "lossless": Wanted("lossless"),
}
NORM = "model.layers.2.input_layernorm.weight"  # stays as it is, among packed tensors


def packed(folder: Path, out: Path, wanted: Wanted) -> Path:
    """The model of `folder`, packed."""
    meta = build_meta(folder)
    pack(meta, groups_of(meta, wanted.chosen()), out, storage=choose_storage(folder).storage)
    return out


def decoded(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the files stand for, read and decoded without anything of the engine."""
    files = {path: load_file(path) for path in checkpoint.files}
    values: dict[str, torch.Tensor] = {}
    for name, entry in checkpoint.tensors.items():
        if isinstance(entry, PackedEntry):
            values[name] = torch.empty(entry.shape, dtype=dtype)
            parts = [files[part.path][part.name].view(part.shape) for part in entry.parts]
            entry.format.by_torch(parts, values[name])
        else:
            values[name] = files[entry.path][entry.name].to(dtype)
    return values


def write_aligned(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A file whose matrices begin on cache lines, as they do in slots: products with one row round differently on
    others."""
    names = sorted(tensors, key=lambda name: tensors[name].nbytes % 64 != 0)
    dtypes = {dtype: name for name, dtype in FILE_DTYPES.items()}
    with ShardWriter(path, 60_000) as writer:
        for name in names:
            writer.add(name, dtypes[tensors[name].dtype], tensors[name].contiguous())
        writer.finish({"format": "pt"})


def unpacked_twin(
    folder: Path,
    out: Path,
    dtype: torch.dtype,
    bits: int | None = None,
    checkpoint: Checkpoint | None = None,
) -> Path:
    """The same weights, plain, in a folder that from_pretrained reads. checkpoint: the folder's as it is read, instead of
    at so many bits."""
    out.mkdir()
    checkpoint = checkpoint or build_meta(folder, bits=bits).checkpoint
    write_aligned(decoded(checkpoint, dtype), out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def make_pair(
    name: str,
    folder: Path,
    stream: Stream,
    wanted: Wanted,
    *,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    adapt: Callable[[Any], Any] | None = None,
) -> Pair:
    """A packed model streamed, and its decoded twin in memory."""
    base = tiny_models.build(name, dtype=dtype)
    tiny_models.save(base, folder / "source")
    there = packed(folder / "source", folder / "packed", wanted)
    twin = unpacked_twin(there, folder / "twin", dtype, bits)
    targets = LORA_TARGETS.get(name, tiny_models.lora_targets(base))
    adapt = adapt or partial(with_lora, targets=targets)
    plain = adapt(type(base).from_pretrained(twin, dtype=dtype))
    streamed = stream(there, model_class=type(base), micro_batch_size=2, bits=bits)
    return Pair(name, there, plain, adapt(streamed))


def batches(name: str, num_steps: int = 5) -> list[dict[str, Any]]:
    return [tiny_models.batch(name, 4, 17 - s % 2, seed=s) for s in range(num_steps)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    by_turns(["llama", "gpt2", "qwen3_moe", "gemma3", "phi3", "mixtral"]),
)
def test_five_steps_equal_training_on_the_decoded_weights(
    name: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    pair = make_pair(name, tmp_path, stream, FORMATS["4"], dtype=dtype)
    before = digests(tmp_path)
    assert_same_training(pair, batches(name), num_micro=2)
    assert num_misses(pair.engine) == 0
    assert digests(tmp_path) == before
    assert any(shape.is_packed for shape in pair.engine.plan.blocks)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_trains_to_the_bit(kind: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, FORMATS[kind], dtype=torch.bfloat16)
    assert_same_training(pair, batches("llama", 5 if kind == "fp8" else 2), num_micro=2)
    layer = tiny_models.build("llama").model.layers[0]
    sizes = (p.numel() for p in layer.parameters() if p.ndim == 2)
    packed_bytes = 2 * sum(numel for numel in sizes if numel >= MIN_ELEMENTS)
    kinds = {"8": "wide", "fp8": "bytes", **{k: k for k in ("rotated", "nvfp4", "lossless")}}
    expected = {kinds[kind]: packed_bytes} if kind in kinds else {}
    assert dict(pair.engine.plan.blocks[1].decoding) == expected, "priced as what it is"


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_nested_codes_are_read_at_fewer_bits(bits: int, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair("llama", tmp_path, stream, FORMATS["8"], bits=bits)
    assert_same_training(pair, batches("llama", 2), num_micro=2)
    read = {b.name: b.file_bytes for b in pair.engine.plan.blocks}
    whole = {b.name: b.file_bytes for b in stream(pair.folder).ssdtune.engine.plan.blocks}
    assert sum(read.values()) < sum(whole.values())
    kinds = {kind for block in pair.engine.plan.blocks for kind, _ in block.decoding}
    assert kinds == ({"wide"} if bits > 4 else set()), "as it is read, not as it is stored"


# ------------------------------------------------------------------ what is written


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.save(
        tiny_models.build("llama", dtype=torch.bfloat16), tmp_path / "source", "100KB"
    )


def test_what_is_not_worth_packing_is_kept_to_the_bit(source: Path, tmp_path: Path) -> None:
    there = packed(source, tmp_path / "packed", FORMATS["4"])
    before, after = (build_meta(folder).checkpoint for folder in (source, there))
    assert before.tensors.keys() == after.tensors.keys()
    plain = {n for n, e in after.tensors.items() if not isinstance(e, PackedEntry)}
    small = ("norm.weight", "k_proj.weight", "v_proj.weight")  # 32 x 64
    assert plain == {n for n in before.tensors if n.endswith(small)}
    values = [decoded(checkpoint, torch.bfloat16) for checkpoint in (before, after)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in plain)
    for name in before.tensors.keys() - plain:
        error = (values[1][name].float() - values[0][name].float()).norm()
        assert 0 < error < 0.15 * values[0][name].float().norm(), name


def test_routers_stay_as_they_are(tmp_path: Path) -> None:
    """Of 64 experts, so that they are large enough to be packed; the experts themselves are."""
    config = tiny_models.CONFIGS["qwen3_moe"]()
    config.num_experts, config.moe_intermediate_size, config.num_hidden_layers = 64, 64, 1
    model = tiny_models.auto_class("qwen3_moe").from_config(config, dtype=torch.bfloat16)
    meta = build_meta(tiny_models.save(model, tmp_path / "source"))
    router = "model.layers.0.mlp.gate.weight"
    assert meta.checkpoint.tensors[router].shape == (64, 64)
    for kind, is_kept in (("4", True), ("nf4", True), ("lossless", False)):
        made = {n for g in groups_of(meta, FORMATS[kind].chosen()) for n in g.formats}
        assert (router not in made) == is_kept
        assert any(".experts." in name for name in made)


@pytest.mark.parametrize(
    ("name", "shape", "is_packed"),
    [
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 4096), False),
        ("model.layers.0.mlp.router.weight", (128, 2880), False),
        ("transformer.blocks.0.ffn.router.layer.weight", (16, 6144), False),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 8192), False),
        ("model.layers.0.mlp.gate_proj.weight", (14336, 4096), True),
        ("model.layers.0.mlp.gate.weight", (14336, 4096), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 28672, 4096), True),
    ],
)
def test_a_router_is_known_by_its_name_and_rows(
    name: str, shape: tuple[int, ...], is_packed: bool
) -> None:
    entry = TensorEntry(name, Path("model.safetensors"), "BF16", shape, 0, 2 * math.prod(shape))
    assert is_worth_packing(entry, FORMATS["4"].chosen()) == is_packed


def test_what_lies_beside_weights_is_copied_with_a_config_that_is_true(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "quantize_config.json",
        "hf_quant_config.json",
        ".mine.json",
    ):
        (source / name).write_text("{}")
    copy_beside(source, out)
    assert sorted(p.name for p in out.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}, "a": 1}')
    copy_beside(source, out)
    assert json.loads((out / "config.json").read_text()) == {"a": 1}
    copy_beside(source, out, quantization={"quant_method": "ssdtune"})
    told = json.loads((out / "config.json").read_text())
    assert told == {"a": 1, "quantization_config": {"quant_method": "ssdtune"}}


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_tensors_are_encoded_side_by_side(source: Path, tmp_path: Path) -> None:
    """One alone has not enough pieces for all threads. The bytes are those of one thread."""
    meta, storage = build_meta(source), choose_storage(source).storage
    groups = groups_of(meta, FORMATS["4"].chosen())
    both, seen = threading.Barrier(2), set[int]()

    def encode(name: str, values: torch.Tensor, format: Any) -> Any:
        is_new = threading.get_ident() not in {*seen, threading.main_thread().ident}
        if is_new:
            seen.add(threading.get_ident())
            both.wait(20)
        return encoded(name, values, format)

    pack(meta, groups, tmp_path / "two", storage=storage, encode=encode)
    assert len(seen) == 2
    torch.set_num_threads(1)
    pack(meta, groups, tmp_path / "one", storage=storage)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_packing_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    once, twice = (packed(source, tmp_path / name, FORMATS["3"]) for name in ("once", "twice"))
    assert digests(once) == digests(twice)


def test_nvfp4_loses_as_much_of_small_weights(tmp_path: Path) -> None:
    errors: list[list[float]] = []
    for name, factor in (("plain", 1.0), ("small", 1e-3)):
        model = tiny_models.build("llama", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        source = tiny_models.save(model, tmp_path / name)
        there = packed(source, tmp_path / f"{name}-packed", FORMATS["nvfp4"])
        checkpoint = build_meta(there).checkpoint
        made = {n for n, e in checkpoint.tensors.items() if isinstance(e, PackedEntry)}
        before, after = (decoded(c, torch.float32) for c in (build_meta(source).checkpoint, checkpoint))  # fmt: skip
        errors.append([float((after[n] - before[n]).norm() / before[n].norm()) for n in made])
    assert sorted(errors[1]) == pytest.approx(sorted(errors[0]), rel=0.01)
    assert 0 < max(errors[0]) < 0.1


def told_by(folder: Path) -> dict[str, Any]:
    """What the first shard says of its packed tensors."""
    return json.loads(read_header(shard_of(folder))[0].metadata["ssdtune.packed"])


def test_a_folder_asks_for_no_newer_reader_than_it_needs(source: Path, tmp_path: Path) -> None:
    for kind, version in (("mxfp4", 1), ("nvfp4", 2), ("fp8", 3)):
        there = packed(source, tmp_path / kind, FORMATS[kind])
        config = json.loads((there / "config.json").read_text())
        assert told_by(there)["version"] == version
        assert config["quantization_config"]["version"] == version


def test_nvfp4_of_version_1_is_read_as_it_was(source: Path, tmp_path: Path) -> None:
    """Scales of blocks alone, which reach down to 2^-9."""
    meta, there = build_meta(source), tmp_path / "packed"
    pack(meta, groups_of(meta, FIRST_NVFP4), there, storage=choose_storage(source).storage)
    told = told_by(there)
    assert told["version"] == 1
    assert told["formats"] == [{"kind": "fp4", "block": 16, "scale": "F8_E4M3"}]
    before = decoded(meta.checkpoint, torch.bfloat16)
    after = decoded(build_planned(there, quantization="nvfp4").checkpoint, torch.bfloat16)
    for name in told["tensors"]:
        parts = quantize_nibbles(before[name], E2M1, 16, "F8_E4M3")
        expected = torch.empty_like(before[name])
        FIRST_NVFP4.by_torch([parts["codes"], parts["scales"]], expected)
        assert after[name].equal(expected)


def test_three_bits_without_loss_are_three(source: Path, tmp_path: Path) -> None:
    command = ["pack", str(source), "--out", str(tmp_path / "packed"), "--format", "lossless"]
    assert main([*command, "--bits", "3"]) == 0
    before, after = (build_meta(f).checkpoint for f in (source, tmp_path / "packed"))
    made = [e.format for e in after.tensors.values() if isinstance(e, PackedEntry)]
    assert made
    assert all(isinstance(format, Lossless) and format.bits == 3 for format in made)
    values = [decoded(checkpoint, torch.bfloat16) for checkpoint in (before, after)]
    assert all(values[0][n].equal(values[1][n]) for n in before.tensors)


def test_a_plan_knows_the_bytes_before_anything_is_packed(source: Path, tmp_path: Path) -> None:
    meta = build_meta(source)
    ahead = imagined(meta.checkpoint, groups_of(meta, FORMATS["4"].chosen()))
    there = build_meta(packed(source, tmp_path / "packed", FORMATS["4"])).checkpoint
    assert {n: e.num_bytes for n, e in ahead.tensors.items()} == {
        n: e.num_bytes for n, e in there.tensors.items()
    }


def test_a_block_is_one_read_at_any_width(source: Path, tmp_path: Path) -> None:
    """What k bits need lies before what they do not."""
    there = packed(source, tmp_path / "packed", FORMATS["8"])
    for bits in (4, 5, 6, 8):
        tensors = build_meta(there, bits=bits).checkpoint.tensors
        layer = [e for n, e in tensors.items() if ".layers.1." in n and isinstance(e, PackedEntry)]
        spans = [(p.start, p.stop) for e in layer for p in e.parts if p.name.endswith("codes.0")]
        beyond = [p.start for e in layer for p in e.parts if p.name.endswith("codes.1")]
        assert not beyond or max(stop for _, stop in spans) <= min(beyond)
        assert len(beyond) == (len(layer) if bits > 4 else 0)


def test_interrupted_packing_goes_on_where_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(source, tmp_path / "whole", FORMATS["4"])
    monkeypatch.setattr("ssdtune.packing.layout.SHARD_BYTES", 30_000)
    meta = build_meta(source)
    groups = groups_of(meta, FORMATS["4"].chosen())
    storage, out = choose_storage(source).storage, tmp_path / "packed"

    class Stopped(Exception):
        pass

    def stop(num_bytes: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stopped

    left = 4
    with pytest.raises(Stopped):
        pack(meta, groups, out, storage=storage, on_progress=stop)
    assert not (out / "config.json").exists()
    shards = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    assert shards, "the test stops before the first shard is whole"
    assert not list(out.glob("*.partial"))
    with pytest.raises(Exception, match=r"config\.json"):
        build_meta(out)
    pack(meta, groups, out, storage=storage)
    assert all(p.stat().st_mtime_ns == at for p, at in shards.items())
    values = [decoded(build_meta(f).checkpoint, torch.float32) for f in (whole, out)]
    assert all(torch.equal(values[0][n], values[1][n]) for n in values[0])
    assert not (out / ".packing.json").exists()


def test_packing_holds_two_groups(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, storage = build_meta(source), choose_storage(source).storage
    groups = groups_of(meta, FORMATS["4"].chosen())
    real, live, counts = swap_storage.anonymous, set[int](), list[int]()

    def counted(num_bytes: int) -> Any:
        memory = real(num_bytes)
        live.add(len(counts))
        weakref.finalize(memory, live.discard, len(counts))
        counts.append(len(live))
        return memory

    monkeypatch.setattr(swap_storage, "anonymous", counted)
    pack(meta, groups, tmp_path / "packed", storage=storage)
    assert len(counts) == len(groups) > 3
    assert max(counts) == 2


def test_another_packing_is_not_continued(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(PackError, match="holds other files"):
        packed(source, out, FORMATS["4"])
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    (out / ".packing.json").write_text('{"key": "of something else"}')
    with pytest.raises(PackError, match="an unfinished packing of another kind"):
        packed(source, out, FORMATS["4"])


def test_two_packings_of_one_folder_are_not_at_work_at_once(source: Path, tmp_path: Path) -> None:
    """The second one would remove what the first is writing, and give its own half-written file the name."""
    meta, out = build_meta(source), tmp_path / "packed"
    groups = groups_of(meta, FORMATS["4"].chosen())
    storage = choose_storage(source).storage

    def meanwhile(num_bytes: int) -> None:
        before = {path: path.stat().st_size for path in out.iterdir()}
        with pytest.raises(DurableError, match="in use by another ssdtune process"):
            pack(meta, groups, out, storage=storage)
        assert before == {path: path.stat().st_size for path in out.iterdir()}
        assert any(path.suffix == ".partial" for path in before)

    pack(meta, groups, out, storage=storage, on_progress=meanwhile)
    assert not (out / LOCK_NAME).exists()
    with pytest.raises(PackError, match="holds a model already"):
        pack(meta, groups, out, storage=storage)
    assert digests(out) == digests(packed(source, tmp_path / "alone", FORMATS["4"]))
    assert not (out / LOCK_NAME).exists()


def test_a_full_disk_is_said_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(source)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PackError, match=r"are missing\. Nothing was written"):
        packed(source, tmp_path / "packed", FORMATS["4"])
    assert not (tmp_path / "packed").exists()
    assert digests(source) == before


def test_a_packed_model_is_not_packed_again(source: Path, tmp_path: Path) -> None:
    there = packed(source, tmp_path / "packed", FORMATS["4"])
    with pytest.raises(PackError, match="packed or quantized already"):
        packed(there, tmp_path / "again", FORMATS["3"])


def test_weights_that_are_no_numbers_are_named(source: Path, tmp_path: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.dim() == 2)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PackError, match=rf"{name} can't be packed"):
        packed(source, tmp_path / "packed", FORMATS["4"])
    assert not list((tmp_path / "packed").glob("*.safetensors*"))


# ------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed once")
    tiny_models.save(tiny_models.build("llama", dtype=torch.bfloat16), folder / "source")
    return packed(folder / "source", folder / "packed", FORMATS["4"])


@pytest.fixture
def there(packed_once: Path, tmp_path: Path) -> Path:
    """A packed model of one's own, to be damaged."""
    return Path(shutil.copytree(packed_once, tmp_path / "packed"))


def shard_of(folder: Path) -> Path:
    return next(folder.glob("model-*.safetensors"))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The first shard's header changed."""
    path = shard_of(folder)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def described(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Changes what the header says of packed tensors."""

    def apply(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        told = json.loads(metadata["ssdtune.packed"])
        change(told)
        metadata["ssdtune.packed"] = json.dumps(told)

    return apply


def first(told: dict[str, Any]) -> dict[str, Any]:
    return next(iter(told["tensors"].values()))


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (described(lambda t: t.update(version=VERSION + 1)), "newer ssdtune"),
    "no version": (described(lambda t: t.pop("version")), "nothing that can be read"),
    "shape": (described(lambda t: first(t).update(shape=[640, 640])), "needs U8"),
    "no format": (described(lambda t: first(t).update(format=7)), "makes no sense"),
    "format before": (described(lambda t: first(t).update(format=-1)), "makes no sense"),
    "format of words": (described(lambda t: t["formats"].insert(0, "affine")), "makes no sense"),
    "shape below": (described(lambda t: first(t).update(shape=[-199, -64])), "makes no sense"),
    "shape of halves": (described(lambda t: first(t).update(shape=[199.0, 64])), "makes no sense"),
    "dtype": (described(lambda t: first(t).update(dtype="BF96")), "makes no sense"),
    "block": (
        described(lambda t: t["formats"][0].update(kind="nf4", block=10**9, scale="BF16")),
        "in blocks of 1000000000",
    ),
    "order": (described(lambda t: t["formats"][0].update(order=[3, 3])), "makes no sense"),
    "group": (described(lambda t: t["formats"][0].update(group=0)), "makes no sense"),
    "kind": (described(lambda t: t["formats"][0].update(kind="magic")), "unknown kind"),
    "group of others": (described(lambda t: t["formats"][0].update(group=128)), "needs BF16"),
    "checksums": (described(lambda t: first(t).pop("checksums")), "makes no sense"),
    "plain": (described(lambda t: t.update(plain=[])), "does not name"),
    "plain of nothing": (described(lambda t: t["plain"].update(x="00")), "and no tensor"),
    "plain of words": (described(lambda t: t["plain"].update({NORM: "x"})), "makes no sense"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str, there: Path) -> None:
    change, message = LIES[lie]
    rewritten(there, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        build_meta(there)
    assert shard_of(there).name in str(caught.value)


def test_a_shard_that_is_cut_short_is_refused(there: Path) -> None:
    path = shard_of(there)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut short"):
        build_meta(there)


def flip_a_bit(folder: Path, name: str) -> TensorEntry:
    """In a tensor, in the first part of it where it is packed; what was changed."""
    entry = build_meta(folder).checkpoint.tensors[name]
    part = entry.parts[0] if isinstance(entry, PackedEntry) else entry
    raw = bytearray(part.path.read_bytes())
    raw[part.start + 100] ^= 4
    part.path.write_bytes(raw)
    return part


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", NORM, "model.norm.weight"])
def test_a_flipped_bit_is_found_where_it_is(name: str, there: Path, stream: Stream) -> None:
    """In codes; in a block's norm, which passes a buffer; in a block of its own, which is read in place."""
    part = flip_a_bit(there, name)
    with pytest.raises(Exception, match="is damaged") as caught:
        stream(there)(**tiny_models.batch("llama"))
    assert part.name in str(caught.value)
    assert str(part.path) in str(caught.value)  # it may be a twin in the cache
    assert f"Remove {there}" in str(caught.value)
    assert name.rpartition(".")[0][:14] in str(caught.value)


def test_a_tensor_that_is_read_alone_is_checked_alone(there: Path, stream: Stream) -> None:
    flip_a_bit(there, NORM)
    state = stream(there).state_dict()
    with pytest.raises(Exception, match="is damaged"):
        state[NORM].clone()
    for name in state.keys() - {NORM}:
        state[name].clone()


def test_files_without_checksums_of_plain_tensors_are_read_as_before(
    there: Path, stream: Stream
) -> None:
    before = decoded(build_meta(there).checkpoint, torch.float32)
    rewritten(there, described(lambda told: told.pop("plain")))
    after = decoded(build_meta(there).checkpoint, torch.float32)
    assert all(torch.equal(before[name], after[name]) for name in before)
    flip_a_bit(there, NORM)
    stream(there)(**tiny_models.batch("llama"))


def test_a_config_of_a_newer_version_is_refused(there: Path) -> None:
    path = there / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = VERSION + 1
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"packed in version {VERSION + 1}") as caught:
        build_meta(there)
    assert str(path) in str(caught.value)
    assert "newer ssdtune" in str(caught.value)


# ------------------------------------------------------------------ the command, the key


def test_the_command_packs(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "packed"
    assert main(["pack", str(source), "--out", str(out), "--bits", "8", "--order", "4,1,1,2"]) == 0
    assert "bits a weight over the whole model" in capsys.readouterr().out
    formats = {e.format for e in build_meta(out).checkpoint.tensors.values() if isinstance(e, PackedEntry)}  # fmt: skip
    assert formats == {Affine(8, (4, 1, 1, 2))}


def test_a_rotated_model_says_so_and_is_read_at_fewer_bits(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert main(["pack", str(source), "--out", str(out), "--bits", "5", "--rotate"]) == 0
    for bits in (4, 5):
        tensors = build_meta(out, bits=bits).checkpoint.tensors.values()
        formats = {e.format for e in tensors if isinstance(e, PackedEntry)}
        assert formats == {Rotated(Affine(bits, (4, 1)))}


def test_tensors_are_kept_by_name(source: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["pack", str(source), "--out", str(tmp_path / "packed"), "--keep", "*.layers.0.*"]
    assert main([*command, "--keep", "lm_?ead.weight"]) == 0
    before, after = (build_meta(folder).checkpoint for folder in (source, tmp_path / "packed"))
    usual = {n for g in groups_of(build_meta(source), FORMATS["4"].chosen()) for n in g.formats}
    kept = {n for n in usual if ".layers.0." in n} | {"lm_head.weight"}
    made = {n for n, e in after.tensors.items() if isinstance(e, PackedEntry)}
    assert made == usual - kept
    values = [decoded(checkpoint, torch.bfloat16) for checkpoint in (before, after)]
    assert all(values[0][name].equal(values[1][name]) for name in kept)
    assert main(command) == 2, "another packing"
    assert "holds a model already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "*.o_prj.*"], "such as lm_head.weight"),
        (["--keep", "*"], "leaves nothing to be packed"),
        (["--target_bpw", "5", "--keep", "x"], "--keep x fits no tensor"),
        (["--bits", "9"], "1 to 8"),
        (["--group", "48"], "32, 64, 128"),
        (["--bits", "8", "--order", "3,5"], "slices of 1, 2, 4 or 8"),
        (["--order", "a"], "whole numbers"),
        (["--format", "nf4", "--rotate"], "--rotate is for affine codes"),
        (["--format", "nf4", "--bits", "8"], "--bits 8: nf4 has 4"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], message: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["pack", str(source), "--out", str(tmp_path / "packed"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("nf4", bits=8), "--bits 8: nf4 has 4"),
        (Wanted("nf4", order=(4,)), "--order is for affine codes, not for nf4"),
        (Wanted("nf4", group=0), "--group 0: 1 to 4096"),
        (Wanted("mxfp4", group=64), "mxfp4 shares a scale among 32 weights"),
        (Wanted("nvfp4", bits=3), "--bits 3: nvfp4 has 4"),
        (Wanted("fp4-ue5m3", group=32), "shares a scale among 16 weights"),
        (Wanted("fp8", bits=4), "--bits 4: fp8 has 8"),
        (Wanted("fp8", group=128), "shares a scale among 16384 weights"),
        (Wanted("lossless", bits=5), "--bits 5: lossless has 4 or 3"),
        (Wanted("lossless", order=(2, 1)), "--order is for affine codes, not for lossless"),
        (Wanted("lossless", group=64), "lossless has no scales"),
        (Wanted("lossless", is_rotated=True), "--rotate is for affine codes, not for lossless"),
    ],
)
def test_no_flag_is_passed_over(wanted: Wanted, message: str) -> None:
    with pytest.raises(SSDTuneError, match=message):
        wanted.chosen()


def test_a_flag_may_say_what_a_format_is() -> None:
    for wanted in (
        Wanted("mxfp4", bits=4, group=32),
        Wanted("nvfp4", group=16),
        Wanted("fp8", bits=8),
    ):
        assert wanted.chosen() == Wanted(wanted.format).chosen()
    assert Wanted("lossless", bits=4).chosen() == Wanted("lossless").chosen()
    assert Wanted("nf4", group=128).chosen() != Wanted("nf4").chosen()


def packed_beside(model: Path, quantization: str, folder: Path) -> Any:
    """As `ssdtune.stream(quantization=...)` and the key of a configuration do it."""
    return build_packed(
        model,
        quantization=quantization,
        beside=folder,
        choose_storage=lambda files: choose_storage(files[0]).storage,
    )


def test_the_key_packs_once_and_reads_what_it_packed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As `ssdtune.stream(quantization=...)` and the key of a configuration do it."""

    def opened(quantization: str, model: Path = source) -> Any:
        return packed_beside(model, quantization, tmp_path / "offload")

    first = opened("3")
    assert "packing" in capsys.readouterr().out
    assert first.folder.parent == tmp_path / "offload" / "packed"
    assert first.model.config.name_or_path == str(source), "what an adapter's config will say"
    assert opened("3").folder == first.folder
    assert capsys.readouterr().out == ""
    assert opened("4").folder != first.folder
    assert opened("none").folder == source
    assert opened("none", first.folder).checkpoint.tensors == first.checkpoint.tensors
    assert opened("2", first.folder).folder == first.folder, "packed is packed"
    with pytest.raises(PackError, match="packed already"):
        opened("nf4", first.folder)
    with pytest.raises(SSDTuneError, match="'nf5' is not known"):
        opened("nf5")


def test_what_an_earlier_encoder_packed_is_not_taken_for_what_this_one_would(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Nor is it packed anew under a run that began on it, which would go on with other weights."""

    def opened(quantization: str, model: Path = source) -> Any:
        return packed_beside(model, quantization, tmp_path)

    with monkeypatch.context() as earlier:
        earlier.setattr("ssdtune.packing.convert.encoder_of", lambda format: 1)
        older, nested = opened("3").folder, opened("4/8").folder
    assert opened("4/8").folder == nested, "this one's encoder is still the first"
    opened("8")  # of the nested file's name, but not its format
    capsys.readouterr()
    with pytest.raises(PackError, match="by an earlier version of ssdtune") as caught:
        opened("3")
    assert f"goes on with model_name_or_path: {older}." in str(caught.value)
    assert not capsys.readouterr().out, "said before anything is read"
    assert opened("3", older).folder == older
    shutil.rmtree(older)
    assert opened("3").folder not in (older, nested)


ENCODERS = {  # the number of each one, and the relative squared error that it leaves
    "1": (1, 0.3470444),
    "2": (1, 0.1029258),
    "3": (2, 0.0314174),
    "4": (1, 0.00656310),
    "5": (1, 0.00165754),
    "8": (1, 2.757312e-5),
    "4/8": (1, 2.757312e-5),
    "3/8": (2, 3.398502e-5),
    "rotated": (1, 0.0278032),
    "nf4": (1, 0.00729559),
    "mxfp4": (1, 0.0125129),
    "nvfp4": (1, 0.00677754),
    "fp4-ue5m3": (1, 0.00675729),
    "fp8": (1, 6.821485e-4),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_that_makes_other_codes_has_another_number(kind: str) -> None:
    """Where the error here is another: raise `encoder_of` for those formats, and write both down."""
    values = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    wanted = FORMATS["rotated"] if kind == "rotated" else Wanted.of(kind)
    made = encoded("weight", values, wanted.chosen())
    assert made is not None
    error = Squares.of(quantize.decoded(*made, tuple(values.shape)), values).relative
    assert (encoder_of(made[0]), error) == (ENCODERS[kind][0], pytest.approx(ENCODERS[kind][1], rel=1e-4))  # fmt: skip


def test_an_earlier_encoders_unfinished_packing_is_not_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any) -> None:
        raise KeyboardInterrupt

    meta, storage = build_meta(source), choose_storage(source).storage
    groups = groups_of(meta, FORMATS["3"].chosen())
    with monkeypatch.context() as earlier:
        earlier.setattr("ssdtune.packing.convert.encoder_of", lambda format: 1)
        with pytest.raises(KeyboardInterrupt):
            pack(meta, groups, tmp_path / "packed", storage=storage, encode=stopped)
    with pytest.raises(PackError, match="begun by another version of ssdtune"):
        pack(meta, groups, tmp_path / "packed", storage=storage)


def test_a_packed_folder_is_what_was_asked_for_or_refused(source: Path, tmp_path: Path) -> None:
    """The whole format counts, not its class alone; blocks of other sizes are the same word."""

    def opens(folder: Path, quantization: str) -> bool:
        try:
            build_planned(folder, quantization=quantization)
        except PackError as error:
            messages.append(str(error))
            return False
        return True

    messages: list[str] = []

    asked = ("2", "4", "5", "8", "nf4", "mxfp4", "nvfp4", "fp8", "lossless")
    for kind, wanted, fitting in (
        ("nested", FORMATS["8"], {"4", "5", "8"}),
        ("nf4", Wanted("nf4", group=128), {"nf4"}),
        ("mxfp4", FORMATS["mxfp4"], {"mxfp4"}),
        ("nvfp4", FORMATS["nvfp4"], {"nvfp4"}),
        ("fp8", FORMATS["fp8"], {"fp8"}),
        ("rotated", Wanted(bits=5, is_rotated=True), {"4", "5"}),
    ):
        folder = packed(source, tmp_path / kind, wanted)
        assert {word for word in asked if opens(folder, word)} == fitting
    assert all("packed already" in message for message in messages)
    assert "to be read at 4, 5, 6, 8 bits" in messages[0]
    assert "affine, rotated, to be read at 4, 5 bits" in messages[-1]


def test_a_sample_tells_what_packing_without_loss_saves(source: Path, tmp_path: Path) -> None:
    meta = build_meta(source)
    ratio = lossless_ratio(meta)
    there = build_meta(packed(source, tmp_path / "packed", FORMATS["lossless"]))
    made = {n: e for n, e in there.checkpoint.tensors.items() if isinstance(e, PackedEntry)}
    before = sum(meta.checkpoint.tensors[name].num_bytes for name in made)
    assert ratio == pytest.approx(before / sum(e.num_bytes for e in made.values()), rel=0.05)
    assert lossless_ratio(there) is None


def test_a_plan_for_the_key_needs_no_packing(source: Path, tmp_path: Path) -> None:
    planned = build_planned(source, quantization="4")
    there = build_meta(packed(source, tmp_path / "packed", FORMATS["4"]))
    assert {n: e.num_bytes for n, e in planned.checkpoint.tensors.items()} == {
        n: e.num_bytes for n, e in there.checkpoint.tensors.items()
    }
    assert not list(tmp_path.glob("**/.packing.json"))


@pytest.mark.parametrize("writes_back", [False, True])
def test_zeroth_order_moves_the_decoded_weights(
    writes_back: bool, tmp_path: Path, stream: Stream
) -> None:
    """All weights: moved in the slots, and written back to a working copy that is not packed."""
    pair = make_pair("llama", tmp_path, stream, FORMATS["4"], adapt=lambda model: model)
    before = digests(tmp_path)
    fold = Fold(tmp_path / "scratch", 1) if writes_back else None
    method = ZerothOrder(pair.streamed, MeZO(), seed=test_zeroth_order.SEED, fold=fold)
    trained = test_zeroth_order.all_weights(pair.plain)
    reference = test_zeroth_order.InMemory(pair.plain, MeZO(), trained)
    for expected, found in test_zeroth_order.train_both(pair, method, reference, 4):
        assert found == expected
    for key, value in trained.items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key
    method.close()
    assert digests(tmp_path) == before, "the user's files"


# ------------------------------------------------------------------ tensors that lie unaligned


def test_a_tensor_behind_an_odd_header_is_read_right() -> None:
    values = torch.randn(5, 3)
    memory = torch.zeros(100, dtype=torch.uint8)
    memory[13:73] = values.view(torch.uint8).reshape(-1)
    view = TensorView(name="t", dtype=torch.float32, shape=(5, 3), offset=13)
    assert torch.equal(view.values(memory), values)
