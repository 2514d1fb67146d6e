"""A checkpoint is what its headers say, or it is refused with the file, the tensor and the way out."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssdtune.swap.header import DTYPE_BITS, CheckpointError, TensorEntry, read_header
from ssdtune.swap.source import INDEX_FILE, merge_extents, open_checkpoint

# ------------------------------------------------------------------------------ writing files


def entry(dtype: object = "F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def write_raw(path: Path, header: bytes, data: bytes = b"", claim: int | None = None) -> Path:
    length = len(header) if claim is None else claim
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def write_header(path: Path, header: dict, data: bytes = b"") -> Path:
    return write_raw(path, json.dumps(header).encode(), data)


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **weight_map) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map = {**dict.fromkeys(tensors, file), **weight_map}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return folder


def two_shards(folder: Path, **weight_map) -> Path:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).reshape(2, 3)},
        "model-00002-of-00002.safetensors": {"b": torch.arange(5, dtype=torch.int32)},
    }
    return save_shards(folder, shards, **weight_map)


def refused(folder: Path) -> str:
    """The message of a refusal: short, no traceback needed, safe to print."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert 2 <= len(message.splitlines()) <= 4, message
    assert all(line.isprintable() for line in message.splitlines()), message
    return message


# ------------------------------------------------------------------------------ awkward headers

