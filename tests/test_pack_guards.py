"""What `ssdtune pack` refuses before it works for hours, and which folders are no packed model or one after all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_gguf
import tiny_models
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from support import digests
from test_packing import FORMATS, decoded, packed
from test_quantized_models import as_fp8

from ssdtune.cli import main
from ssdtune.packing.encoding import encoded
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.swap.beside import bytes_beside, copy_beside
from ssdtune.swap.header import CheckpointError
from ssdtune.visit.build import build_meta
from ssdtune.visit.placement import place


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards") / "source"
    tiny_models.save(tiny_models.build("llama", dtype=torch.bfloat16), folder)
    return folder


def refused(capsys: Any, *words: object) -> str:
    """What the command says; it must have refused."""
    assert main(["pack", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_a_gguf_file_of_plain_weights_has_nothing_to_put_beside_packed_ones(
    tmp_path: Path, capsys: Any
) -> None:
    model = tiny_models.build("qwen3", dtype=torch.float32)
    tensors = {
        name: ("F32", tuple(value.shape), value.numpy().tobytes())
        for name, value in test_gguf.gguf_tensors(model).items()
    }
    path = test_gguf.write(tmp_path / "m.gguf", tensors, test_gguf.gguf_keys(model.config))
    said = refused(capsys, path, "--out", tmp_path / "packed")
    assert f"{path} is a GGUF file" in said
    assert "Hugging Face format" in said
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("group", ["4097", "1000000"])
def test_a_group_larger_than_any_encoder_takes_is_refused(
    group: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--format", "nf4", "--group", group]
    said = refused(capsys, source, *flags, "--out", tmp_path / "packed")
    assert f"--group {group}: 1 to 4096" in said


def test_values_that_are_no_numbers_leave_a_way_out(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    there = Path(shutil.copytree(source, tmp_path / "source"))
    path = sorted(there.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.dim() == 2)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    said = refused(capsys, there, "--out", tmp_path / "packed")
    assert f"{name} can't be packed: 1 of" in said
    assert f"--keep '{name}'" in said
    assert main(["pack", str(there), "--keep", name, "--out", str(tmp_path / "kept")]) == 0


@pytest.mark.parametrize("kind", ["4", "nf4", "mxfp4", "fp8"])
def test_halves_do_not_become_infinite(kind: str) -> None:
    values = torch.full((64, 64), 2.0**14, dtype=torch.float16)
    made = encoded("weight", values, FORMATS[kind].chosen())
    assert made is not None
    assert made[0] == FORMATS[kind].chosen()
    out = torch.empty_like(values)
    made[0].by_torch([made[1][part.suffix] for part in made[0].parts((64, 64))], out)
    assert out.isfinite().all()
    with pytest.raises(PackError, match="weight can't be packed: a magnitude of 32768"):
        encoded("weight", 2 * values, FORMATS[kind].chosen())


def test_weights_that_lossless_packing_has_no_use_for_leave_a_way_out(tmp_path: Path) -> None:
    tiny_models.save(tiny_models.build("llama", dtype=torch.float16), tmp_path)
    with pytest.raises(PackError, match="Matrices of BF16 can be"):
        groups_of(build_meta(tmp_path), FORMATS["lossless"].chosen())


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--check_text", "gone.jsonl"], "gone.jsonl"), (["--check_bits", "9"], "--check_bits 9")],
)
def test_what_is_checked_is_refused_before_anything_is_packed(
    flags: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    source = tiny_runs.save(tiny_runs.llama(), tmp_path / "source")
    said = refused(capsys, source, "--bits", "4", "--check", *flags, "--out", tmp_path / "packed")
    assert message in said
    assert not (tmp_path / "packed").exists()


# ------------------------------------------------------------------ folders


def test_all_that_a_tokenizer_needs_is_copied(tmp_path: Path) -> None:
    """Marian's two vocabularies, PhoBERT's merges, ProphetNet's words; templates of which there are several."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    out.mkdir()
    names = {
        *("source.spm", "target.spm", "bpe.codes", "prophetnet.tokenizer"),
        "additional_chat_templates/rag.jinja",
    }
    for name in (*names, "other/tokenizer.json", "training_args.bin"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    copy_beside(source, out)
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == names
    assert bytes_beside(source) == 2 * len(names)


def in_shards(
    source: Path, out: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[Path]]:
    monkeypatch.setattr("ssdtune.packing.layout.SHARD_BYTES", 30_000)
    packed(source, out, FORMATS[kind])
    return out, sorted(out.glob("*.safetensors"))


def test_shards_of_two_packings_are_no_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is whole; together they are other weights than any packing has."""
    there, shards = in_shards(source, tmp_path / "once", "4", monkeypatch)
    other = in_shards(source, tmp_path / "again", "nf4", monkeypatch)[1]
    assert [p.name for p in shards] == [p.name for p in other]
    shutil.copy(other[-1], shards[-1])
    shutil.copy(tmp_path / "again" / "model.safetensors.index.json", there)
    index = json.loads((there / "model.safetensors.index.json").read_text())
    for path in shards[:-1]:
        index["weight_map"] |= dict.fromkeys(load_file(path), path.name)
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if name in load_file(there / file)
    }
    (there / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="another packing than") as caught:
        build_meta(there)
    assert shards[-1].name in str(caught.value)


def test_packed_shards_are_read_where_the_config_has_lost_what_they_are(
    source: Path, tmp_path: Path
) -> None:
    there = packed(source, tmp_path / "packed", FORMATS["4"])
    before = decoded(build_meta(there).checkpoint, torch.float32)
    config = json.loads((there / "config.json").read_text())
    del config["quantization_config"]
    (there / "config.json").write_text(json.dumps(config))
    after = decoded(build_meta(there).checkpoint, torch.float32)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_quantization_that_the_text_models_config_tells_is_read(tmp_path: Path) -> None:
    """As transformers finds it; a copy of the config says nothing of it any more."""
    there, out = tmp_path / "model", tmp_path / "out"
    tiny_models.save(tiny_models.build("gemma3_vlm", dtype=torch.bfloat16), there)
    made: dict[str, torch.Tensor] = {}
    for path in there.glob("*.safetensors"):
        for name, value in load_file(path).items():
            is_packed = "language" in name and name.endswith("proj.weight")
            made |= as_fp8(name, value) if is_packed else {name: value}
        path.unlink()
    (there / "model.safetensors.index.json").unlink()
    save_file(made, there / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((there / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    config["text_config"]["quantization_config"] = told
    (there / "config.json").write_text(json.dumps(config))
    before = digests(there)
    meta = build_meta(there)
    place(meta.model, meta.checkpoint.tensors)
    out.mkdir()
    copy_beside(there, out)
    assert "quantization_config" not in (out / "config.json").read_text()
    assert digests(there) == before
