"""What the contestants train on: a folder in the dtype chosen, and one batch for all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssdtune.assets import built_beside
from ssdtune.cache import cache_folder


def checkpoint_dtype(folder: Path) -> str:
    """The dtype that most of the folder's bytes have, as torch names it ("bfloat16")."""
    from safetensors import safe_open

    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    elements: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                view = opened.get_slice(key)
                count = 1
                for extent in view.get_shape():
                    count *= extent
                elements[view.get_dtype()] = elements.get(view.get_dtype(), 0) + count
    if not elements:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    most = max(elements, key=lambda kind: elements[kind])
    return names.get(most, most)


def in_dtype(folder: Path, dtype: str, say: Callable[[str], None]) -> Path:
    """The folder itself where it has `dtype`, else a copy in the cache that has, made once.

    Weights that must be cast on their way are read into a buffer first and cast by the CPU in
    every step; the copy is what somebody who trains in that dtype would keep on disk.
    """
    if checkpoint_dtype(folder) == dtype:
        return folder
    target = cache_folder() / f"{folder.name}-{dtype}"
    if (target / "config.json").is_file():
        return target
    say(f"copying {folder.name} to {dtype} once: {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with built_beside(target) as made:
        _cast_folder(folder, made, dtype)
    return target


def _cast_folder(folder: Path, made: Path, dtype: str) -> None:
    """Writes every file of `folder` to `made`, floating-point tensors in `dtype`, shard by shard."""
    import torch
    from safetensors.torch import load_file, save_file

    kind = getattr(torch, dtype)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.suffix == ".safetensors":
            tensors = {
                name: tensor.to(kind) if tensor.is_floating_point() else tensor
                for name, tensor in load_file(file).items()
            }
            save_file(tensors, made / file.name, metadata={"format": "pt"})
        elif file.name == "config.json":
            config = json.loads(file.read_text())
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
            (made / file.name).write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(file, made / file.name)


# Random Llamas in float32, heads of 64; what LlamaConfig's defaults don't say.
RANDOM_LLAMAS = {
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 24},
    # A head of 2 % of the weights, as models of 30 billion weights and more have; SmolLM2's is 21 %.
    "small-head": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 20,
        "vocab_size": 4096,
    },
}


def random_llama(name: str) -> Path:
    """The folder of one of RANDOM_LLAMAS, made once in the cache."""
    target = cache_folder() / f"random-llama-{name}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = RANDOM_LLAMAS[name]["hidden_size"] // 64
    sizes: dict[str, Any] = {"vocab_size": 8192, **RANDOM_LLAMAS[name]}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    target.parent.mkdir(parents=True, exist_ok=True)
    with built_beside(target) as made:
        LlamaForCausalLM(config).save_pretrained(made)
    return target


def token_batch(folder: Path, num_rows: int, length: int) -> tuple[list[list[int]], str]:
    """`num_rows` full rows of token ids, and what they are: no padding, every token a label.

    Python's own language reference through the model's tokenizer where there is one, so that
    losses are those of text; else random ids.
    """
    ids = _text_ids(folder, num_rows * length) if (folder / "tokenizer.json").is_file() else None
    told = "text of pydoc_data.topics"
    if ids is None or len(ids) < num_rows * length:
        ids, told = _random_ids(folder, num_rows * length), "random ids"
    return [ids[i * length : (i + 1) * length] for i in range(num_rows)], told


def _text_ids(folder: Path, count: int) -> list[int]:
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found: list[int] = []
    for name in sorted(topics):
        found += tokenizer(topics[name]).input_ids
        if len(found) >= count:
            break
    return found


def _random_ids(folder: Path, count: int) -> list[int]:
    import random

    config = json.loads((folder / "config.json").read_text())
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    numbers = random.Random(0)
    return [numbers.randrange(vocabulary) for _ in range(count)]
