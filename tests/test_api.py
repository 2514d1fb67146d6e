"""`stream` honours every key of `offload` or says why not; `plan` is what it would do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as tf

import ssdtune
from ssdtune import api
from ssdtune.api import OffloadError, choose, options_for
from ssdtune.config import load_config
from ssdtune.schedule.plan import PlanError, Tier
from ssdtune.swap import gds, storage
from ssdtune.swap.storage import BufferedStorage, DirectStorage, StorageChoice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.build("llama"), tmp_path / "llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks are megabytes, as sizes are written."""
    config = tiny_models.small(tf.LlamaConfig, hidden_size=256, intermediate_size=1024)
    return tiny_models.save(tf.LlamaForCausalLM(config), tmp_path_factory.mktemp("wide"), "5MB")


@pytest.fixture
def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def no_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = StorageChoice(BufferedStorage(), "the file system says it has no direct I/O")
    monkeypatch.setattr(storage, "choose_storage", lambda path: choice)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`ssdtune.stream` with findings of its own; models are closed after the test."""
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    models = []

    def stream(*args: Any, **kwargs: Any) -> Any:
        models.append(ssdtune.stream(*args, **kwargs))
        return models[-1]

    yield stream
    for model in models:
        model.ssdtune.close()


def options(files: list[Path], **offload: Any) -> Any:
    return options_for(ssdtune.Offload.of(offload), files)


# ------------------------------------------------------------------ storage


def test_auto_reads_directly_where_it_can_and_says_nothing(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    choice = storage.choose_storage(files[0])
    if not choice.is_direct:
        pytest.skip(f"no direct I/O here: {choice.reason}")
    assert isinstance(choose("auto", files), DirectStorage)
    assert isinstance(choose("direct", files), DirectStorage)
    assert isinstance(choose("buffered", files), BufferedStorage)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_direct_io")
def test_auto_without_direct_io_warns_once_and_says_why(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(choose("auto", files), BufferedStorage)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    assert str(files[0].parent) in line
    assert "the file system says it has no direct I/O" in line
    monkeypatch.setenv("RANK", "1")
    choose("auto", files)
    assert capsys.readouterr().out == "", "of several processes one speaks"


@pytest.mark.usefixtures("no_direct_io")
def test_direct_that_is_not_to_be_had_is_an_error(files: list[Path]) -> None:
    with pytest.raises(OffloadError, match=r"no direct I/O[\s\S]*storage: buffered"):
        choose("direct", files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gds_without_a_device_says_so(files: list[Path]) -> None:
    with pytest.raises(OffloadError, match=r"no CUDA device[\s\S]*storage: auto"):
        options(files, storage="gds")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("wanted", ["auto", "direct", "buffered"])
def test_without_a_device_gds_is_not_even_tried(
    wanted: str, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gds, "choose_gds", None)
    assert options(files, storage=wanted).open_device_pool is None


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A CUDA device of 1 GB as far as options know; what its self-test of cuFile finds. Lists its calls."""

    def make(choice: gds.GdsChoice) -> list[Any]:
        calls: list[Any] = []

        def choose_gds(path: Path, *, device: str) -> gds.GdsChoice:
            calls.append((path, device))
            return choice

        monkeypatch.setattr(gds, "choose_gds", choose_gds)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
        return calls

    return make


def a_pool() -> gds.GdsPool:
    return gds.GdsPool(kvikio=None)


WORKS = gds.GdsChoice(a_pool, "cuFile 9.00 GB/s, direct + copy 5.00 GB/s")
FAILS = gds.GdsChoice(None, "kvikio: no nvidia-fs")