DATA = bytes(24)
BAD_HEADERS = {  # name: (header or whole file, data behind it, words of the message)
    "a hole before the first tensor": (
        {"t": entry(offsets=(8, 32))},
        bytes(32),
        ["8 bytes before"],
    ),
    "a hole between tensors": (
        {"t": entry(), "u": entry(offsets=(32, 56))},
        bytes(56),
        ['"u"', "8 bytes before it belong to no tensor"],
    ),
    "trailing bytes": ({"t": entry()}, bytes(25), ["1 bytes after the last tensor"]),
    "no tensors but data": ({}, bytes(24), ["24 bytes after"]),
    "an overlap": (
        {"t": entry(), "u": entry(offsets=(20, 44))},
        bytes(44),
        ['"u"', "overlaps", "4 bytes"],
    ),
    "two names for the same bytes": ({"t": entry(), "u": entry()}, DATA, ["overlaps"]),
    "past the end of the file": ({"t": entry()}, bytes(20), ['"t"', "cut short"]),
    "no data at all": ({"t": entry()}, b"", ['"t"', "cut short"]),
    "a dtype that lies": ({"t": entry("F16")}, DATA, ['"t"', "needs 12 bytes", "give 24"]),
    "a shape that lies": ({"t": entry(shape=(2, 4))}, DATA, ["needs 32 bytes", "give 24"]),
    "an unknown dtype": ({"t": entry("F33")}, DATA, ['unknown dtype "F33"']),
    "a dtype that is no text": ({"t": entry(["F32"])}, DATA, ["unknown dtype"]),
    "half a byte": ({"t": entry("F4", (3,), (0, 1))}, b"0", ["needs 1.5 bytes"]),
    "a shape that overflows": ({"t": entry(shape=(2**32, 2**32))}, DATA, ["overflows"]),
    "an overflow hidden by a zero": (
        {"t": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))},
        b"",
        ["overflows"],
    ),
    "a dimension over 64 bits": ({"t": entry(shape=(2**64,))}, DATA, ["not a list of counts"]),
    "a negative dimension": ({"t": entry(shape=(-2, -3))}, DATA, ["not a list of counts"]),
    "a float dimension": ({"t": entry(shape=(2.0, 3))}, DATA, ["not a list of counts"]),
    "a boolean dimension": ({"t": entry(shape=(True, 6))}, DATA, ["not a list of counts"]),
    "a text dimension": ({"t": entry(shape=("6",))}, DATA, ["not a list of counts"]),
    "a rank of 65": ({"t": entry(shape=[1] * 65, offsets=(0, 4))}, bytes(4), ["not a list"]),
    "a shape that is a number": ({"t": {**entry(), "shape": 6}}, DATA, ["not a list of counts"]),
    "offsets backwards": ({"t": entry(offsets=(24, 0))}, DATA, ["not [begin, end]"]),
    "three offsets": ({"t": entry(offsets=(0, 24, 24))}, DATA, ["not [begin, end]"]),
    "a negative offset": ({"t": entry(offsets=(-24, 0))}, DATA, ["not [begin, end]"]),
    "a float offset": ({"t": entry(offsets=(0, 24.0))}, DATA, ["not [begin, end]"]),
    "no dtype": ({"t": {"shape": [6], "data_offsets": [0, 24]}}, DATA, ["not dtype, shape and"]),
    "a field of another format": ({"t": entry(strides=[3, 1])}, DATA, ["not dtype, shape and"]),
    "a tensor that is a list": ({"t": [1]}, DATA, ["not dtype, shape and"]),
    "metadata that is no text": ({"__metadata__": {"a": 1}, "t": entry()}, DATA, ["__metadata__"]),
    "metadata that is a list": ({"__metadata__": [], "t": entry()}, DATA, ["__metadata__"]),
    "a header that is a list": (b"[]", b"", ["does not begin with"]),
    "a leading space": (b' {"t":1}', b"", ["does not begin with"]),
    "not JSON": (b"{not json", b"", ["not valid JSON"]),
    "two JSON values": (b"{}{}", b"", ["not valid JSON"]),
    "not UTF-8": (b'{"\xff":1}', b"", ["not UTF-8"]),
    "UTF-16": ('{"t":1}'.encode("utf-16-le"), b"", ["not valid JSON"]),
    "a lone surrogate": (b'{"\\ud800":1}', b"", ["not Unicode text"]),
    "a key twice": (b'{"t":1,"u":2,"t":3}', b"", ['"t" appears twice']),
    "an inner key twice": (b'{"t":{"dtype":"F32","dtype":"F16"}}', b"", ['"dtype" appears twice']),
    "not a number": (b'{"t":{"shape":[NaN]}}', b"", ["NaN is not a JSON number"]),
    "an integer of 5000 digits": (b'{"t":' + b"9" * 5000 + b"}", b"", ["not valid JSON"]),
    "nested 200,000 deep": (b'{"t":' + b"[" * 200_000, b"", ["nested too deeply"]),
    "millions of values": (
        b'{"t":[' + b"1," * 3_000_000 + b"1]}",
        b"",
        ["3,000,002 values", "1,000,000"],
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_lies_is_refused_by_name(case, tmp_path):
    header, data, words = BAD_HEADERS[case]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write_raw(tmp_path / "model.safetensors", raw, data)
    before = path.read_bytes()
    message = refused(tmp_path)
    for word in [*words, str(path), "Download this file again"]:
        assert word in message
    assert path.read_bytes() == before


BAD_FILES = {
    "empty": (b"", "0 bytes is too short"),
    "three bytes": (b"abc", "3 bytes is too short"),
    "a length of 2**63": ((2**63).to_bytes(8, "little") + b"{}", "9,223,372,036,854,775,808"),
    "a length over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "the format's limit"),
    "a length past the end": ((99).to_bytes(8, "little") + b"{}", "cut short"),
    "a length of 0": ((0).to_bytes(8, "little") + b"{}", "not valid JSON"),
    "a length of 1": ((1).to_bytes(8, "little") + b"{}", "not valid JSON"),
    "a git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "lfs pull",
    ),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", "no tensor in it"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_safetensors_is_refused(case, tmp_path):
    content, words = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    assert words in refused(tmp_path)


GOOD_HEADERS = {  # name: (header, data, expected number of tensors)
    "trailing spaces, as the reference writer pads": (b'{"t":%s}   ', DATA, 1),
    "an odd length, so no tensor is aligned": (b'{"t":%s} ', DATA, 1),
    "control characters in a name": (b'{"\\u0000\\u001b[31m<script>\\n":%s}', DATA, 1),
    "a name that looks like a path": (b'{"../../x":%s}', DATA, 1),
    "an empty name": (b'{"":%s}', DATA, 1),
}


@pytest.mark.parametrize("case", GOOD_HEADERS)
def test_a_header_that_is_only_odd_is_accepted(case, tmp_path):
    header, data, num_tensors = GOOD_HEADERS[case]
    raw = header % json.dumps(entry()).encode()
    path = write_raw(tmp_path / "model.safetensors", raw, data)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == num_tensors
    [found] = checkpoint.tensors.values()
    assert (found.path, found.start, found.stop) == (path, 8 + len(raw), path.stat().st_size)


def test_empty_tensors_may_share_an_offset_in_any_order(tmp_path):
    header = {
        "full": entry(offsets=(0, 24)),
        "at the end": entry(shape=(0,), offsets=(24, 24)),
        "at the start": entry(shape=(3, 0), offsets=(0, 0)),
        "there too": entry("BF16", (0, 7), (0, 0)),
    }
    write_header(tmp_path / "model.safetensors", header, DATA)
    assert {e.name: e.num_bytes for e in open_checkpoint(tmp_path).tensors.values()} == {
        "full": 24,
        "at the end": 0,
        "at the start": 0,
        "there too": 0,
    }
    header["inside"] = entry(shape=(0,), offsets=(8, 8))
    write_header(tmp_path / "model.safetensors", header, DATA)
    assert '"inside"' in refused(tmp_path)


def test_a_name_with_escapes_is_shown_escaped(tmp_path):
    write_header(tmp_path / "model.safetensors", {"\x1b[31m\u202ex\0": entry("F16")}, DATA)
    assert r"\x1b[31m\u202ex\x00" in refused(tmp_path)


def test_every_dtype_of_the_reference_writer_is_known(tmp_path):
    from safetensors.torch import _TYPES

    assert set(_TYPES) <= set(DTYPE_BITS)
    tensors = {name: torch.zeros(4, dtype=dtype) for name, dtype in _TYPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, found in open_checkpoint(tmp_path).tensors.items():
        assert (found.dtype, found.num_bytes) == (name, 4 * _TYPES[name].itemsize)


def test_hostile_headers_cost_little_time_and_memory(tmp_path):
    """The largest header that is parsed, and the largest that is not: each in the time of a few plain parses of the
    first (2 s or less, but machines differ), and in < 200 MB."""
    for num_tensors in [100_000, 500_000]:
        described = (
            f'"t{i}": {{"dtype": "U8", "shape": [1], "data_offsets": [{i}, {i + 1}]}}'
            for i in range(num_tensors)
        )
        header = "{" + ", ".join(described) + "}"
        write_raw(tmp_path / f"{num_tensors}.safetensors", header.encode(), bytes(num_tensors))
    code = (
        "import json, re, sys, time; from pathlib import Path\n"
        "from ssdtune.swap.header import read_header, CheckpointError\n"
        "start = time.process_time()\n"
        "try: print(len(read_header(Path(sys.argv[1]))[1]))\n"
        "except CheckpointError as error: print(error)\n"
        "seconds = time.process_time() - start\n"
        "status = Path('/proc/self/status').read_text()\n"
        "peak_kib = re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]\n"
        "raw = Path(sys.argv[1]).with_name('100000.safetensors').read_bytes()\n"
        "text, start = raw[8 : 8 + int.from_bytes(raw[:8], 'little')], time.process_time()\n"
        "json.loads(text)\n"
        "print(seconds / (time.process_time() - start), peak_kib, 'torch' in sys.modules)\n"
    )
    for num_tensors, words in {100_000: "100000", 500_000: "values in its header"}.items():
        command = [sys.executable, "-c", code, str(tmp_path / f"{num_tensors}.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        *message, numbers = done.stdout.splitlines()
        num_parses, peak_kib, has_torch = numbers.split()
        assert words in "\n".join(message)
        assert float(num_parses) < 15
        assert int(peak_kib) * 1024 < 200e6
        assert has_torch == "False", "reading headers must not need torch"


def mutate(mutant: bytearray, rng: random.Random, header_end: int) -> None:
    """One random change of a file's header, in place."""
    place = rng.randrange(min(header_end, len(mutant)))
    some = rng.choice([b"[[", b'"', b"\\ud800", b"1e999", b"null", b"{}", bytes(mutant[8:48])])
    acts = {
        "flip": (slice(place, place + 1), bytes([mutant[place] ^ 1 << rng.randrange(8)])),
        "digit": (slice(place, place + 1), bytes([rng.choice(b"0123456789-.eE")])),
        "mark": (slice(place, place + 1), bytes([rng.choice(b'{}[]",:\\ \0\xff')])),
        "cut": (slice(place, place + rng.randrange(1, 9)), b""),
        "insert": (slice(place, place), some),
        "end": (slice(rng.randrange(8, header_end), None), b""),
    }
    where, what = acts[rng.choice(list(acts))]
    mutant[where] = what
    mutant[len(mutant) :] = b"" if mutant else b"\0"


def test_a_mutated_header_is_parsed_or_refused_and_nothing_else(tmp_path):
    tensors = {f"layers.{i}.weight": torch.zeros(3, i + 1) for i in range(4)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    original = path.read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    rng = random.Random(0)
    refusals: list[CheckpointError] = []
    for _ in range(600):
        mutant = bytearray(original)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            mutate(mutant, rng, header_end)
        path.write_bytes(mutant)
        try:
            found = open_checkpoint(tmp_path).tensors
        except CheckpointError as error:
            refusals.append(error)
            continue
        for tensor in found.values():
            assert 10 <= tensor.start <= tensor.stop <= len(mutant)
    assert 300 < len(refusals) < 595
    assert all(len(str(error).splitlines()) <= 4 for error in refusals)


# ------------------------------------------------------------------------------ model folders


def test_a_single_file_gives_every_tensor_where_it_lies(tmp_path):
    tensors = {
        "w": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "i": torch.arange(4),
        "scalar": torch.tensor(1.5),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = checkpoint.tensors[name]
        assert found.shape == tuple(tensor.shape)
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[found.start : found.stop] == expected
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.files == (tmp_path / "model.safetensors",)


def test_shards_are_joined_by_their_index(tmp_path):
    checkpoint = open_checkpoint(two_shards(tmp_path))
    assert {n: e.path.name for n, e in checkpoint.tensors.items()} == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    assert len(checkpoint.files) == 2


def test_a_relative_folder_survives_a_change_of_directory(tmp_path, monkeypatch):
    two_shards(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(Path("model"))
    monkeypatch.chdir("/")
    checkpoint.check_unchanged()


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path):
    two_shards(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_a_tensor_that_only_its_shard_knows_is_kept(tmp_path):
    folder = two_shards(tmp_path)
    save_file(
        {"a": torch.ones(2), "extra": torch.ones(3)}, folder / "model-00001-of-00002.safetensors"
    )
    assert open_checkpoint(folder).tensors["extra"].shape == (3,)


def test_the_index_decides_between_two_shards(tmp_path):
    folder = two_shards(tmp_path)
    save_file({"b": torch.ones(9), "a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    assert open_checkpoint(folder).tensors["b"].path.name == "model-00002-of-00002.safetensors"


def test_a_name_in_two_shards_and_no_index_is_refused(tmp_path):
    folder = two_shards(tmp_path)
    for file in folder.glob("model-*"):
        save_file({file.stem[:11]: torch.ones(2), "twice": torch.ones(2)}, file)
    (folder / INDEX_FILE).unlink()
    assert '"twice"' in refused(folder)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(tmp_path, has_index):
    folder = two_shards(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    if not has_index:
        (folder / INDEX_FILE).unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(folder)


def test_numbered_shards_need_no_index_and_no_company(tmp_path):
    folder = two_shards(tmp_path)
    (folder / INDEX_FILE).unlink()
    save_file({"a": torch.ones(1)}, folder / "consolidated.safetensors")
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"AppleDouble")
    assert open_checkpoint(folder).num_bytes == 24 + 20


def test_a_single_file_of_another_name_is_taken(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"c": "model-00001-of-00002.safetensors"}, ['"c"', "it is in no shard"]),
        (
            {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"},
            ["it is in model-0000", "(1 more like it)"],
        ),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, said, words):
    message = refused(two_shards(tmp_path, **said))
    assert all(word in message for word in [*words, INDEX_FILE, "download both again"])


@pytest.mark.parametrize(
    "file",
    [
        "../outside/model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "\ud800.safetensors",
        "pytorch_model.bin",
        7,
        None,
    ],
)
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path, file):
    save_shards(tmp_path / "outside", {"model.safetensors": {"evil": torch.ones(1)}})
    folder = two_shards(tmp_path / "model", evil=file)
    assert '"evil"' in refused(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "{" * 9999,
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    assert INDEX_FILE in refused(tmp_path)


@pytest.mark.parametrize(
    ("file", "way_out"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model-Q4.gguf", "path of the file itself"),
        ("adapter_config.json", "base_model_name_or_path"),
        ("README.md", "download it again"),
    ],
)
def test_a_folder_of_another_kind_is_refused_with_the_way_out(tmp_path, file, way_out):
    (tmp_path / file).write_bytes(b"\x80\x04N.")
    (tmp_path / "config.json").write_text("{}")
    if file == "adapter_config.json":
        save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    message = refused(tmp_path)
    assert way_out in message
    assert str(tmp_path) in message


def test_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in [tmp_path / "absent", tmp_path / "file"]:
        assert "no model folder" in refused(folder)


def test_a_fifo_or_a_folder_in_a_shards_place_neither_hangs_nor_is_read(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refused(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path)


# ------------------------------------------------------------------------------ links


def hub_cache(root: Path) -> Path:
    """The layout of the Hugging Face cache: snapshots/<revision>/name -> ../../blobs/<hash>."""
    plain = two_shards(root / "plain")
    snapshot = root / "models--owner--name" / "snapshots" / "0123abc"
    blobs = root / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.move(file, blobs / f"hash{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash{number}")
    return snapshot


def test_the_hub_cache_is_read_through_its_links(tmp_path):
    snapshot = hub_cache(tmp_path)
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert all(file.parent == snapshot for file in checkpoint.files)
    (tmp_path / "link").symlink_to(snapshot)
    assert set(open_checkpoint(tmp_path / "link").tensors) == {"a", "b"}


def test_a_blob_that_never_came_is_an_incomplete_download(tmp_path):
    snapshot = hub_cache(tmp_path)
    (snapshot / "model-00002-of-00002.safetensors").resolve().unlink()
    message = refused(snapshot)
    assert "model-00002-of-00002.safetensors" in message
    assert "incomplete" in message


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leaves the model folder" in refused(folder)
    snapshot = hub_cache(tmp_path / "hub")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leaves the model folder" in refused(snapshot)


def test_a_link_within_the_folder_is_followed_and_a_loop_is_not(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "real")
    (tmp_path / "model.safetensors").symlink_to("real")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path)


# ------------------------------------------------------------------------------ change beneath a run


def test_a_file_that_changes_after_opening_is_noticed(tmp_path):
    checkpoint = open_checkpoint(two_shards(tmp_path))
    file = checkpoint.files[1]
    original, info = file.read_bytes(), file.stat()
    checkpoint.check_unchanged()
    changes = {
        "modification time": lambda: file.write_bytes(original),
        f"{len(original):,} bytes then, {len(original) - 1:,} now": lambda: os.truncate(
            file, len(original) - 1
        ),
        "can no longer be read": file.unlink,
    }
    for words, change in changes.items():
        change()
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.check_unchanged()
        assert str(file) in str(caught.value)
        file.write_bytes(original)
        os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
        checkpoint.check_unchanged()


def test_the_fingerprint_follows_the_bytes_not_the_place_or_time(tmp_path):
    first = open_checkpoint(two_shards(tmp_path / "a")).fingerprint()
    assert open_checkpoint(two_shards(tmp_path / "b")).fingerprint() == first
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    shard = tmp_path / "c" / "model-00001-of-00002.safetensors"
    save_file({"a": torch.ones(2, 3)}, shard)  # same header, same size, other weights
    assert open_checkpoint(tmp_path / "c").fingerprint() != first
    save_file({"a": torch.ones(3, 2)}, shard)
    assert open_checkpoint(tmp_path / "c").fingerprint() != first


def test_opening_writes_nothing(tmp_path):
    folder = two_shards(tmp_path)
    before = {path: (path.stat(), path.read_bytes()) for path in folder.iterdir()}
    open_checkpoint(folder).fingerprint()
    for path, (info, content) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == info.st_mtime_ns
    assert set(folder.iterdir()) == set(before)


# ------------------------------------------------------------------------------ extents


@dataclasses.dataclass(frozen=True)
class Rows:
    name: str
    path: Path
    start: int
    num_bytes: int


def check_extents(ranges, layout, alignment: int, max_gap_bytes: int) -> None:
    """What the docstring promises, recomputed byte by byte."""
    pages = [
        (extent.path, page)
        for extent in layout.extents
        for page in range(extent.file_offset, extent.file_offset + extent.num_bytes, alignment)
    ]
    assert len(pages) == len(set(pages)), "a page is read twice"
    filled = 0
    for extent in layout.extents:
        assert extent.file_offset % alignment == extent.num_bytes % alignment == 0
        assert extent.buffer_offset == filled, "extents are laid out one behind the other"
        filled += extent.num_bytes
    assert layout.num_bytes == filled
    for item in ranges:
        if item.num_bytes == 0:
            continue
        offset = layout.offsets[item.name]
        [extent] = [
            e
            for e in layout.extents
            if e.buffer_offset <= offset
            and offset + item.num_bytes <= e.buffer_offset + e.num_bytes
        ]
        assert extent.path == item.path
        assert offset - extent.buffer_offset == item.start - extent.file_offset
        assert item.start + item.num_bytes <= extent.file_offset + extent.needed_bytes
    used = {
        (item.path, page)
        for item in ranges
        if item.num_bytes
        for page in range(
            item.start // alignment * alignment, item.start + item.num_bytes, alignment
        )
    }
    for first, second in zip(layout.extents, layout.extents[1:], strict=False):
        if first.path == second.path:
            gap = second.file_offset - first.file_offset - first.num_bytes
            assert gap > max_gap_bytes, "two extents could have been one"
    wasted = [page for page in pages if page not in used]
    assert len(wasted) * alignment <= max_gap_bytes * max(0, len(ranges) - 1)


@pytest.mark.parametrize("alignment", [512, 4096])
@pytest.mark.parametrize("max_gap_bytes", [0, 5000])
def test_random_ranges_are_covered_once_and_keep_their_alignment(alignment, max_gap_bytes):
    rng = random.Random(alignment + max_gap_bytes)
    for _ in range(100):
        ranges = [
            Rows(
                str(i), Path(rng.choice("ab")), rng.randrange(60_000), rng.choice([0, 1, 700, 9000])
            )
            for i in range(rng.randrange(12))
        ]
        layout = merge_extents(ranges, alignment=alignment, max_gap_bytes=max_gap_bytes)
        check_extents(ranges, layout, alignment, max_gap_bytes)
        rng.shuffle(ranges)
        assert merge_extents(ranges, alignment=alignment, max_gap_bytes=max_gap_bytes) == layout


EXTENT_TABLE = {  # ranges as (start, num_bytes) -> extents as (file_offset, num_bytes, needed)
    "nothing": ([], []),
    "only an empty tensor": ([(100, 0)], []),
    "within a page": ([(100, 10)], [(0, 4096, 110)]),
    "across a boundary": ([(4090, 10)], [(0, 8192, 4100)]),
    "neighbours are one": ([(100, 4000), (4100, 4000)], [(0, 8192, 8100)]),
    "next page is one": ([(0, 4096), (4096, 1)], [(0, 8192, 4097)]),
    "a page between is two": ([(0, 4096), (8192, 1)], [(0, 4096, 4096), (8192, 4096, 1)]),
    "the same bytes twice": ([(0, 10), (0, 10)], [(0, 4096, 10)]),
    "one inside another": ([(0, 9000), (4096, 10)], [(0, 12288, 9000)]),
}


@pytest.mark.parametrize("case", EXTENT_TABLE)
def test_extents_of_small_cases(case):
    spans, expected = EXTENT_TABLE[case]
    ranges = [Rows(str(i), Path("f"), *span) for i, span in enumerate(spans)]
    layout = merge_extents(ranges, alignment=4096)
    assert [(e.file_offset, e.num_bytes, e.needed_bytes) for e in layout.extents] == expected
    assert set(layout.offsets) == {str(i) for i in range(len(spans))}


def test_tensors_seen_through_their_offsets_equal_the_reference_reader(tmp_path):
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(i * 37 + 1, 11) for i in range(20)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    entries = open_checkpoint(tmp_path).tensors
    layout = merge_extents(entries.values(), alignment=4096)
    raw = path.read_bytes()
    buffer = bytearray(layout.num_bytes)
    for extent in layout.extents:
        part = raw[extent.file_offset : extent.file_offset + extent.num_bytes]
        buffer[extent.buffer_offset : extent.buffer_offset + len(part)] = part
    for name, expected in load_file(path).items():
        found: TensorEntry = entries[name]
        view = torch.frombuffer(
            buffer, dtype=torch.float32, count=expected.numel(), offset=layout.offsets[name]
        )
        assert torch.equal(view.view(found.shape), expected)


def test_read_header_gives_entries_in_file_order(tmp_path):
    save_file({"b": torch.ones(2), "a": torch.ones(3)}, tmp_path / "x.safetensors")
    _, entries = read_header(tmp_path / "x.safetensors")
    starts = [found.start for found in entries.values()]
    assert starts == sorted(starts)