def test_auto_uses_gds_where_the_self_test_offers_it_and_says_so(
    files: list[Path],
    offer: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = offer(WORKS)
    chosen = options(files)
    assert chosen.open_device_pool is a_pool
    assert calls == [(max(files, key=lambda file: file.stat().st_size), "cuda:0")]
    (line,) = capsys.readouterr().out.splitlines()
    assert "9.00 GB/s" in line
    monkeypatch.setenv("RANK", "1")
    options(files)
    assert capsys.readouterr().out == "", "of several processes one speaks"


@pytest.mark.usefixtures("no_direct_io")
def test_gds_is_used_without_a_word_about_other_ways(
    files: list[Path], offer: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What little goes to RAM is read as well as can be."""
    offer(WORKS)
    chosen = options(files, storage="gds")
    assert chosen.open_device_pool is a_pool
    assert isinstance(chosen.storage, BufferedStorage)
    assert capsys.readouterr().out == ""


def test_gds_that_does_not_work_is_an_error_only_where_it_was_asked_for(
    files: list[Path], offer: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    offer(FAILS)
    with pytest.raises(OffloadError, match=r"no nvidia-fs[\s\S]*storage: auto"):
        options(files, storage="gds")
    assert options(files).open_device_pool is None
    assert "cuFile" not in capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["direct", "buffered"])
def test_another_storage_that_was_asked_for_is_used(
    wanted: str, files: list[Path], offer: Callable[..., list[Any]]
) -> None:
    calls = offer(WORKS)
    if wanted == "direct" and not storage.choose_storage(files[0]).is_direct:
        pytest.skip("no direct I/O here")
    assert options(files, storage=wanted).open_device_pool is None
    assert calls == []


def test_a_device_that_holds_no_buffers_has_them_in_ram_unless_gds_was_asked_for(
    wide: Path, offer: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    offer(FAILS)
    blocks = api.plan(wide, offload={"ram": "400MB", "vram": "400MB"}).plan.blocks
    slot = max(block.slot_bytes for block in blocks)
    both = slot + max(block.file_bytes for block in blocks)
    offer(WORKS)
    for vram, is_direct in ((both, True), (both - 1, False), (slot, False)):
        found = api.plan(wide, offload={"ram": "400MB", "vram": vram}).plan
        assert found.buffers_on_device == is_direct
        assert found.device_bytes <= vram
        assert ("holds no buffers" in capsys.readouterr().out) == (not is_direct)
    with pytest.raises(PlanError, match=r"offload\.vram"):
        api.plan(wide, offload={"ram": "400MB", "vram": both - 1, "storage": "gds"})


def test_the_plan_says_where_buffers_are(wide: Path, offer: Callable[..., list[Any]]) -> None:
    offer(WORKS)
    offload = ssdtune.Offload.of({"ram": "400MB", "vram": "400MB"})
    assert "there too" in "\n".join(api.plan(wide, offload=offload).plan.lines())


# ------------------------------------------------------------------ the other keys


def test_every_key_arrives(files: list[Path], tmp_path: Path) -> None:
    chosen = options(
        files,
        path=str(tmp_path),
        ram="123MB",
        prefetch=5,
        block_inputs="nvme",
        storage="buffered",
        reader_threads=7,
        loss_chunk_tokens=11,
    )
    assert chosen.scratch == tmp_path
    assert chosen.budgets.ram_bytes == 123_000_000
    assert chosen.prefetch == 5
    assert chosen.block_inputs is Tier.NVME
    assert chosen.storage.name == "buffered"
    assert chosen.reader_threads == 7
    assert chosen.chunk_tokens == 11


def test_auto_is_filled_in(files: list[Path]) -> None:
    chosen = options(files)
    assert chosen.prefetch == api.DEFAULT_PREFETCH
    assert chosen.chunk_tokens == api.DEFAULT_CHUNK_TOKENS
    assert chosen.budgets.ram_bytes > 0
    assert options(files, prefetch=0).prefetch == 0, "0 is no auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_vram_without_a_device_is_said_to_be_idle(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options(files, vram="8GB", ram="1GB")
    assert "offload.vram has no effect" in capsys.readouterr().out


def test_the_engine_runs_as_asked(folder: Path, opened: Callable[..., Any]) -> None:
    model = opened(folder, offload={"ram": "2MB", "reader_threads": 3, "storage": "buffered"})
    batch = tiny_models.batch("llama")
    model(**batch).loss.item()
    assert model.ssdtune.engine.pool._num_threads == 3
    assert model.ssdtune.engine.pool.storage.name == "buffered"


def test_a_model_type_is_checked_once(
    folder: Path, opened: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        opened(folder, offload={"ram": "2MB"})
    lines = [line for line in capsys.readouterr().out.splitlines() if "checking" in line]
    assert len(lines) == 1
    assert lines[0].startswith("checking LlamaForCausalLM once: streamed = in memory ✓")


def test_a_budget_that_is_too_small_is_refused_before_anything_is_checked(
    wide: Path, opened: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanError):
        opened(wide, offload={"ram": "2MB"})
    assert "checking" not in capsys.readouterr().out


def test_a_micro_batch_of_no_rows_is_refused(wide: Path, opened: Callable[..., Any]) -> None:
    with pytest.raises(api.OffloadError, match="micro_batch_size: got 0"):
        opened(wide, micro_batch_size=0)


# ------------------------------------------------------------------ the plan


def test_the_plan_is_that_of_the_streamed_model(wide: Path, opened: Callable[..., Any]) -> None:
    offload = {"ram": "10MB"}
    planned = api.plan(wide, offload=offload, micro_batch_size=2)
    assert all(p.is_meta for p in planned.meta.model.parameters())
    assert opened(wide, offload=offload, micro_batch_size=2).ssdtune.engine.plan == planned.plan


def loaded(folder: Path, tmp_path: Path, *flags: str) -> Any:
    path = tmp_path / "train.yaml"
    path.write_text(f"model_name_or_path: {folder}\ndataset: x.jsonl\noutput_dir: {tmp_path}/run\n")
    return load_config(path, flags)


def test_the_plan_is_made_of_the_keywords_that_training_uses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssdtune.trainer.opening import open_model

    seen: list[Any] = []
    monkeypatch.setattr(api, "streamed", lambda *args, **kwargs: seen.append((args, kwargs)))
    flags = ("--attn_implementation", "eager", "--per_device_train_batch_size", "3")
    config = loaded(folder, tmp_path, *flags).config
    open_model(config)
    ((args, kwargs),) = seen
    wanted = api.stream_arguments(config)
    assert args == (config.model_name_or_path, wanted.pop("offload"))
    assert kwargs == {**wanted, "scratch": config.offload.path}
